"""page_scores in torch: gathers page metadata tile by tile, unless the pages are consecutive."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distributed_sparse.kernels.quest.page_scores import sums_over_group
from distributed_sparse.kernels.scratch import scratch

_TILE_PAGES = 512
"""Pages per matrix product: large enough to amortise waking the threads, small enough to stay in the CPU cache."""

_LAST_TILE_PAGES = (64, 128, 256, _TILE_PAGES)
"""A row's last tile is padded with the null page to the smallest of these sizes that holds it, so that the shapes of the
products, and the bits of the scores, depend on the row's length alone."""


def page_scores_torch(
    q: Tensor, page_min_max: Tensor, page_table: Tensor, num_pages: Tensor, group_reduction: str = "max"
) -> Tensor:
    """See `page_scores`."""
    reduce = torch.sum if sums_over_group(group_reduction) else torch.amax
    batch, num_q_heads, dim = q.shape
    heads = page_min_max.shape[1]
    group = num_q_heads // heads
    wide = q.float().view(batch, heads, group, dim)
    # [min(q, 0), relu(q)] . [m, M] is min(q, 0).m + relu(q).M: one product, as a page stores m and M side by side.
    split = torch.cat([wide.clamp(max=0), wide.clamp(min=0)], dim=-1)  # [B, H_kv, G, 2 d]

    metadata = page_min_max.view(len(page_min_max), -1)  # [num_pages_total, H_kv * 2 d]
    scores = torch.empty(batch, heads, page_table.shape[1])
    for b, length in enumerate(num_pages.tolist()):
        scores[b, :, length:] = float("-inf")
        for start in range(0, length, _TILE_PAGES):
            pages = page_table[b, start : min(start + _TILE_PAGES, length)]
            width = next(width for width in _LAST_TILE_PAGES if width >= len(pages))
            kept = _kept(metadata, pages, width).view(width, heads, 2 * dim).permute(1, 2, 0)  # [H_kv, 2 d, width]
            products = torch.bmm(split[b], kept, out=scratch("page_scores: products", (heads, group, width)))[..., : len(pages)]
            found = scores[b, :, start : start + len(pages)]
            reduce(products, 1, out=found)
    return scores


def _kept(metadata: Tensor, pages: Tensor, width: int) -> Tensor:
    """float32 [width, elements] metadata of the pages, padded with null pages, in scratch that stays in the CPU cache.

    Consecutive pages are read in place; the strides, and so the bits, are the same.
    """
    shape = (width, metadata.shape[1])
    if len(pages) == width and (np.diff(pages.numpy()) == 1).all():
        rows = metadata[(first := int(pages[0])) : first + width]
    else:
        padded = torch.zeros(width, dtype=torch.int32)
        padded[: len(pages)] = pages
        rows = torch.index_select(metadata, 0, padded, out=scratch("page_scores", shape, metadata.dtype))
    return rows if rows.dtype == torch.float32 else scratch("page_scores", shape).copy_(rows)
