"""Predictor: scores what a row could attend to: Quest's page bounds, hash signatures, the exact logits.

A predictor works alone (`TopKPolicy`: quest, hash, oracle_topk, random), ahead of Twilight's pruner, and inside vAttention.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from distributed_sparse.kernels.top_k_pages import top_k_pages
from distributed_sparse.selection.base import (
    DecodeBatch,
    Geometry,
    LayerCache,
    Policy,
    Selection,
    SparseConfig,
    covers,
    dense_selection,
    page_budget,
    slots_of,
    token_selection,
    tokens_in_budget,
)
from distributed_sparse.selection.metadata import Metadata


class Predictor(ABC):
    """Scores every page of a row, or every token."""

    per_token: ClassVar[bool] = False
    graph_safe: bool = True
    metadata: tuple[Metadata, ...] = ()

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry

    @abstractmethod
    def scores(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Tensor:
        """Higher is better, one score for the whole group of query heads.

        Returns:
            float32, or int32 of few distinct values from 0 on: [B, H_kv, P] per page, or [B, H_kv, P * page_size] per token.
            Entries past a row's count are undefined.
        """

    def page_scores(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Tensor:
        """The scores of pages: of a predictor per token, its best token's."""
        scores = self.scores(q, cache, batch)
        if not self.per_token:
            return scores
        position = torch.arange(scores.shape[2], device=scores.device)
        past = position >= batch.context_lens[:, None, None]
        return scores.masked_fill(past, -1).unflatten(2, (-1, batch.page_size)).amax(-1)

    def bytes_scored(self, context_lens: list[int]) -> int:
        """Bytes that `scores` reads for rows of these contexts, over this rank's KV heads."""
        return 0


@dataclass(frozen=True, kw_only=True)
class TopKConfig(SparseConfig):
    """`token_budget` tokens per KV head and step, the sink and recent ones included.

    The budget is rounded up to whole pages, and sinks and recent tokens are `sink_pages` and `recent_pages` pages' worth, of
    methods that choose single tokens too: 33 reads 48 tokens at pages of 16.
    """

    method: ClassVar[str]
    per_token: ClassVar[bool] = False
    """Whether single tokens are chosen: that of the method's predictor."""
    token_budget: int = 2048

    def check(self, page_size: int) -> None:
        self.check_budget(self.token_budget, page_size)

    def attended_tokens(self, context_len: int, page_size: int) -> int:
        in_pages = tokens_in_budget(self, self.token_budget, context_len, page_size)
        if not self.per_token or in_pages == context_len:
            return in_pages
        return -(-self.token_budget // page_size) * page_size


class TopKPolicy(Policy):
    """The best pages or tokens by a predictor's scores, as many as the budget holds."""

    config: TopKConfig
    predictor: Predictor
    graph_safe = True

    def select(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Selection:
        config = self.config
        if covers(config, config.token_budget, batch):
            return dense_selection(batch, self.geometry.num_kv_heads)
        with self.timer("score"):
            scores = self.predictor.scores(q, cache, batch)
        k, capacity = page_budget(config, config.token_budget, batch)
        with self.timer("top_k"):
            if self.predictor.per_token:
                return self._best_tokens(scores, k, capacity, batch)
            return Selection(*best_pages(scores, batch, k, config, capacity))

    def _best_tokens(self, scores: Tensor, k: Tensor, capacity: int, batch: DecodeBatch) -> Selection:
        """As many tokens as fill k pages."""
        size = batch.page_size
        positions, counts = top_k_logical(
            scores,
            batch.context_lens,
            k * size,
            batch,
            sinks=self.config.sink_pages * size,
            recent=self.config.recent_pages * size,
            capacity=capacity * size,
        )
        return token_selection(batch, slots_of(positions, batch), counts)

    def bytes_scored(self, context_lens: list[int], max_context_len: int | None = None) -> int:
        return self.predictor.bytes_scored(context_lens)


def best_pages(scores: Tensor, batch: DecodeBatch, k: Tensor, config: SparseConfig, capacity: int) -> tuple[Tensor, Tensor]:
    """The k best pages of every row, the sink and recent pages of its settings among them: as of `top_k_pages`."""
    return top_k_pages(
        scores,
        batch.page_table,
        batch.num_pages,
        k,
        sink_pages=config.sink_pages,
        recent_pages=config.recent_pages,
        capacity=capacity,
    )


def top_k_logical(
    scores: Tensor, counts: Tensor, k: Tensor, batch: DecodeBatch, *, sinks: int, recent: int, capacity: int
) -> tuple[Tensor, Tensor]:
    """`top_k_pages` by logical index, of pages or of tokens: int32 [B, H_kv, capacity] ascending, counts int32 [B, H_kv]."""
    rows, width = scores.shape[0], scores.shape[2]
    own = batch.once(("logical", width), lambda: torch.arange(width, dtype=torch.int32, device=scores.device))
    identity = own.expand(rows, -1)
    return top_k_pages(scores, identity, counts, k, sink_pages=sinks, recent_pages=recent, capacity=capacity)
