"""decode_rows: random queries over a random paged cache, as a policy sees them, and parts of them as a rank would."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distributed_sparse.kernels.attend import attend
from distributed_sparse.selection.base import DecodeBatch, Geometry, LayerCache, PageMinMax, Policy, Selection

ANY_BITS = 2**31 - 1
"""What stands in a page table past its count: an id that no cache has."""


@dataclass(frozen=True)
class DecodeRows:
    """One decode batch on one rank's heads. q [B, H_q, d]; keys of each sequence [H_kv, n, d], in logical order."""

    q: Tensor
    cache: LayerCache
    batch: DecodeBatch
    keys: list[Tensor]

    @property
    def geometry(self) -> Geometry:
        _, heads, page_size, dim = self.cache.k_pages.shape
        group = self.q.shape[1] // heads
        return Geometry(heads, group, dim, page_size, self.q.dtype, self.q.device, first_kv_head=0)

    def of_heads(self, first: int, last: int) -> DecodeRows:
        """KV heads first .. last - 1, as the rank that owns them holds them."""
        group = self.geometry.group_size
        bounds = self.cache.page_min_max
        assert bounds is not None
        cache = LayerCache(
            self.cache.k_pages[:, first:last].contiguous(),
            self.cache.v_pages[:, first:last].contiguous(),
            {PageMinMax: bounds[:, first:last].contiguous()},
        )
        q = self.q[:, first * group : last * group].contiguous()
        return DecodeRows(q, cache, self.batch, [key[first:last] for key in self.keys])

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
            max_context_len=int(batch.context_lens[rows].max()),
        )
        return DecodeRows(self.q[rows].contiguous(), self.cache, some, [self.keys[row] for row in rows])

    def select(self, policy: Policy) -> Selection:
        return policy.select(self.q, self.cache, self.batch)

    def attend(self, selection: Selection) -> Tensor:
        """[B, H_q, d]."""
        cache, batch = self.cache, self.batch
        pages, counts = selection.pages, selection.num_pages
        return attend(self.q, cache.k_pages, cache.v_pages, pages, counts, batch.last_page_len, self.geometry.scale)


def decode_rows(
    context_lens: list[int],
    *,
    kv_heads: int = 4,
    group: int = 2,
    head_dim: int = 64,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> DecodeRows:
    """Sequences whose pages lie scattered over a cache with some pages to spare, which hold NaN like every unused slot."""
    generator = torch.Generator().manual_seed(seed)
    num_pages = [-(-n // page_size) for n in context_lens]
    total = sum(num_pages) + 5
    order = (torch.randperm(total - 1, generator=generator) + 1).tolist()
    k_pages = torch.full((total, kv_heads, page_size, head_dim), float("nan"), dtype=dtype)
    v_pages = k_pages.clone()
    bounds = torch.full((total, kv_heads, 2, head_dim), float("nan"), dtype=dtype)
    table = torch.full((len(context_lens), max(num_pages)), ANY_BITS, dtype=torch.int32)
    keys = []
    for row, (n, count) in enumerate(zip(context_lens, num_pages)):
        own = [order.pop() for _ in range(count)]
        table[row, :count] = torch.tensor(own)
        key = torch.randn(kv_heads, n, head_dim, generator=generator).to(dtype)
        value = torch.randn(kv_heads, n, head_dim, generator=generator).to(dtype)
        keys.append(key)
        for logical, page in enumerate(own):
            some = slice(logical * page_size, min((logical + 1) * page_size, n))
            filled = some.stop - some.start
            k_pages[page, :, :filled], v_pages[page, :, :filled] = key[:, some], value[:, some]
            bounds[page] = torch.stack([key[:, some].amin(1), key[:, some].amax(1)], dim=1)
    lengths, pages = torch.tensor(context_lens, dtype=torch.int32), torch.tensor(num_pages, dtype=torch.int32)
    last_page_len = lengths - (pages - 1) * page_size
    batch = DecodeBatch(table, pages, lengths, last_page_len, max(context_lens), page_size)
    q = torch.randn(len(context_lens), kv_heads * group, head_dim, generator=generator).to(dtype)
    return DecodeRows(q, LayerCache(k_pages, v_pages, {PageMinMax: bounds}), batch, keys)


def listed(selection: Selection, row: int, head: int) -> list[int]:
    """The physical pages of one (sequence, KV head) row."""
    return selection.pages[row, head, : int(selection.num_pages[row, head])].tolist()


def lists(selection: Selection) -> list[list[list[int]]]:
    """[B][H_kv] lists of physical pages."""
    rows, heads = selection.num_pages.shape
    return [[listed(selection, row, head) for head in range(heads)] for row in range(rows)]
