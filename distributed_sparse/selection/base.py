"""base: the contract of a sparse method. `sparse.method` takes a method of this package or "package.module:Policy".

A method is a `Policy`, whose `select` returns a `Selection` for each layer. A method that ranks pages or tokens by score only
implements a `Scorer` (`selection/top_k.py`). A `Metadata` (`cache.py`) is what a method stores per page beside K and V.

Rules for every method:

- Padding: CUDA graphs pad a batch. A padded decode row has `context_lens` and `num_pages` 0; its q is any bits, NaN included.
- Counts: entries of `page_table` past a sequence's `num_pages` are any bits, as are entries of a `Selection`'s lists past their
  counts. A kernel never reads them, or clamps them before it uses them as an index.
- Batch invariance: what a (sequence, KV head) row selects depends on that row alone, in every bit: not on the batch, its
  order, the ids of its pages, or the number of ranks.
- Order: `pages` ascend in logical order and end with the newest page, which may be partial. `tokens` may be in any order that
  depends on the row alone; attention adds them up in this order.
- Random numbers: Philox (`kernels/philox.py`) with key `random_key[0:2]` and counter (i, `random_key[2]`, `random_key[3]`,
  use | `cache.layer` << 8 | global KV head << 20), where the global KV head is `geometry.first_kv_head` + the local one. The
  lowest 4 bits of the last word are the use: choose one that `philox.py` does not list. No torch generator: a draw must repeat
  on any rank, in any batch, and after a recovery.
- Metadata: a pure function of the page's content. `Metadata.append` resets a page's metadata at a run with `offset == 0`, as
  pages are reused without clearing. In `AppendRuns`, `starts` ascend and no page is in two runs, except the null page 0.
"""

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
    """What each (sequence, KV head) row attends to. Entries past the counts are undefined. `pages` and `tokens` are disjoint.

    pages:      int32 [B, H_kv, P_max]  physical page ids in logical order; the last entry is the newest page, of which
                `last_page_len` tokens are read; all other pages are full
    num_pages:  int32 [B, H_kv]
    tokens:     int32 [B, H_kv, T_max] | None   physical token slots (page * page_size + offset), in any order that depends on
                the row alone and not on its page ids (Twilight: ascending positions; vAttention: as drawn)
    num_tokens: int32 [B, H_kv] | None
    log_weight: float32 [B, H_kv] | None        added to the logits of `tokens`: log(1 / inclusion probability); None: 0
    partial:    (out float32 [B, H_q, d], lse float32 [B, H_q]) | None   a result over other tokens that the policy has already
                attended; merged at the end. lse is -inf for a row without one
    partial_selection: the tokens that `partial` has attended, as a Selection (counts of 0 for a row without one)
    extra_tokens_read: int32 [B, H_kv] | None   tokens whose K and V the policy has read without attending them
    is_dense:   the host knows that every row lists its whole page table: nothing is counted on the device
    details:    the method's own numbers for a trace, name -> float32 [B, H_kv] or [B, H_q]; filled if `batch.trace`
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
        """Tokens that each row attends, those of its `partial` included: int32 [B, H_kv]."""
        read = self.num_pages * page_size - (page_size - last_page_len)[:, None] * (self.num_pages > 0)
        if self.num_tokens is not None:
            read = read + self.num_tokens
        return read if self.partial_selection is None else read + self.partial_selection.attended(last_page_len, page_size)


@dataclass(frozen=True)
class DecodeBatch:
    """The decode rows of one step, as a policy sees them: one query token per sequence, already appended to the cache.

    page_table:      int32 [B, P] physical page ids in logical order; entries past the count are any bits
    num_pages:       int32 [B]    pages in use, the newest included; 0 for a padded row
    context_lens:    int32 [B]    tokens in the cache, the query's own included; 0 for a padded row
    last_page_len:   int32 [B]    tokens in the newest page, 1..page_size
    random_key:      int64 [4, B] key of a sequence's random numbers: low and high 32 bits of the request's seed, sample index
                     (0 at prompt positions), position of the query; add layer and global KV head as in the module's docstring
    max_context_len: the longest context, known on the host; in a captured step, the longest context of any replay
    trace:           whether `Selection.details` is used
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
        """Compute a value that depends on the batch alone once per step; later layers get the first layer's.

        `name` must include every setting that the value depends on, as `layers` may override it.
        """
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def once(self, name: Hashable, make: Callable[[], Made]) -> Made:
        """Deprecated name of `cached_per_step`; removed in the next version."""
        warnings.warn("DecodeBatch.once is now DecodeBatch.cached_per_step", FutureWarning, stacklevel=2)
        return self.cached_per_step(name, make)


@dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """Settings common to every method. `layers` overrides any of a method's settings for a range of layers.

    A subclass adds the method's settings. The methods below predict what a method reads from the context length alone; page
    eviction, the shapes of CUDA graphs and the cost planner use them.
    """

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
        """Raise ValueError if the settings do not work with this page size."""

    def evict_window(self, page_size: int) -> tuple[int, int] | None:
        """(sink, recent) pages that decode reads, if no layer reads others: the rest are freed. None: all are kept."""
        return None

    def attended_tokens(self, context_len: int, page_size: int) -> int | None:
        """Tokens that each (sequence, KV head) row of a context attends in decode; None: it depends on the data, or is unknown.

        Return `context_len` only if the row is certain to be dense and `select` scores nothing for it.
        """
        return None

    def most_attended_tokens(self, context_len: int, page_size: int) -> int:
        """Upper bound of the tokens that a row of a context attends, for any data."""
        exact = self.attended_tokens(context_len, page_size)
        return exact if exact is not None else context_len

    def extra_tokens(self, context_len: int, page_size: int) -> int:
        """Tokens whose K and V a sparse row of a context reads in addition to those that it attends."""
        return 0

    def check_budget(self, token_budget: int, page_size: int) -> None:
        """Raise ValueError if a budget of tokens does not cover the forced pages."""
        forced = self.sink_pages + self.recent_pages
        if -(-token_budget // page_size) < forced:
            raise ValueError(
                f"sparse.token_budget={token_budget} is below the {forced} forced pages of {page_size} tokens "
                f"(sink_pages={self.sink_pages}, recent_pages={self.recent_pages}); set it to {forced * page_size} or more"
            )


def named_class(key: str, name: str, known: Mapping[str, type[Any]], base: type[Any]) -> type[Any]:
    """The class that a setting names: one of `known`, or the import path "package.module:Class".

    Raises:
        ValueError: there is no such class, it cannot be imported on this node, or it is not a subclass of `base`.
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
    """A sparse method on one rank: one object per distinct config, called in each decode step for each layer with that config.

    A method sets `config_class`, `metadata` and `graph_safe`, implements `select`, and `bytes_scored` if it scores anything.
    """

    config_class: ClassVar[type[SparseConfig]]
    metadata: tuple[Metadata, ...] = ()
    """What the cache stores per page beside K and V for this method. Set it in `__init__` if it depends on the config."""
    graph_safe: bool = False
    """True if `select` may be captured in a CUDA graph and replayed. Such a `select` works on the device only, from the batch's
    tensors: it reads no device value on the host, uploads nothing, counts nothing in Python, and uses `batch.max_context_len`
    only for widths, as that is the longest context of any replay. It accepts padded rows: `context_lens` and `num_pages` 0, q
    any bits. If any layer's policy is not graph-safe, CUDA graphs are off."""

    def __init__(self, config: SparseConfig, geometry: Geometry) -> None:
        self.config = config
        self.geometry = geometry
        self.timer = Timer(geometry.device)
        """Times parts of `select` in profile steps: `with self.timer("score")`. `SparseAttention` sets its own timer here."""

    @abstractmethod
    def select(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Selection:
        """Choose what every (sequence, KV head) row of the batch attends to.

        Should not synchronise with the device (no `.item()`), and must not if `graph_safe`; widths come from the host.

        Args:
            q: [B, H_q, d] post-RoPE queries of this rank's heads; any bits for padded rows.
            cache: this layer's pages and metadata, the step's own token included.
            batch: the decode rows.
        """

    def bytes_scored(self, context_lens: list[int], max_context_len: int | None = None) -> int:
        """Bytes of metadata, or of keys without values, that `select` reads for decode rows of these contexts, over this rank's
        KV heads. (K and V that it reads without attending them: `Selection.extra_tokens_read`.)

        Args:
            context_lens: one per decode row.
            max_context_len: `DecodeBatch.max_context_len`, which in a captured step exceeds all of them; None: the longest.
        """
        return 0


def attend_selection(q: Tensor, cache: LayerCache, batch: DecodeBatch, selection: Selection, scale: float) -> Tensor:
    """Attention over a selection: [B, H_q, d] in q's dtype."""
    return attend(q, *_lists(cache, batch, selection), scale, **_weights(selection), return_lse=False)


def attend_partially(
    q: Tensor, cache: LayerCache, batch: DecodeBatch, selection: Selection, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over a selection, as the `partial` of another one: out float32 [B, H_q, d], log-sum-exp float32 [B, H_q]."""
    return attend(q, *_lists(cache, batch, selection), scale, **_weights(selection), return_lse=True)


def _lists(cache: LayerCache, batch: DecodeBatch, selection: Selection) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return cache.k_pages, cache.v_pages, selection.pages, selection.num_pages, batch.last_page_len


def _weights(selection: Selection) -> dict[str, Any]:
    return {name: getattr(selection, name) for name in ("tokens", "num_tokens", "log_weight", "partial")}


def dense_selection(batch: DecodeBatch, num_kv_heads: int) -> Selection:
    """Every row attends its whole page table. No copy: the table is expanded over the heads (stride 0)."""
    pages = batch.page_table[:, None, :].expand(-1, num_kv_heads, -1)
    return Selection(pages, batch.num_pages[:, None].expand(-1, num_kv_heads), is_dense=True)


def page_budget(config: SparseConfig, token_budget: int, batch: DecodeBatch) -> tuple[Tensor, int]:
    """Pages that each sequence may select, and a width that holds every row's list.

    A sequence shorter than `min_context` keeps all its pages.

    Returns:
        int32 [B] pages, and the width, which depends on host values only.
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
    """Whether the host knows that every row of the batch attends its whole context."""
    pages = -(-batch.max_context_len // batch.page_size)
    return pages <= -(-token_budget // batch.page_size) or batch.max_context_len < config.min_context


def tokens_in_budget(config: SparseConfig, token_budget: int, context_len: int, page_size: int) -> int:
    """Tokens of a context that `page_budget` keeps: full pages, and the newest page, always kept, which may be partial."""
    budget, pages = -(-token_budget // page_size), -(-context_len // page_size)
    if pages <= budget or context_len < config.min_context:
        return context_len
    return context_len - (pages - budget) * page_size


def slots_of(positions: Tensor, batch: DecodeBatch) -> Tensor:
    """Physical token slots of logical positions, both int32 [B, H_kv, T]; positions past a row's count may be any bits."""
    size, width = batch.page_size, batch.page_table.shape[1]
    positions = positions.clamp(0, width * size - 1)
    table = batch.page_table[:, None].expand(-1, positions.shape[1], -1)
    return table.gather(2, (positions // size).long()) * size + positions % size


def token_selection(batch: DecodeBatch, tokens: Tensor, num_tokens: Tensor, min_context: int = 0) -> Selection:
    """A selection of tokens. A row that lists its whole context attends its page table instead, bit for bit as if dense.

    Args:
        tokens, num_tokens: as in `Selection`.
        min_context: rows of shorter contexts are dense, whatever they list.
    """
    num_pages, num_tokens = whole_rows(num_tokens, batch.num_pages, batch.context_lens, min_context)
    return Selection(dense_selection(batch, num_tokens.shape[1]).pages, num_pages, tokens, num_tokens)
