"""Traces: what a decode step's attention read, and how far that is from dense attention over the same cache. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from distributed_sparse.protocol.step import LayerTraceBlock, TraceBlock

MASSES = (0.5, 0.9, 0.95, 0.99)
"""Softmax masses that `tokens_for_mass` counts tokens for."""


@dataclass
class LayerTrace:
    """One layer's attention in one decode step of one sequence, over all heads of the model.

    Attributes:
        captured_mass: float32 [H_q] exact softmax mass of the tokens that were read, sampled ones included (1 when dense).
        relative_error: float32 [H_q] L2 error of the head's output over the L2 norm of dense attention's.
        entropy: float32 [H_q] entropy of the exact softmax, in nats.
        tokens_for_mass: int32 [H_q, 4] fewest tokens that hold a mass of .5, .9, .95 and .99.
        indices: per KV head, the positions that were read, int32, ascending.
        details: what the method adds, float32 [H_kv] or [H_q] each (docs/methods says what); empty where the host knows that
            every row is dense.
    """

    captured_mass: np.ndarray
    relative_error: np.ndarray
    entropy: np.ndarray
    tokens_for_mass: np.ndarray
    indices: list[np.ndarray]
    details: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def num_attended(self) -> np.ndarray:
        """int32 [H_kv] tokens read per KV head."""
        return np.array([len(of_head) for of_head in self.indices], dtype=np.int32)


@dataclass
class TraceStep:
    """One traced decode step of one sequence.

    Attributes:
        position: of the query; the context holds position + 1 tokens.
        layers: one per layer of the model.
    """

    position: int
    layers: list[LayerTrace]


def parse_trace(ranks: list[TraceBlock]) -> TraceStep:
    """The ranks' blocks of one row, in rank order, as one."""
    position = ranks[0].position
    everything = np.arange(position + 1, dtype=np.int32)  # one array for all that is dense
    layers = [_parse_layer(blocks, everything) for blocks in zip(*(rank.layers for rank in ranks), strict=True)]
    return TraceStep(position, layers)


def _parse_layer(blocks: tuple[LayerTraceBlock, ...], everything: np.ndarray) -> LayerTrace:
    def joined(parts: list[bytes], dtype: type = np.float32) -> np.ndarray:
        return np.frombuffer(b"".join(parts), dtype=dtype)

    counts = joined([block.counts for block in blocks], np.int32)
    sent = counts * (counts < len(everything))  # a head that read all of its context says no indices
    parts = np.split(joined([block.indices for block in blocks], np.int32), np.cumsum(sent)[:-1])
    return LayerTrace(
        captured_mass=joined([block.captured_mass for block in blocks]),
        relative_error=joined([block.relative_error for block in blocks]),
        entropy=joined([block.entropy for block in blocks]),
        tokens_for_mass=joined([block.tokens_for_mass for block in blocks], np.int32).reshape(-1, len(MASSES)),
        indices=[part if listed else everything for part, listed in zip(parts, sent)],
        details={name: joined([block.details[name] for block in blocks]) for name in blocks[0].details},
    )
