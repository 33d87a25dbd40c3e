"""SteppedShard: one shard without a Driver: a test says which sequences it has, and queues step after step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distributed_sparse.config import EngineConfig
from distributed_sparse.protocol.step import DecodeRow, PrefillChunk, SlotSetup, StepPlan, StepResult
from distributed_sparse.shard.collectives.collectives import Collectives
from distributed_sparse.shard.pending import PendingStep
from distributed_sparse.shard.shard import Shard
from tests.support.prompts import random_tokens


class SteppedShard:
    """A shard of one rank, and the sequences in its slots. Pages are given out one after the other, never twice.

    Args:
        path: the checkpoint.
        num_pages: of the cache; None: as many as the shard has room for.
        make_shard: makes the shard.
        config: of EngineConfig.
    """

    def __init__(
        self,
        path: Path,
        num_pages: int | None = None,
        make_shard: Callable[[EngineConfig, int, int, Collectives], Shard] = Shard,
        **config: Any,
    ) -> None:
        given: dict[str, Any] = {"model": str(path), "device": "cpu", **config}
        self.config = EngineConfig(**given)
        self.shard = make_shard(self.config, 0, 1, Collectives())
        loaded = self.shard.load()
        self.shard.allocate(loaded.max_pages if num_pages is None else num_pages)
        self.lengths: dict[int, int] = {}
        """Tokens in the cache by slot."""
        self._held: dict[int, int] = {}
        self._next_page = 1
        self._step = 0

    def start(self, lengths: Sequence[int], first_slot: int = 0, **sampling: Any) -> StepResult:
        """Give slots to sequences with prompts so long, and prefill them; whatever the slots held is forgotten."""
        plan = self._plan()
        for slot, length in enumerate(lengths, first_slot):
            plan.setups.append(slot_setup(slot, length, **sampling))
            self.lengths[slot], self._held[slot] = length, 0
            self._grow(plan, slot, length)
            plan.prefill.append(PrefillChunk(slot, 0, random_tokens(length, seed=length), [slot]))
        return self.shard.step(plan)

    def decode_plan(self, slots: Sequence[int] | None = None) -> StepPlan:
        """One more token of each sequence (or of those in some slots), from the token that the shard sampled last."""
        plan = self._plan()
        for slot in self.lengths if slots is None else slots:
            position = self.lengths[slot]
            self.lengths[slot] = position + 1
            self._grow(plan, slot, position + 1)
            plan.decode.append(DecodeRow(slot, position, None, [slot]))
        return plan

    def decode(self, slots: Sequence[int] | None = None) -> list[int]:
        """The tokens of one decode step."""
        return self.shard.step(self.decode_plan(slots)).tokens

    def begin(self, slots: Sequence[int] | None = None) -> PendingStep:
        """A decode step that has been queued."""
        return self.shard.begin(self.decode_plan(slots))

    def end(self, slot: int) -> None:
        """Forget a sequence; its slot may be started anew."""
        del self.lengths[slot]

    def close(self) -> None:
        self.shard.close()

    def _plan(self) -> StepPlan:
        self._step += 1
        return StepPlan(step=self._step, generation=0)

    def _grow(self, plan: StepPlan, slot: int, length: int) -> None:
        missing = -(-length // self.config.page_size) - self._held[slot]
        if missing > 0:
            plan.new_pages.append((slot, [*range(self._next_page, self._next_page + missing)]))
            self._next_page += missing
            self._held[slot] += missing
        assert self._next_page <= self.shard.num_pages, "the test needs more pages"


def slot_setup(slot: int, length: int, **sampling: Any) -> SlotSetup:
    """Greedy, unless told otherwise."""
    defaults: dict[str, Any] = {
        **{"seed": 7 + slot, "sample_index": 0, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0},
        **{"logprobs": None, "suppressed": [], "suppress_until": 0},
    }
    return SlotSetup(slot=slot, prompt_length=length, prefill_length=length, **{**defaults, **sampling})
