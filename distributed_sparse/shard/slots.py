"""SlotTable: state of each running sequence between steps: page table, last token, sampling parameters. vLLM's InputBatch."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distributed_sparse.protocol.step import StepPlan
from distributed_sparse.shard.inputs import Arrays
from distributed_sparse.shard.sampling_table import SamplingTable


class SlotTable:
    """State per slot of the batch.

    Attributes:
        page_table: int32 [num_slots, max_pages] on the device, for attention.
        host_page_table: the same on the host, to compute the pages that new tokens are written to.
        last_token: int64 [num_slots] on the device: the token sampled last, which is the next step's input.
        sampling: sampling parameters of each slot.
        prompt_length, prefill_length: int64 [num_slots] on the host; see `SlotSetup`.
    """

    def __init__(self, num_slots: int, max_pages: int, device: torch.device) -> None:
        self.page_table = torch.zeros((num_slots, max_pages), dtype=torch.int32, device=device)
        self.host_page_table = np.zeros((num_slots, max_pages), dtype=np.int32)
        self.last_token = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.sampling = SamplingTable(num_slots)
        self.prompt_length = np.zeros(num_slots, dtype=np.int64)
        self.prefill_length = np.zeros(num_slots, dtype=np.int64)
        self._num_pages = np.zeros(num_slots, dtype=np.int64)
        self._is_set_up = np.zeros(num_slots, dtype=np.bool_)

    def apply(self, plan: StepPlan) -> Arrays:
        """Apply a step plan's new sequences and new pages on the host.

        Returns:
            The arguments of `update`, to be uploaded; empty if there are no new pages.
        """
        for setup in plan.setups:
            slot = setup.slot
            self.sampling.set(slot, setup)
            self.prompt_length[slot], self.prefill_length[slot] = setup.prompt_length, setup.prefill_length
            self._num_pages[slot] = 0
            self._is_set_up[slot] = True
        places, pages = [], []
        for slot, new in plan.new_pages:
            start, end = self._num_pages[slot], self._num_pages[slot] + len(new)
            self.host_page_table[slot, start:end] = new
            self._num_pages[slot] = end
            places.append(slot * self.host_page_table.shape[1] + np.arange(start, end))
            pages.append(np.array(new, dtype=np.int32))
        if not pages:
            return {}
        return {"new_page_places": np.concatenate(places), "new_pages": np.concatenate(pages)}

    def update(self, places: Tensor, pages: Tensor) -> None:
        """Write new pages int32 [E] into the device's table, at places int64 [E] of the flattened table."""
        self.page_table.view(-1).index_copy_(0, places, pages)

    def check(self, slots: NDArray[np.int64]) -> None:
        """Assert that the slots have been set up."""
        assert self._is_set_up[slots].all(), f"one of the slots {slots.tolist()} was never set up"

    def remember(self, slots: Tensor, tokens: Tensor) -> None:
        """Store sampled tokens int64 [R] of slots int64 [R] on the device, as the next step's input."""
        self.last_token.index_copy_(0, slots, tokens)
