"""twilight: the fewest of a selector's candidates that hold a share p of the attention mass (Twilight, arXiv 2502.02770).

A selector offers candidates, a pruner reduces them, attention reads the kept tokens with the original keys and values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from distributed_sparse.cache import Geometry, LayerCache, QuantizedKeys
from distributed_sparse.kernels.twilight.int4_logits import int4_logits
from distributed_sparse.kernels.twilight.top_p import top_p
from distributed_sparse.selection.base import (
    DecodeBatch,
    Policy,
    Selection,
    SparseConfig,
    attend_partially,
    dense_selection,
    token_selection,
)
from distributed_sparse.selection.top_k import best_pages, scorer_class
from distributed_sparse.utils.validation import check_float, check_int


@dataclass(frozen=True, kw_only=True)
class TwilightConfig(SparseConfig):
    """`selector` offers `candidate_fraction` of the context, at least `min_candidates` tokens; the pruner keeps mass `p`."""

    method: ClassVar[str] = "twilight"
    p: float = 0.95
    selector: str = "quest"
    candidate_fraction: float = 0.25
    min_candidates: int = 1024
    key_bits: int = 4
    key_offset: str | None = None
    hash_weights: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_float("sparse.p", self.p, 0.0, 1.0, low_excluded=True, remedy="0.95 suits Llama-class models; 1 prunes nothing")
        scorer_class(self.selector, "full").check_config(self)
        check_float(
            "sparse.candidate_fraction",
            self.candidate_fraction,
            0.0,
            1.0,
            low_excluded=True,
            remedy="give the share of the context that the selector offers to the pruner; 0.25 is usual",
        )
        check_int("sparse.min_candidates", self.min_candidates, 1, remedy="give a number of tokens")
        if self.key_bits not in (2, 4, 8):
            raise ValueError(f"sparse.key_bits={self.key_bits} has no kernel; use 2, 4 or 8")

    def least_pages(self, page_size: int) -> int:
        """Minimum number of pages that the selector offers."""
        return max(-(-self.min_candidates // page_size), self.sink_pages + self.recent_pages)

    def candidates(self, context_len: int, page_size: int) -> int | None:
        """Pages of a context that the selector offers; None: all pages, also of every shorter context."""
        pages, least = -(-context_len // page_size), self.least_pages(page_size)
        # A fraction below 1 may round up to all pages of this context, yet to fewer than all of a shorter one.
        if self.selector == "full" or self.candidate_fraction == 1 or least >= pages:
            return None
        return min(max(math.ceil(self.candidate_fraction * context_len / page_size), least), pages)

    def keeps_all(self, context_len: int, page_size: int) -> bool:
        """Whether every context up to this length is dense."""
        return context_len < self.min_context or (self.p >= 1 and self.candidates(context_len, page_size) is None)

    def attended_tokens(self, context_len: int, page_size: int) -> int | None:
        return context_len if self.keeps_all(context_len, page_size) else None

    def most_attended_tokens(self, context_len: int, page_size: int) -> int:
        pages = self.candidates(context_len, page_size) if context_len >= self.min_context else None
        if pages is None:
            return context_len
        missing = -context_len % page_size  # the newest page is a candidate, and may be partial
        return min(pages * page_size - missing, context_len)


class TwilightPolicy(Policy):
    """Estimates the candidates' logits from low-bit keys and keeps the smallest set of mass >= p per query head (algorithm 1).

    A KV head reads the union of its query heads' sets, the sink pages and the newest pages.
    """

    config_class = TwilightConfig
    graph_safe = True
    config: TwilightConfig

    def __init__(self, config: SparseConfig, geometry: Geometry) -> None:
        super().__init__(config, geometry)
        name = self.config.selector
        self.selector = None if name == "full" else scorer_class(name).from_config(self.config, geometry)
        self.metadata = (QuantizedKeys(self.config.key_bits, self.config.key_offset),)
        if self.selector is not None:
            self.metadata += self.selector.metadata
            self.graph_safe = self.selector.graph_safe

    def select(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Selection:
        config, heads = self.config, self.geometry.num_kv_heads
        if config.keeps_all(batch.max_context_len, batch.page_size):
            return dense_selection(batch, heads)
        pages, counts = self._candidate_pages(q, cache, batch)
        codes, scales = cache.metadata["key_codes"], cache.metadata["key_scales"]
        with self.timer("estimate"):
            logits = int4_logits(q, codes, scales, pages, counts, batch.last_page_len, self.geometry.scale)
        with self.timer("prune"):
            tokens, num_tokens, threshold = top_p(
                logits,
                pages,
                counts,
                batch.last_page_len,
                config.p,
                page_size=batch.page_size,
                sink_pages=config.sink_pages,
                recent_pages=config.recent_pages,
            )
        selection = token_selection(batch, tokens, num_tokens, config.min_context)
        if batch.trace:
            candidates = Selection(pages, counts)
            selection.details = {
                "candidates": candidates.attended(batch.last_page_len, batch.page_size).float(),
                "candidate_mass": self._mass(q, cache, batch, candidates),
                "kept": ((logits >= threshold[..., None]) & (logits > -torch.inf)).sum(-1).float(),
            }
        return selection

    def _candidate_pages(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> tuple[Tensor, Tensor]:
        config, size = self.config, batch.page_size
        capacity = config.candidates(batch.max_context_len, size)
        if self.selector is None or capacity is None:
            dense = dense_selection(batch, self.geometry.num_kv_heads)
            return dense.pages, dense.num_pages
        fraction, least = config.candidate_fraction, config.least_pages(size)

        def make() -> Tensor:
            return (batch.context_lens.double() * fraction / size).ceil().to(torch.int32).clamp_min(least)

        k = batch.cached_per_step(("candidates", fraction, least), make)
        with self.timer("score"):
            scores = self.selector.page_scores(q, cache, batch)
        with self.timer("top_k"):
            return best_pages(scores, batch, k, config, capacity)

    def _mass(self, q: Tensor, cache: LayerCache, batch: DecodeBatch, selection: Selection) -> Tensor:
        """Share of the exact softmax mass that a selection of pages holds: float32 [B, H_q]."""

        def lse(of: Selection) -> Tensor:
            return attend_partially(q, cache, batch, of, self.geometry.scale)[1]

        return (lse(selection) - lse(dense_selection(batch, self.geometry.num_kv_heads))).exp()

    def bytes_scored(self, context_lens: list[int], max_context_len: int | None = None) -> int:
        config, geometry = self.config, self.geometry
        key_bytes = geometry.head_dim * config.key_bits // 8 + 4  # codes; scale and minimum in fp16
        estimated = 0
        for n in context_lens:
            pages = config.candidates(n, geometry.page_size)
            estimated += n if pages is None else pages * geometry.page_size
        scored = 0
        longest = max(context_lens) if max_context_len is None else max_context_len
        # The same condition as in `_candidate_pages`.
        if self.selector is not None and config.candidates(longest, geometry.page_size) is not None:
            scored = self.selector.bytes_scored(context_lens)
        return scored + estimated * key_bytes * geometry.num_kv_heads
