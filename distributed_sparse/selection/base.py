"""The contract between the shard and a method: `SparseConfig` says what the user set, `Policy` answers with a `Selection`."""

from __future__ import annotations

import importlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import InitVar, dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from distributed_sparse.cache import Geometry, LayerCache, Metadata
from distributed_sparse.kernels.attend.attend import attend
from distributed_sparse.kernels.cache.whole_rows import whole_rows
from distributed_sparse.utils.timer import Timer
from distributed_sparse.utils.validation import check_choice

Made = TypeVar("Made")


@dataclass
class Selection:
    """What each (sequence, kv head) row attends to. Entries past the counts are undefined. `pages` and `tokens` are disjoint.

    pages:      int32 [B, H_kv, P_max]  physical page ids in logical order; the last entry is the newest, possibly partial page
    num_pages:  int32 [B, H_kv]
    tokens:     int32 [B, H_kv, T_max] | None   physical token slots (page * page_size + offset), in an order that depends on
                the row alone, not on where its pages lie (Twilight: ascending positions; a sample: as drawn)
    num_tokens: int32 [B, H_kv] | None
    log_weight: float32 [B, H_kv] | None        added to the logits of `tokens`: log 1/inclusion probability; None: 0
    partial:    (out float32 [B, H_q, d], lse float32 [B, H_q]) | None   already attended by the policy; merged in combine
    partial_selection: what `partial` has read, as a Selection of its own (counts of 0 where the row has none)
    extra_tokens_read: int32 [B, H_kv] | None          tokens whose K and V the policy has read and that no list here holds
    is_dense:   the host knows that every row is the identity page list, so nothing needs counting on the device
    details:    the method's own numbers for a trace, name -> float32 [B, H_kv] or [B, H_q]; filled where `batch.trace`
    """

    pages: Tensor
    num_pages: Tensor
    tokens: Tensor | None = None
    num_tokens: Tensor | None = None
    log_weight: Tensor | None = None
    partial: tuple[Tensor, Tensor] | None = None
    partial_selection: Selection | None = None
    extra_tokens_read: Tensor | None = None
    is_dense: bool = False
    details: dict[str, Tensor] = field(default_factory=dict)
    partial_of: InitVar[Selection | None] = None
    read_apart: InitVar[Tensor | None] = None

    def __post_init__(self, partial_of: Selection | None, read_apart: Tensor | None) -> None:
        if partial_of is not None or read_apart is not None:
            warnings.warn("partial_of is now partial_selection, read_apart is extra_tokens_read", FutureWarning, stacklevel=3)
            self.partial_selection, self.extra_tokens_read = partial_of, read_apart

    def attended(self, last_page_len: Tensor, page_size: int) -> Tensor:
        """Tokens that each row reads, those of its `partial` included: int32 [B, H_kv]."""
        read = self.num_pages * page_size - (page_size - last_page_len)[:, None] * (self.num_pages > 0)
        if self.num_tokens is not None:
            read = read + self.num_tokens
        return read if self.partial_selection is None else read + self.partial_selection.attended(last_page_len, page_size)


