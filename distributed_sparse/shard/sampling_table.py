"""SamplingTable: sampling parameters per slot as arrays, which a step gathers without a Python loop."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from distributed_sparse.protocol.step import SlotSetup


class SamplingTable:
    """Sampling parameters per slot, on the host; set when a slot is assigned to a sequence.

    Attributes:
        logprobs: int64 [num_slots] best tokens whose log-probabilities are returned beside the sampled one; -1: none at all.
    """

    def __init__(self, num_slots: int) -> None:
        self.logprobs = np.full(num_slots, -1, dtype=np.int64)
        self._temperature = np.zeros(num_slots)
        self._top_p = np.ones(num_slots)
        self._top_k = np.zeros(num_slots, dtype=np.int64)
        self._min_p = np.zeros(num_slots)
        self._seed = np.zeros((2, num_slots), dtype=np.int64)  # low and high 32 bits
        self._sample_index = np.zeros(num_slots, dtype=np.int64)
        self._suppress_until = np.zeros(num_slots, dtype=np.int64)
        self._suppressed: list[list[int]] = [[] for _ in range(num_slots)]

    def set(self, slot: int, setup: SlotSetup) -> None:
        """Store the sampling parameters of a slot's new sequence."""
        self.logprobs[slot] = -1 if setup.logprobs is None else setup.logprobs
        self._temperature[slot] = setup.temperature
        self._top_p[slot] = setup.top_p
        self._top_k[slot] = setup.top_k
        self._min_p[slot] = setup.min_p
        self._seed[:, slot] = setup.seed & 0xFFFFFFFF, setup.seed >> 32
        self._sample_index[slot] = setup.sample_index
        self._suppress_until[slot] = setup.suppress_until if setup.suppressed else 0
        self._suppressed[slot] = setup.suppressed

    def random_key(self, slots: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [4, R] key of random numbers: low and high 32 bits of the seed, sample index, position."""
        return np.stack([*self._seed[:, slots], self._sample_index[slots], positions])

    def draws(self, slots: NDArray[np.int64], positions: NDArray[np.int64], vocab_size: int) -> dict[str, NDArray[Any]]:
        """The arrays of `sampler.Draws` for R tokens, by name; absent if no token uses them.

        Args:
            slots, positions: int64 [R] slot of each token, and its position in the sequence.
            vocab_size: columns of the logits.
        """
        found: dict[str, NDArray[Any]] = {}
        early = np.flatnonzero(positions < self._suppress_until[slots])
        if early.size:
            found["suppressed"] = np.concatenate(
                [row * vocab_size + np.array(self._suppressed[slots[row]], dtype=np.int64) for row in early]
            )
        (drawn,) = np.nonzero(self._temperature[slots] > 0)
        if not drawn.size:
            return found
        if drawn.size < len(slots):
            found["drawn"] = drawn
            slots, positions = slots[drawn], positions[drawn]
        found["random_key"] = self.random_key(slots, positions)[..., None]
        found["temperature"] = self._temperature[slots, None].astype(np.float32)
        if (self._min_p[slots] > 0).any():
            found["min_p"] = self._min_p[slots, None].astype(np.float32)
        top_k, top_p = self._top_k[slots, None], self._top_p[slots, None]
        is_cut = (top_k > 0) & (top_k < vocab_size)
        if is_cut.any() or (top_p < 1).any():
            found["top_k"] = np.where(is_cut, top_k, vocab_size)
            found["top_p"] = np.where(top_p < 1, top_p, 2.0).astype(np.float32)  # over any mass: cuts nothing
        return found
