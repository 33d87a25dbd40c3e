"""append on torch: one scatter for all tokens, one reduction per page."""

from __future__ import annotations

import torch
from torch import Tensor


def append_torch(
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    starts: Tensor,
    offsets: Tensor,
    counts: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_min_max: Tensor | None = None,
) -> None:
    """See `distributed_sparse.kernels.append.append`."""
    live = counts.nonzero()[:, 0]
    if len(live) == 0:
        return
    if len(live) < len(counts):
        pages, starts, offsets, counts = (x[live] for x in (pages, starts, offsets, counts))
    pages, starts, offsets, counts = (x.long() for x in (pages, starts, offsets, counts))
    k = k + 0.0  # -0.0 becomes +0.0

    step = torch.arange(int(counts.max()), device=k.device)
    run, i = (step < counts[:, None]).nonzero(as_tuple=True)  # of each token, run after run
    page, slot, token = pages[run], offsets[run] + i, starts[run] + i
    k_pages[page, :, slot] = k.index_select(0, token)
    v_pages[page, :, slot] = v.index_select(0, token)
    if page_min_max is None:
        return

    # A short run repeats its last token up to the longest, which changes neither min nor max.
    token = starts[:, None] + torch.minimum(step, counts[:, None] - 1)  # [T, longest]
    by_run = k.index_select(0, token.flatten()).view(*token.shape, *k.shape[1:])
    low, high = by_run.amin(dim=1), by_run.amax(dim=1)  # [T, H_kv, d]
    old_low, old_high = page_min_max.index_select(0, pages).unbind(dim=2)
    anew = (offsets == 0)[:, None, None]
    low = torch.where(anew, low, torch.minimum(old_low, low))
    high = torch.where(anew, high, torch.maximum(old_high, high))
    page_min_max[pages] = torch.stack([low, high], dim=2)
