"""Meter: what a piece of work cost an engine's attention, from the engine's own counters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from distributed_sparse import LLM


@dataclass(frozen=True)
class Counters:
    """Decode attention of one piece of work.

    Attributes:
        steps: decode steps, each of one sequence.
        context: tokens in context, summed over the steps.
        attended: int64 [layers, kv_heads] tokens attended, summed over the steps.
        rows_sparse: rows (one step, layer and KV head) that read less than their context.
        bytes_read: of K, V and metadata, over all ranks.
    """

    steps: int
    context: int
    attended: np.ndarray
    rows_sparse: int
    bytes_read: int


class Meter:
    """Reads an engine's counters between pieces of work. Nobody else may use the engine meanwhile."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._context = 0
        self._before = self._read()

    def measure(self, contexts: Iterable[int]) -> Counters:
        """The counters since the last call.

        Args:
            contexts: of every decode step in between, the tokens in its context.
        """
        steps = list(contexts)
        self._context += sum(steps)
        before, now = self._before, self._read()
        self._before = now
        rows = now["rows"] - before["rows"]
        assert rows == len(steps) * now["attended"].size, f"{rows} rows were counted in {len(steps)} decode steps"
        return Counters(
            steps=len(steps),
            context=sum(steps),
            attended=now["attended"] - before["attended"],
            rows_sparse=now["rows_sparse"] - before["rows_sparse"],
            bytes_read=now["bytes_read"] - before["bytes_read"],
        )

    def _read(self) -> dict[str, Any]:
        model, found = self._llm.model_config, self._llm.stats()["attention"]
        shape = (model.num_hidden_layers, model.num_key_value_heads)
        density = np.array(found["density"], dtype=np.float64) if found["density"] else np.zeros(shape)
        return {
            "attended": np.rint(density * self._context).astype(np.int64),  # exact: below 2**53
            "rows": found["rows_dense"] + found["rows_sparse"],
            "rows_sparse": found["rows_sparse"],
            "bytes_read": found["bytes_read"],
        }


def decode_contexts(prompt_length: int, num_question_tokens: int, num_output_tokens: int = 0) -> list[int]:
    """Tokens in context at every decode step of a request: of its question's tokens, then of all outputs but the last."""
    first = prompt_length - num_question_tokens + 1
    return list(range(first, prompt_length + max(num_output_tokens, 1)))


def page_bytes(ranks: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Bytes of one page over all ranks and layers: {"kv", "metadata"}, from `LLM.stats()["ranks"]`."""
    found = {"kv": 0.0, "metadata": 0.0}
    for rank in ranks:
        share = rank["cache_bytes"] / (rank["cache_bytes"] + rank["metadata_bytes"])
        found["kv"] += rank["page_bytes"] * share
        found["metadata"] += rank["page_bytes"] * (1 - share)
    return found


def pages_held(num_tokens: int, page_size: int, evict_window: tuple[int, int] | None) -> int:
    """Pages that one sequence holds in decode with so many tokens; `evict_window` (sink, recent) where others are evicted."""
    pages = -(-num_tokens // page_size)
    return pages if evict_window is None else min(pages, sum(evict_window))
