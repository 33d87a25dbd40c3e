"""trace: the tokens that a decode step's attention read, and its error against dense attention. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from distributed_sparse.protocol.step import LayerTraceBlock, TraceBlock

MASSES = (0.5, 0.9, 0.95, 0.99)
"""Softmax masses of the columns of `LayerTrace.tokens_for_mass`."""


@dataclass
class LayerTrace:
    """One layer's attention in one decode step of one sequence, over all heads of the model.

    Attributes:
        captured_mass: float32 [H_q] exact softmax mass of the tokens read, including sampled tokens (1 when dense).
        relative_error: float32 [H_q] L2 error of the head's output against dense attention over the same cache, divided by the
            L2 norm of the dense output.
        entropy: float32 [H_q] entropy of the exact softmax, in nats.
        tokens_for_mass: int32 [H_q, 4] fewest tokens whose softmax mass reaches .5, .9, .95 and .99.
        indices: per KV head, the positions read, int32, ascending.
        details: values specific to the method, float32 [H_kv] or [H_q] each (see docs/methods); empty if the host knows that
            every (sequence, KV head) row is dense.
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
        position: position of the query; the context holds position + 1 tokens.
        layers: one per layer of the model.
    """

    position: int
    layers: list[LayerTrace]


def parse_trace(ranks: list[TraceBlock]) -> TraceStep:
    """Merge the ranks' blocks of one decode row, given in rank order."""
    position = ranks[0].position
    everything = np.arange(position + 1, dtype=np.int32)  # shared by all dense heads
    layers = [_parse_layer(blocks, everything) for blocks in zip(*(rank.layers for rank in ranks), strict=True)]
    return TraceStep(position, layers)


def _parse_layer(blocks: tuple[LayerTraceBlock, ...], everything: np.ndarray) -> LayerTrace:
    def joined(parts: list[bytes], dtype: type = np.float32) -> np.ndarray:
        return np.frombuffer(b"".join(parts), dtype=dtype)

    counts = joined([block.counts for block in blocks], np.int32)
    sent = counts * (counts < len(everything))  # ranks send no indices for a head that read its whole context
    parts = np.split(joined([block.indices for block in blocks], np.int32), np.cumsum(sent)[:-1])
    return LayerTrace(
        captured_mass=joined([block.captured_mass for block in blocks]),
        relative_error=joined([block.relative_error for block in blocks]),
        entropy=joined([block.entropy for block in blocks]),
        tokens_for_mass=joined([block.tokens_for_mass for block in blocks], np.int32).reshape(-1, len(MASSES)),
        indices=[part if listed else everything for part, listed in zip(parts, sent)],
        details={name: joined([block.details[name] for block in blocks]) for name in blocks[0].details},
    )
