"""page_scores on torch: metadata is gathered tile by tile into a buffer that stays in cache, then multiplied there."""

from __future__ import annotations

import torch
from torch import Tensor

_TILE_PAGES = 64
"""Pages per matrix product. The shape of every product is the same, whatever the row's length or the batch, and a short
last tile is filled up with left-overs: so are the bits of a page's score."""


_TILES_AT_ONCE = 8
"""Tiles gathered together: fewer calls; they still fit into the processor's cache."""


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

    metadata = page_min_max.flatten(1)  # [num_pages_total, H_kv * 2 * d]
    width = page_table.shape[1]
    scores = torch.full((batch, heads, width), float("-inf"), dtype=torch.float32, device=q.device)
    gathered = torch.zeros(_TILES_AT_ONCE * _TILE_PAGES, metadata.shape[1], dtype=metadata.dtype, device=q.device)
    wide_gathered = gathered if metadata.dtype == torch.float32 else torch.empty_like(gathered, dtype=torch.float32)
    tiles = wide_gathered.view(_TILES_AT_ONCE, _TILE_PAGES, heads, 2 * dim).permute(0, 2, 3, 1)  # [tiles, H_kv, 2 d, TILE]
    products = torch.empty(_TILES_AT_ONCE, heads, group, _TILE_PAGES, dtype=torch.float32, device=q.device)
    for b, length in enumerate(num_pages.tolist()):
        for start in range(0, length, len(gathered)):
            end = min(start + len(gathered), length)
            torch.index_select(metadata, 0, page_table[b, start:end], out=gathered[: end - start])
            if wide_gathered is not gathered:
                wide_gathered.copy_(gathered)
            for i in range(-(-(end - start) // _TILE_PAGES)):
                torch.bmm(split[b], tiles[i], out=products[i])
            reduced = products.amax(dim=2) if group_reduction == "max" else products.sum(dim=2)  # [tiles, H_kv, TILE]
            scores[b, :, start:end] = reduced.transpose(0, 1).flatten(1)[:, : end - start]
    return scores
