"""SlotTable: what a shard remembers of each running sequence between steps: its pages, its last token, how to sample."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distributed_sparse.driver.messages import SlotSetup, StepPlan


class SlotTable:
    """State per slot of the batch. The page table is kept twice: on the host (where a token is written) and on the device."""

    def __init__(self, num_slots: int, max_pages: int, device: torch.device) -> None:
        self.device = device
        self.page_table = torch.zeros((num_slots, max_pages), dtype=torch.int32, device=device)
        self.host_page_table = np.zeros((num_slots, max_pages), dtype=np.int32)
        self.num_pages = np.zeros(num_slots, dtype=np.int64)
        self.last_token = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.setups: list[SlotSetup | None] = [None] * num_slots

    def apply(self, plan: StepPlan) -> None:
        """Take in the plan's new sequences and new pages."""
        for setup in plan.setups:
            self.setups[setup.slot] = setup
            self.num_pages[setup.slot] = 0
        if not plan.new_pages:
            return
        rows: list[int] = []
        columns: list[int] = []
        values: list[int] = []
        for slot, pages in plan.new_pages:
            start = int(self.num_pages[slot])
            rows += [slot] * len(pages)
            columns += range(start, start + len(pages))
            values += pages
            self.num_pages[slot] += len(pages)
        self.host_page_table[rows, columns] = values
        index = torch.tensor([rows, columns, values], device=self.device)
        self.page_table[index[0], index[1]] = index[2].to(torch.int32)

    def setup(self, slot: int) -> SlotSetup:
        """How the sequence in a slot samples."""
        found = self.setups[slot]
        assert found is not None, f"slot {slot} was never set up"
        return found

    def remember(self, slots: list[int], tokens: Tensor) -> None:
        """Keep the sampled tokens (int64 [len(slots)]) on the device as the next step's input."""
        if slots:
            self.last_token[torch.tensor(slots, device=self.device)] = tokens
