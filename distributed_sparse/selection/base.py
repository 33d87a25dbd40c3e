"""The contract between the shard and a method: `SparseConfig` says what the user set, `Policy` answers with a `Selection`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor


@dataclass
class Selection:
    """What each (sequence, kv head) row attends to. Entries past the counts are undefined. `pages` and `tokens` are disjoint.

    pages:      int32 [B, H_kv, P_max]  physical page ids in logical order; the last entry is the newest, possibly partial page
    num_pages:  int32 [B, H_kv]
    tokens:     int32 [B, H_kv, T_max] | None   physical token slots (page * page_size + offset), ascending
    num_tokens: int32 [B, H_kv] | None
    log_weight: float32 [B, H_kv] | None        added to the logits of `tokens` (0 for Twilight; log 1/inclusion probability)
    partial:    (out float32 [B, H_q, d], lse float32 [B, H_q]) | None   already attended by the policy; merged in combine
    is_dense:   the host knows that every row is the identity page list, so nothing needs counting on the device
    """

    pages: Tensor
    num_pages: Tensor
    tokens: Tensor | None = None
    num_tokens: Tensor | None = None
    log_weight: Tensor | None = None
    partial: tuple[Tensor, Tensor] | None = None
    is_dense: bool = False

    def attended(self, last_page_len: Tensor, page_size: int) -> Tensor:
        """Tokens that each row reads: int32 [B, H_kv] (without what a `partial` has read)."""
        in_pages = self.num_pages * page_size - (page_size - last_page_len)[:, None] * (self.num_pages > 0)
        return in_pages if self.num_tokens is None else in_pages + self.num_tokens


@dataclass(frozen=True)
class DecodeBatch:
    """The decode rows of one step, as a policy sees them: one query token per sequence, already appended to the cache.

    page_table:      int32 [B, P] physical page ids in logical order; entries past the count are undefined
    num_pages:       int32 [B]    pages in use, the newest included
    context_lens:    int32 [B]    tokens in the cache, the query's own included
    last_page_len:   int32 [B]    tokens in the newest page, 1..page_size
    max_context_len: the longest context, known on the host
    """

    page_table: Tensor
    num_pages: Tensor
    context_lens: Tensor
    last_page_len: Tensor
    max_context_len: int
    page_size: int


@dataclass(frozen=True)
class Geometry:
    """The shape of one rank's attention."""

    num_kv_heads: int
    group_size: int
    head_dim: int
    page_size: int
    dtype: torch.dtype
    device: torch.device
    first_kv_head: int
    """Global index of this rank's first KV head: random numbers are keyed by the global head."""

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)


class Metadata(ABC):
    """Something that the cache keeps per page beside K and V, for the methods that ask for it. Never instantiated."""

    @staticmethod
    @abstractmethod
    def bytes_per_page(geometry: Geometry) -> int:
        """Bytes of one page in one layer of one rank."""

    @staticmethod
    @abstractmethod
    def allocate(num_pages: int, geometry: Geometry) -> Tensor:
        """The tensor of one layer, [num_pages, ...]."""


class PageMinMax(Metadata):
    """Channel-wise min and max of the page's keys: [num_pages, H_kv, 2, d] in the cache's dtype, so exact (Quest)."""

    @staticmethod
    def bytes_per_page(geometry: Geometry) -> int:
        return geometry.num_kv_heads * 2 * geometry.head_dim * geometry.dtype.itemsize

    @staticmethod
    def allocate(num_pages: int, geometry: Geometry) -> Tensor:
        shape = (num_pages, geometry.num_kv_heads, 2, geometry.head_dim)
        return torch.zeros(shape, dtype=geometry.dtype, device=geometry.device)


@dataclass
class LayerCache:
    """One layer's cache on one rank: K and V [num_pages, H_kv, page_size, d] and the metadata that its method asked for."""

    k_pages: Tensor
    v_pages: Tensor
    metadata: dict[type[Metadata], Tensor] = field(default_factory=dict)

    @property
    def page_min_max(self) -> Tensor | None:
        return self.metadata.get(PageMinMax)


@dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """Settings common to every method; `layers` overrides any of a method's settings for a range of layers."""

    method: ClassVar[str]
    dense_layers: int = 2
    min_context: int = 0
    sink_pages: int = 1
    recent_pages: int = 1
    layers: tuple[dict, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("dense_layers", 0), ("min_context", 0), ("sink_pages", 0), ("recent_pages", 1)):
            value = getattr(self, name)
            if value < least:
                why = ": the page being written is always attended" if name == "recent_pages" else ""
                raise ValueError(f"sparse.{name}={value} is below {least}{why}; set it to {least} or more")

    def check(self, page_size: int) -> None:
        """Raise ValueError where the settings cannot hold at this page size."""

    def check_budget(self, token_budget: int, page_size: int) -> None:
        """Raise ValueError where a budget of tokens does not cover the forced pages."""
        forced = self.sink_pages + self.recent_pages
        if -(-token_budget // page_size) < forced:
            raise ValueError(
                f"sparse.token_budget={token_budget} is below the {forced} forced pages of {page_size} tokens "
                f"(sink_pages={self.sink_pages}, recent_pages={self.recent_pages}); set it to {forced * page_size} or more"
            )


class Policy(ABC):
    """A sparse method on one rank. Made once per distinct config, called in each decode step for each layer that has it."""

    config_class: ClassVar[type[SparseConfig]]
    metadata: ClassVar[tuple[type[Metadata], ...]] = ()
    """What the cache must keep beside K and V for this method."""
    graph_safe: ClassVar[bool] = True
    """False for a method that reads device values on the host: it turns CUDA graphs off."""

    def __init__(self, config: SparseConfig, geometry: Geometry) -> None:
        self.config = config
        self.geometry = geometry

    @abstractmethod
    def select(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Selection:
        """Choose what every row of the batch reads. Stays on the device: no `.item()`, widths are static.

        Args:
            q: [B, H_q, d] post-RoPE queries of this rank's heads.
            cache: this layer's pages and metadata, the step's own token included.
            batch: the rows.
        """

    def bytes_scored(self, num_pages: int) -> int:
        """Bytes of metadata that `select` reads for rows of so many pages in all, over this rank's KV heads."""
        return 0


def dense_selection(batch: DecodeBatch, num_kv_heads: int) -> Selection:
    """The identity: every row reads its whole page table. No copy: the table is expanded over the heads (stride 0)."""
    pages = batch.page_table[:, None, :].expand(-1, num_kv_heads, -1)
    return Selection(pages, batch.num_pages[:, None].expand(-1, num_kv_heads), is_dense=True)


def page_budget(config: SparseConfig, token_budget: int, batch: DecodeBatch) -> tuple[Tensor, int]:
    """Pages that each sequence may keep, and the width that holds every row's list.

    A sequence shorter than `min_context` keeps all its pages.

    Returns:
        int32 [B], and the static capacity.
    """
    budget = -(-token_budget // batch.page_size)
    capacity = max(budget, -(-(config.min_context - 1) // batch.page_size))
    k = torch.full_like(batch.num_pages, budget)
    if config.min_context > 0:
        k = torch.where(batch.context_lens < config.min_context, batch.num_pages, k)
    return k, min(capacity, batch.page_table.shape[1])


def covers(config: SparseConfig, token_budget: int, batch: DecodeBatch) -> bool:
    """Whether the host knows that every row of the batch reads its whole context."""
    pages = -(-batch.max_context_len // batch.page_size)
    return pages <= -(-token_budget // batch.page_size) or batch.max_context_len < config.min_context
