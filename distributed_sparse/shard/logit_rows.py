"""LogitRows: which rows of a step's hidden states are read once they are there: to draw a token, or to score a known one; and
`fill_result`: what the host learns of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from distributed_sparse.protocol.step import BadLogits, LogprobBlock, StepPlan, StepResult
from distributed_sparse.shard.inputs import Arrays

LOGPROB_ROWS = 256
"""Prompt rows whose logits are made at once: bounds the [rows, vocabulary] buffer."""


class TargetBlock(NamedTuple):
    """At most LOGPROB_ROWS consecutive rows of one slot whose next tokens are known."""

    slot: int
    position: int
    """Of the first row's next token."""
    first_row: int
    first_target: int
    """Its place among all targets of the step."""
    num_rows: int
    num_best: int
    """Best tokens beside each; -1: the whole vocabulary."""


@dataclass(frozen=True)
class LogitRows:
    """Of one plan, on the host.

    rows, slots, positions: int64 [R], one per token that is drawn: the row of the hidden states, ascending; whose token it is;
                            where it will stand.
    targets:                int64 [T] known next tokens of all blocks, one block after the other.
    blocks:                 where those are.
    """

    rows: NDArray[np.int64]
    slots: NDArray[np.int64]
    positions: NDArray[np.int64]
    targets: NDArray[np.int64]
    blocks: list[TargetBlock]

    @classmethod
    def of(cls, plan: StepPlan) -> LogitRows:
        """Decode rows come first in the hidden states, then the prompt chunks."""
        drawn: list[tuple[int, int, int]] = []
        end_row = 0
        for part in plan.parts:
            end_row += part.num_tokens
            drawn += [(end_row - 1, slot, part.end) for slot in part.samples]
        rows, slots, positions = np.array(drawn, dtype=np.int64).reshape(-1, 3).T
        blocks: list[TargetBlock] = []
        targets: list[int] = []
        for slot, row, position, known, num_best in _known_rows(plan):
            for start in range(0, len(known), LOGPROB_ROWS):
                count = min(len(known) - start, LOGPROB_ROWS)
                first = len(targets) + start
                blocks.append(TargetBlock(slot, position + start + 1, row + start, first, count, num_best))
            targets += known
        return cls(rows, slots, positions, np.array(targets, dtype=np.int64), blocks)

    def arrays(self) -> Arrays:
        """What `rows_of` and its callers need on the device."""
        found: Arrays = {}
        if self.rows.size:
            found["drawn_slots"] = self.slots
            unique, places = np.unique(self.rows, return_inverse=True)
            if unique[-1] != len(unique) - 1:
                found["drawn_rows"] = unique
            if len(unique) < len(self.rows):
                found["drawn_places"] = places.astype(np.int64)
        if self.blocks:
            found["targets"] = self.targets
        return found

    def distinct_rows(self, x: Tensor, views: Mapping[str, Tensor]) -> Tensor:
        """Of x [N, ...] the rows that tokens are drawn from, each once, in order; a view where they are the first ones."""
        rows = views.get("drawn_rows")
        return x[: int(self.rows[-1]) + 1] if rows is None else x.index_select(0, rows)


def fill_result(result: StepResult, plan: StepPlan, fetched: Mapping[str, NDArray[Any]]) -> None:
    """Write what was fetched of a step into its result: the tokens, and which logits are NaN or infinite.

    Args:
        fetched: tokens int64 [R] and scores float32 [R], as of `sampler.sample`; row_sums float32 [N] of the hidden states.
            What the step has not is absent.
    """
    if "tokens" in fetched:
        result.tokens = fetched["tokens"].tolist()
        if len(bad := np.flatnonzero(~np.isfinite(fetched["scores"]))):
            drawn = [(slot, part.end - 1) for part in plan.parts for slot in part.samples]
            result.bad_logits += [BadLogits(*drawn[i], float(fetched["scores"][i])) for i in bad]
    if "row_sums" in fetched and len(bad := np.flatnonzero(~np.isfinite(fetched["row_sums"]))):
        read = [(part.slot, part.end - part.num_tokens + i) for part in plan.parts for i in range(part.num_tokens)]
        first_of_slot = dict(reversed([read[i] for i in bad]))
        result.bad_logits += [BadLogits(slot, position, math.nan) for slot, position in first_of_slot.items()]


def nan_logprobs(block: LogprobBlock) -> list[BadLogits]:
    """The first row of a block whose log-probabilities are NaN (one logit that is NaN or infinite makes all of a row NaN)."""
    first_column = np.frombuffer(block.logprobs, dtype=np.float32)[:: block.width]
    bad = np.flatnonzero(np.isnan(first_column))[:1].tolist()
    return [BadLogits(block.slot, block.position + row - 1, math.nan) for row in bad]


def _known_rows(plan: StepPlan) -> Iterator[tuple[int, int, int, list[int], int]]:
    """(slot, first row, its position, the tokens that follow, best tokens beside each) where prompt_logprobs are wanted."""
    row = 0
    for decode_row in plan.decode:
        if decode_row.target is not None:
            yield decode_row.slot, row, decode_row.position, [decode_row.target], decode_row.prompt_logprobs
        row += 1
    for chunk in plan.prefill:
        if chunk.targets:
            yield chunk.slot, row, chunk.start, chunk.targets, chunk.prompt_logprobs
        row += len(chunk.tokens)
