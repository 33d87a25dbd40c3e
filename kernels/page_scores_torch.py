"""page_scores on torch: metadata is gathered tile by tile into a buffer that stays in cache, then multiplied there."""

from __future__ import annotations

import torch
from torch import Tensor

_TILE_PAGES = 64
"""Pages per matrix product. The shape of every product is the same, whatever the row's length or the batch, and a short
last tile is filled up with the null page: so are the bits of a page's score."""


_TILES_AT_ONCE = 8
"""Tiles gathered, and multiplied by one call, together: every call has to wake the other threads up. They still fit into
the processor's cache."""


def page_scores_torch(
    q: Tensor, page_min_max: Tensor, page_table: Tensor, num_pages: Tensor, group_reduction: str = "max"
) -> Tensor:
    """See `distributed_sparse.kernels.page_scores.page_scores`."""
    batch, num_q_heads, dim = q.shape
    heads = page_min_max.shape[1]
    group = num_q_heads // heads
    wide = q.float().view(batch, heads, group, dim)
    # [min(q, 0), relu(q)] . [m, M] is min(q, 0).m + relu(q).M: one product, as a page stores m and M side by side.
    split = torch.cat([wide.clamp(max=0), wide.clamp(min=0)], dim=-1)  # [B, H_kv, G, 2 d]

    metadata = page_min_max.view(-1, 2 * dim)  # [num_pages_total * H_kv, 2 d]
    scores = torch.full((batch, heads, page_table.shape[1]), float("-inf"), dtype=torch.float32, device=q.device)
    most = min(-(-page_table.shape[1] // _TILE_PAGES), _TILES_AT_ONCE) * heads  # products of one call: one per (tile, KV head)
    gathered = torch.empty(most * _TILE_PAGES, 2 * dim, dtype=metadata.dtype, device=q.device)
    wide_gathered = gathered if metadata.dtype == torch.float32 else torch.empty_like(gathered, dtype=torch.float32)
    products = torch.empty(most, group, _TILE_PAGES, dtype=torch.float32, device=q.device)
    head = torch.arange(heads, dtype=torch.int32, device=q.device)[:, None]
    for b, length in enumerate(num_pages.tolist()):
        queries = split[b].repeat(most // heads, 1, 1)  # [most, G, 2 d]
        tiles = torch.zeros(-(-length // _TILE_PAGES) * _TILE_PAGES, dtype=torch.int32, device=q.device)
        tiles[:length] = page_table[b, :length]
        index = (tiles.view(-1, 1, _TILE_PAGES) * heads + head).flatten(1)  # [tiles, H_kv * TILE]
        for first, some in enumerate(index.split(_TILES_AT_ONCE)):
            start, end = first * _TILES_AT_ONCE * _TILE_PAGES, min((first + 1) * _TILES_AT_ONCE * _TILE_PAGES, length)
            used = len(some) * heads
            torch.index_select(metadata, 0, some.flatten(), out=gathered[: used * _TILE_PAGES])
            if wide_gathered is not gathered:
                wide_gathered[: used * _TILE_PAGES].copy_(gathered[: used * _TILE_PAGES])
            keys = wide_gathered[: used * _TILE_PAGES].view(used, _TILE_PAGES, 2 * dim)
            torch.bmm(queries[:used], keys.mT, out=products[:used])
            reduced = products[:used].amax(1) if group_reduction == "max" else products[:used].sum(1)
            by_head = reduced.view(len(some), heads, _TILE_PAGES).transpose(0, 1).flatten(1)  # [H_kv, pages]
            scores[b, :, start:end] = by_head[:, : end - start]
    return scores