@dataclass(frozen=True)
class DecodeBatch:
    """The decode rows of one step, as a policy sees them: one query token per sequence, already appended to the cache.

    page_table:      int32 [B, P] physical page ids in logical order; entries past the count are undefined
    num_pages:       int32 [B]    pages in use, the newest included
    context_lens:    int32 [B]    tokens in the cache, the query's own included
    last_page_len:   int32 [B]    tokens in the newest page, 1..page_size
    random_key:      int64 [4, B] what a row's random numbers depend on, beside the layer and the global KV head: low and high
                     32 bits of the request's seed, sample index, position of the query
    max_context_len: the longest context, known on the host
    trace:           whether somebody wants `Selection.details`
    """

    page_table: Tensor
    num_pages: Tensor
    context_lens: Tensor
    last_page_len: Tensor
    random_key: Tensor
    max_context_len: int
    page_size: int
    trace: bool = False
    _made: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def cached_per_step(self, name: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` gives, made by the first layer that asks for `name`: for what depends on the batch alone.

        `name` must tell apart whatever else it depends on (settings that `layers` may override).
        """
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def once(self, name: Hashable, make: Callable[[], Made]) -> Made:
        """Old name of `cached_per_step`; gone in the next version."""
        warnings.warn("DecodeBatch.once is now DecodeBatch.cached_per_step", FutureWarning, stacklevel=2)
        return self.cached_per_step(name, make)


@dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """Settings common to every method; `layers` overrides any of a method's settings for a range of layers."""

    method: ClassVar[str]
    dense_layers: int = 2
    min_context: int = 0
    sink_pages: int = 1
    recent_pages: int = 2
    layers: tuple[dict, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("dense_layers", 0), ("min_context", 0), ("sink_pages", 0), ("recent_pages", 1)):
            value = getattr(self, name)
            if value < least:
                why = ": the page being written is always attended" if name == "recent_pages" else ""
                raise ValueError(f"sparse.{name}={value} is below {least}{why}; set it to {least} or more")

    def check(self, page_size: int) -> None:
        """Raise ValueError where the settings cannot hold at this page size."""

    def evict_window(self, page_size: int) -> tuple[int, int] | None:
        """(sink, recent) pages, where no layer reads others at decode and the rest may be freed; None: all are kept."""
        return None

    def attended_tokens(self, context_len: int, page_size: int) -> int | None:
        """Tokens that each row of such a context attends in decode; None: the data decides (or a method does not say).

        The whole context is answered only where the host knows that the row is dense, so that nothing is scored for it.
        """
        return None

    def most_attended_tokens(self, context_len: int, page_size: int) -> int:
        """Tokens that a row of such a context attends at most, whatever the data."""
        exact = self.attended_tokens(context_len, page_size)
        return exact if exact is not None else context_len

    def extra_tokens(self, context_len: int, page_size: int) -> int:
        """Tokens whose K and V a sparse row of such a context reads beside those that it attends."""
        return 0

    def check_budget(self, token_budget: int, page_size: int) -> None:
        """Raise ValueError where a budget of tokens does not cover the forced pages."""
        forced = self.sink_pages + self.recent_pages
        if -(-token_budget // page_size) < forced:
            raise ValueError(
                f"sparse.token_budget={token_budget} is below the {forced} forced pages of {page_size} tokens "
                f"(sink_pages={self.sink_pages}, recent_pages={self.recent_pages}); set it to {forced * page_size} or more"
            )


def named_class(key: str, name: str, known: Mapping[str, type[Any]], base: type[Any]) -> type[Any]:
    """The class that a setting names: one of `known`, or "package.module:Class" from outside.

    Raises:
        ValueError: there is no such class, it cannot be imported here, or it is no subclass of `base`.
    """
    if not isinstance(name, str) or ":" not in name:
        check_choice(key, name, list(known))
        return known[name]
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{key}={name!r} is not importable ({error}); put it on every node's PYTHONPATH") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{key}={name!r} is not a subclass of {base.__module__}.{base.__name__}")
    return found


class Policy(ABC):
    """A sparse method on one rank. Made once per distinct config, called in each decode step for each layer that has it."""

    config_class: ClassVar[type[SparseConfig]]
    metadata: tuple[Metadata, ...] = ()
    """What the cache must keep beside K and V for this method; may be set in `__init__`, where it depends on the config."""
    graph_safe: bool = False
    """True where `select` may be captured as a CUDA graph and replayed: all that it does, it does on the device, by the batch's
    tensors. It reads no device value on the host, uploads nothing, keeps no count in Python, and depends on
    `batch.max_context_len` for widths alone, since that is then the longest context of any replay. It bears rows that pad the
    batch: their `context_lens` and `num_pages` are 0 and their q any bits. One that is not turns CUDA graphs off."""

    def __init__(self, config: SparseConfig, geometry: Geometry) -> None:
        self.config = config
        self.geometry = geometry
        self.timer = Timer(geometry.device)
        """Where the parts of `select` may be timed: `with self.timer("score")`. Whoever runs the policy puts its own here."""

    @abstractmethod
    def select(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Selection:
        """Choose what every row of the batch reads. Stays on the device: no `.item()`, widths are static.

        Args:
            q: [B, H_q, d] post-RoPE queries of this rank's heads.
            cache: this layer's pages and metadata, the step's own token included.
            batch: the rows.
        """

    def bytes_scored(self, context_lens: list[int], max_context_len: int | None = None) -> int:
        """Bytes of metadata, and of keys alone, that `select` scores for rows of these contexts, over this rank's KV heads. (K
        and V that it reads without attending them: `Selection.extra_tokens_read`.)

        Args:
            context_lens: one per row.
            max_context_len: as of the `DecodeBatch` that they were in, longer than each of them where the step was captured;
                None: the longest of them.
        """
        return 0


def attend_selection(q: Tensor, cache: LayerCache, batch: DecodeBatch, selection: Selection, scale: float) -> Tensor:
    """Attention over what a selection lists: [B, H_q, d] in q's dtype."""
    return attend(q, *_lists(cache, batch, selection), scale, **_weights(selection), return_lse=False)


def attend_partially(
    q: Tensor, cache: LayerCache, batch: DecodeBatch, selection: Selection, scale: float
) -> tuple[Tensor, Tensor]:
    """The same as another selection's `partial`: out float32 [B, H_q, d], its log-sum-exp float32 [B, H_q]."""
    return attend(q, *_lists(cache, batch, selection), scale, **_weights(selection), return_lse=True)


def _lists(cache: LayerCache, batch: DecodeBatch, selection: Selection) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return cache.k_pages, cache.v_pages, selection.pages, selection.num_pages, batch.last_page_len


def _weights(selection: Selection) -> dict[str, Any]:
    return {name: getattr(selection, name) for name in ("tokens", "num_tokens", "log_weight", "partial")}


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

    def make() -> Tensor:
        k = torch.full_like(batch.num_pages, budget)
        if config.min_context > 0:
            k = torch.where(batch.context_lens < config.min_context, batch.num_pages, k)
        return k

    return batch.cached_per_step(("page_budget", budget, config.min_context), make), min(capacity, batch.page_table.shape[1])


def all_rows_dense(config: SparseConfig, token_budget: int, batch: DecodeBatch) -> bool:
    """Whether the host knows that every row of the batch reads its whole context."""
    pages = -(-batch.max_context_len // batch.page_size)
    return pages <= -(-token_budget // batch.page_size) or batch.max_context_len < config.min_context


def tokens_in_budget(config: SparseConfig, token_budget: int, context_len: int, page_size: int) -> int:
    """What `page_budget` leaves of a context, in tokens: whole pages but for the newest one, which is always kept."""
    budget, pages = -(-token_budget // page_size), -(-context_len // page_size)
    if pages <= budget or context_len < config.min_context:
        return context_len
    return context_len - (pages - budget) * page_size


def slots_of(positions: Tensor, batch: DecodeBatch) -> Tensor:
    """Physical token slots of logical positions, int32 [B, H_kv, T] both; positions past a row's count may be any bits."""
    size, width = batch.page_size, batch.page_table.shape[1]
    positions = positions.clamp(0, width * size - 1)
    table = batch.page_table[:, None].expand(-1, positions.shape[1], -1)
    return table.gather(2, (positions // size).long()) * size + positions % size


def token_selection(batch: DecodeBatch, tokens: Tensor, num_tokens: Tensor, min_context: int = 0) -> Selection:
    """A selection of tokens in which rows that list their whole context are the identity page list: bitwise dense.

    Args:
        tokens, num_tokens: as of `Selection`.
        min_context: rows of shorter contexts are dense, whatever they list.
    """
    num_pages, num_tokens = whole_rows(num_tokens, batch.num_pages, batch.context_lens, min_context)
    return Selection(dense_selection(batch, num_tokens.shape[1]).pages, num_pages, tokens, num_tokens)
