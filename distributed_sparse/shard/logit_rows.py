"""LogitRows: the rows of a step's hidden states that need logits, to sample a token or for prompt_logprobs.

`fill_result` writes the tensors that a step fetches from the device into its StepResult.
"""

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
"""Prompt tokens whose logits are computed at once; bounds the [rows, vocabulary] buffer."""


class TargetBlock(NamedTuple):
    """At most LOGPROB_ROWS consecutive rows of one slot whose next tokens are known (prompt_logprobs)."""

    slot: int
    position: int
    """Position of the first row's next token."""
    first_row: int
    first_target: int
    """Index of the first row's next token in `LogitRows.targets`."""
    num_rows: int
    num_best: int
    """Best tokens returned beside each known one; -1: the whole vocabulary."""


@dataclass(frozen=True)
class LogitRows:
    """The rows of one step plan, on the host.

    rows, slots, positions: int64 [R], one per sampled token: its row of the hidden states, ascending; its slot; its position
                            in the sequence.
    targets:                int64 [T] known next tokens of all blocks, concatenated.
    blocks:                 rows with known next tokens.
    """

    rows: NDArray[np.int64]
    slots: NDArray[np.int64]
    positions: NDArray[np.int64]
    targets: NDArray[np.int64]
    blocks: list[TargetBlock]

    @classmethod
    def of(cls, plan: StepPlan) -> LogitRows:
        """Collect the rows of a step plan. Hidden states hold the decode rows, then the prompt chunks."""
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
        """Arrays to upload: for `distinct_rows`, for sampling, and the targets. Arrays that are not needed are absent."""
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
        """The distinct rows of x [N, ...] that tokens are sampled from, in order; a view if they are x's first rows."""
        rows = views.get("drawn_rows")
        return x[: int(self.rows[-1]) + 1] if rows is None else x.index_select(0, rows)


def fill_result(result: StepResult, plan: StepPlan, fetched: Mapping[str, NDArray[Any]]) -> None:
    """Write the tensors fetched from the device into a step's result: the tokens, and which logits are NaN or infinite.

    Args:
        fetched: tokens int64 [R] and scores float32 [R] from `sampler.sample`; row_sums float32 [N] of the hidden states. Each
            may be absent.
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
    """The first row of a block with NaN log-probabilities, if any. One NaN or infinite logit makes its whole row NaN."""
    first_column = np.frombuffer(block.logprobs, dtype=np.float32)[:: block.width]
    bad = np.flatnonzero(np.isnan(first_column))[:1].tolist()
    return [BadLogits(block.slot, block.position + row - 1, math.nan) for row in bad]


def _known_rows(plan: StepPlan) -> Iterator[tuple[int, int, int, list[int], int]]:
    """(slot, first row, its position, next tokens, best tokens beside each) of every part that requests prompt_logprobs."""
    row = 0
    for decode_row in plan.decode:
        if decode_row.target is not None:
            yield decode_row.slot, row, decode_row.position, [decode_row.target], decode_row.prompt_logprobs
        row += 1
    for chunk in plan.prefill:
        if chunk.targets:
            yield chunk.slot, row, chunk.start, chunk.targets, chunk.prompt_logprobs
        row += len(chunk.tokens)
