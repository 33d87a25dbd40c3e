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
    longest = int(counts.max()) if counts.numel() else 0
    if longest == 0:
        return
    if int(counts.min()) == 0:
        pages, starts, offsets, counts = (x[counts > 0] for x in (pages, starts, offsets, counts))
    k = k + 0.0  # -0.0 becomes +0.0

    step = torch.arange(longest, device=k.device)
    token = starts[:, None] + step  # [T, longest]
    within = step < counts[:, None]
    slot = offsets[:, None] + step
    run_of_token = within.nonzero()[:, 0]
    page, slot, source = pages[run_of_token], slot[within], token[within]
    k_pages[page, :, slot] = k[source]
    v_pages[page, :, slot] = v[source]
    if page_min_max is None:
        return

    # A short run repeats its last token up to the longest, which changes neither min nor max.
    token = torch.minimum(token, (starts + counts - 1)[:, None])
    by_run = k[token]  # [T, longest, H_kv, d]
    low, high = by_run.amin(dim=1), by_run.amax(dim=1)
    first = (offsets == 0)[:, None, None]
    old = page_min_max[pages]  # [T, H_kv, 2, d]
    low = torch.where(first, low, torch.minimum(old[:, :, 0], low))
    high = torch.where(first, high, torch.maximum(old[:, :, 1], high))
    page_min_max[pages] = torch.stack([low, high], dim=2)
