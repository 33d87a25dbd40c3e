"""meter: the decode attention of a piece of work, from the engine's counters."""

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
        steps: decode steps; a step of a batch counts once per sequence.
        context: tokens in context, summed over the steps.
        attended: int64 [layers, kv_heads] tokens attended, summed over the steps.
        rows_sparse: (step, layer, KV head) rows that read less than their context.
        bytes_read: of K, V and metadata, over all ranks.
    """

    steps: int
    context: int
    attended: np.ndarray
    rows_sparse: int
    bytes_read: int


class Meter:
    """Reads an engine's counters between pieces of work; needs exclusive use of the engine."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._context = 0
        self._before = self._read()

    def measure(self, contexts: Iterable[int]) -> Counters:
        """The counters since the last call, or since construction.

        Args:
            contexts: tokens in context of every decode step since then.
        """
        steps = list(contexts)
        self._context += sum(steps)
        now = self._read()
        spent = {name: now[name] - self._before[name] for name in now}
        self._before = now
        rows = spent.pop("rows")
        assert rows == len(steps) * now["attended"].size, f"{rows} rows were counted in {len(steps)} decode steps"
        return Counters(steps=len(steps), context=sum(steps), **spent)

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
    """Tokens in context at each decode step of a request: one per question token, then one per output except the last."""
    first = prompt_length - num_question_tokens + 1
    return list(range(first, prompt_length + max(num_output_tokens, 1)))


def page_bytes(ranks: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Bytes of one page over all ranks and layers, {"kv", "metadata"}; `ranks` is `LLM.stats()["ranks"]`."""
    found = {"kv": 0.0, "metadata": 0.0}
    for rank in ranks:
        share = rank["cache_bytes"] / (rank["cache_bytes"] + rank["metadata_bytes"])
        found["kv"] += rank["page_bytes"] * share
        found["metadata"] += rank["page_bytes"] * (1 - share)
    return found


def pages_held(num_tokens: int, page_size: int, evict_window: tuple[int, int] | None) -> int:
    """Pages that a sequence of `num_tokens` holds in decode; an evicting method keeps `evict_window` = (sink, recent) pages."""
    pages = -(-num_tokens // page_size)
    return pages if evict_window is None else min(pages, sum(evict_window))
