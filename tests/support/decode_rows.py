"""decode_rows: random queries over a random paged cache, as a policy sees them, and parts of them as a rank would."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distributed_sparse.cache import AppendRuns, Geometry, LayerCache, Metadata, PageMinMax
from distributed_sparse.selection.base import DecodeBatch, Policy, Selection, SparseConfig, attend_selection

ANY_BITS = 2**31 - 1
"""What stands in a page table past its count: an id that no cache has."""


@dataclass(frozen=True)
class DecodeRows:
    """One decode batch on one rank's heads. q [B, H_q, d]; keys, values of each sequence [H_kv, n, d], in logical order."""

    q: Tensor
    cache: LayerCache
    batch: DecodeBatch
    keys: list[Tensor]
    values: list[Tensor]
    first_kv_head: int = 0

    @property
    def geometry(self) -> Geometry:
        _, heads, page_size, dim = self.cache.k_pages.shape
        group = self.q.shape[1] // heads
        return Geometry(heads, group, dim, page_size, self.q.dtype, self.q.device, self.first_kv_head)

    def of_heads(self, first: int, last: int) -> DecodeRows:
        """KV heads first .. last - 1, as the rank that owns them holds them."""
        group = self.geometry.group_size
        cache = LayerCache(
            self.cache.layer,
            self.cache.k_pages[:, first:last].contiguous(),
            self.cache.v_pages[:, first:last].contiguous(),
            self.cache.kinds,
            {name: kept[:, first:last].contiguous() for name, kept in self.cache.metadata.items()},
        )
        q = self.q[:, first * group : last * group].contiguous()
        keys, values = ([kept[first:last] for kept in of_heads] for of_heads in (self.keys, self.values))
        part = DecodeRows(q, cache, self.batch, keys, values, self.first_kv_head + first)
        for kind in cache.kinds:
            cache.constants |= kind.constants(cache.layer, part.geometry)
        return part

    def of_sequences(self, rows: list[int], spare_columns: int = 0) -> DecodeRows:
        """Some sequences in some order, in a page table that is no wider than they need, or wider."""
        batch, width = self.batch, int(self.batch.num_pages[rows].max())
        table = torch.full((len(rows), width + spare_columns), ANY_BITS, dtype=torch.int32)
        table[:, :width] = batch.page_table[rows, :width]
        some = replace(
            batch,
            page_table=table,
            num_pages=batch.num_pages[rows],
            context_lens=batch.context_lens[rows],
            last_page_len=batch.last_page_len[rows],
            random_key=batch.random_key[:, rows],
            max_context_len=int(batch.context_lens[rows].max()),
        )
        keys, values = ([kept[row] for row in rows] for kept in (self.keys, self.values))
        return DecodeRows(self.q[rows].contiguous(), self.cache, some, keys, values, self.first_kv_head)

    def with_batch(self, **changes: Any) -> DecodeRows:
        """The same rows with other fields of their `DecodeBatch`."""
        return replace(self, batch=replace(self.batch, **changes))

    def policy(self, kind: type[Policy], config: SparseConfig) -> Policy:
        """A method on the rank that holds these heads."""
        config.check(self.batch.page_size)
        return kind(config, self.geometry)

    def select(self, policy: Policy) -> Selection:
        return policy.select(self.q, self.cache, self.batch)

    def attend(self, selection: Selection) -> Tensor:
        """[B, H_q, d]."""
        return attend_selection(self.q, self.cache, self.batch, selection, self.geometry.scale)


def decode_rows(
    context_lens: list[int],
    *,
    kv_heads: int = 4,
    group: int = 2,
    head_dim: int = 64,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    kinds: tuple[Metadata, ...] = (PageMinMax(),),
    layer: int = 0,
    value_mean: float = 0.0,
) -> DecodeRows:
    """Sequences whose pages lie scattered over a cache with some pages to spare, which hold NaN like every unused slot.

    `kinds` are the metadata that the method under test asks for, written by the same append as the engine's.
    """
    generator = torch.Generator().manual_seed(seed)
    num_pages = [-(-n // page_size) for n in context_lens]
    total = sum(num_pages) + 5
    order = (torch.randperm(total - 1, generator=generator) + 1).tolist()
    geometry = Geometry(
        kv_heads, group, head_dim, page_size, dtype, torch.device("cpu"), first_kv_head=0, model_kv_heads=kv_heads
    )
    cache = LayerCache.allocate(layer, total, geometry, kinds)
    for pages in cache.pages:
        if pages.is_floating_point():
            pages.fill_(float("nan"))
    table = torch.full((len(context_lens), max(num_pages)), ANY_BITS, dtype=torch.int32)
    keys, values = [], []
    for row, (n, count) in enumerate(zip(context_lens, num_pages)):
        own = [order.pop() for _ in range(count)]
        table[row, :count] = torch.tensor(own)
        key = torch.randn(kv_heads, n, head_dim, generator=generator).to(dtype)
        value = (torch.randn(kv_heads, n, head_dim, generator=generator) + value_mean).to(dtype)
        keys.append(key)
        values.append(value)
        first = torch.arange(count, dtype=torch.int32) * page_size
        runs = AppendRuns(table[row, :count], first, torch.zeros_like(first), (n - first).clamp_max(page_size))
        cache.append(key.transpose(0, 1), value.transpose(0, 1), runs)
    lengths, pages = torch.tensor(context_lens, dtype=torch.int32), torch.tensor(num_pages, dtype=torch.int32)
    last_page_len = lengths - (pages - 1) * page_size
    rows = torch.arange(len(context_lens))
    batch = DecodeBatch(
        page_table=table,
        num_pages=pages,
        context_lens=lengths,
        last_page_len=last_page_len,
        random_key=torch.stack([rows * 7919 + seed, rows, rows % 2, lengths - 1]),
        max_context_len=max(context_lens),
        page_size=page_size,
    )
    q = torch.randn(len(context_lens), kv_heads * group, head_dim, generator=generator).to(dtype)
    return DecodeRows(q, cache, batch, keys, values)


def rows_for(kind: type[Policy], config: SparseConfig, context_lens: list[int], **shape: Any) -> DecodeRows:
    """`decode_rows` in a cache that keeps what a method asks for."""
    small = decode_rows([1], **shape, kinds=())
    return decode_rows(context_lens, **shape, kinds=small.policy(kind, config).metadata)


def positions_read(rows: DecodeRows, selection: Selection, row: int, head: int) -> list[int]:
    """What a row attends, as positions in the order of its lists: its pages, its tokens, then those of its partial."""
    size, n = rows.batch.page_size, int(rows.batch.context_lens[row])
    logical = {page: place for place, page in enumerate(rows.batch.page_table[row, : rows.batch.num_pages[row]].tolist())}
    pages = [logical[page] for page in listed(selection, row, head)]
    found = [i for page in pages for i in range(page * size, min((page + 1) * size, n))]
    if selection.tokens is not None and selection.num_tokens is not None:
        slots = selection.tokens[row, head, : int(selection.num_tokens[row, head])].tolist()
        found += [logical[slot // size] * size + slot % size for slot in slots]
    return (
        found if selection.partial_selection is None else found + positions_read(rows, selection.partial_selection, row, head)
    )


def listed(selection: Selection, row: int, head: int) -> list[int]:
    """The physical pages of one (sequence, KV head) row."""
    return selection.pages[row, head, : int(selection.num_pages[row, head])].tolist()


def lists(selection: Selection) -> list[list[list[int]]]:
    """[B][H_kv] lists of physical pages."""
    rows, heads = selection.num_pages.shape
    return [[listed(selection, row, head) for head in range(heads)] for row in range(rows)]
