"""Scorer: scores pages or tokens, such as Quest's page bounds or hash signatures; TopKPolicy: attends to the best of them.

A scorer serves three users: `TopKPolicy` (quest, hash, oracle_topk, random), and Twilight and vAttention as their `selector`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from distributed_sparse.cache import Metadata
from distributed_sparse.kernels.quest.top_k_pages import top_k_pages
from distributed_sparse.selection.base import (
    DecodeBatch,
    Geometry,
    LayerCache,
    Policy,
    Selection,
    SparseConfig,
    all_rows_dense,
    dense_selection,
    named_class,
    page_budget,
    slots_of,
    token_selection,
    tokens_in_budget,
)

SCORERS: dict[str, type[Scorer]] = {}
"""Scorers by their `selector` name."""


def scorer_class(name: str, *others: str) -> type[Scorer]:
    """The scorer that a `selector:` names: one of `SCORERS`, or "package.module:Scorer". `others`: further allowed names."""
    return named_class("sparse.selector", name, SCORERS | dict.fromkeys(others, Scorer), Scorer)


class Scorer(ABC):
    """Scores every page, or every token, of each (sequence, KV head) row. The rules in `selection/base.py` apply.

    Attributes:
        selector: name under which Twilight and vAttention accept it as `selector`; None: only by its import path.
        per_token: True if it scores single tokens, False if pages.
        graph_safe: as in `Policy`.
        metadata: as in `Policy`.
    """

    selector: ClassVar[str | None] = None
    per_token: ClassVar[bool] = False
    graph_safe: bool = True
    metadata: tuple[Metadata, ...] = ()

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry

    def __init_subclass__(cls) -> None:
        own = vars(cls).get("selector")  # an inherited name stays with the class that declares it
        if own is not None:
            SCORERS[own] = cls

    @classmethod
    def from_config(cls, config: SparseConfig, geometry: Geometry) -> Self:
        """Create the scorer from the config of the method that uses it.

        Raises:
            ValueError: the config lacks a setting that the scorer needs.
        """
        return cls(geometry)

    @classmethod  # noqa: B027
    def check_config(cls, config: SparseConfig) -> None:
        """Raise ValueError if the config of the method that uses it lacks a setting. Called before the engine starts."""

    @abstractmethod
    def scores(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Tensor:
        """One score per page or token for the whole group of query heads; higher is better.

        Returns:
            [B, H_kv, P] per page, or [B, H_kv, P * page_size] per token; float32 without NaN (q of padded rows aside), or int32
            in 0..65535 (few distinct values; selected by histogram instead of a sort). Entries past a row's count are any bits.
        """

    def page_scores(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Tensor:
        """Scores of pages; a page's score from a per-token scorer is that of its best token."""
        scores = self.scores(q, cache, batch)
        if not self.per_token:
            return scores
        position = torch.arange(scores.shape[2], device=scores.device)
        past = position >= batch.context_lens[:, None, None]
        return scores.masked_fill(past, _least(scores.dtype)).unflatten(2, (-1, batch.page_size)).amax(-1)

    def bytes_scored(self, context_lens: list[int]) -> int:
        """Bytes that `scores` reads for decode rows of these contexts, over this rank's KV heads."""
        return 0


@dataclass(frozen=True, kw_only=True)
class TopKConfig(SparseConfig):
    """`token_budget` tokens per KV head and step, sink and recent tokens included.

    The budget is rounded up to whole pages, also for methods that choose single tokens: a budget of 33 reads 48 tokens with
    pages of 16. Likewise `sink_pages` and `recent_pages` force whole pages' worth of tokens.
    """

    method: ClassVar[str]
    per_token: ClassVar[bool] = False
    """Equal to `per_token` of the method's scorer."""
    token_budget: int = 2048

    def check(self, page_size: int) -> None:
        self.check_budget(self.token_budget, page_size)

    def attended_tokens(self, context_len: int, page_size: int) -> int:
        in_pages = tokens_in_budget(self, self.token_budget, context_len, page_size)
        if not self.per_token or in_pages == context_len:
            return in_pages
        return -(-self.token_budget // page_size) * page_size


class TopKPolicy(Policy):
    """Attends to the best pages or tokens by a scorer's scores, up to the budget. Subclasses name the scorer."""

    config: TopKConfig
    scorer_class: ClassVar[type[Scorer]]

    def __init__(self, config: SparseConfig, geometry: Geometry) -> None:
        super().__init__(config, geometry)
        self.scorer = self.scorer_class.from_config(config, geometry)
        self.metadata = self.scorer.metadata
        self.graph_safe = self.scorer.graph_safe

    def select(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Selection:
        config = self.config
        if all_rows_dense(config, config.token_budget, batch):
            return dense_selection(batch, self.geometry.num_kv_heads)
        with self.timer("score"):
            scores = self.scorer.scores(q, cache, batch)
        k, capacity = page_budget(config, config.token_budget, batch)
        with self.timer("top_k"):
            if self.scorer.per_token:
                return self._best_tokens(scores, k, capacity, batch)
            return Selection(*best_pages(scores, batch, k, config, capacity))

    def _best_tokens(self, scores: Tensor, k: Tensor, capacity: int, batch: DecodeBatch) -> Selection:
        """The best tokens, as many as fill k pages."""
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
        return self.scorer.bytes_scored(context_lens)


def _least(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).min if dtype.is_floating_point else torch.iinfo(dtype).min


def best_pages(scores: Tensor, batch: DecodeBatch, k: Tensor, config: SparseConfig, capacity: int) -> tuple[Tensor, Tensor]:
    """The k best pages of every row, the config's sink and recent pages included. Returns what `top_k_pages` returns."""
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
    """`top_k_pages` by logical index of pages or tokens: int32 [B, H_kv, capacity] ascending, counts int32 [B, H_kv]."""
    rows, width = scores.shape[0], scores.shape[2]
    own = batch.cached_per_step(("logical", width), lambda: torch.arange(width, dtype=torch.int32, device=scores.device))
    identity = own.expand(rows, -1)
    return top_k_pages(scores, identity, counts, k, sink_pages=sinks, recent_pages=recent, capacity=capacity)
