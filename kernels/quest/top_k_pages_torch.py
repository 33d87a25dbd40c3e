"""top_k_pages in torch: per sequence, the k-th score is the threshold and a running count limits ties."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k_pages_torch(scores, page_table, num_pages, k, *, sink_pages, recent_pages, capacity):
    """See `top_k_pages`."""
    batch, heads, _ = scores.shape
    counts = torch.minimum(k, num_pages).to(torch.int32)
    pages = torch.empty(batch, heads, capacity, dtype=torch.int32, device=scores.device)
    for b, (n, kept) in enumerate(zip(num_pages.tolist(), counts.tolist())):
        # Forced pages: all pages if the row keeps everything; else the newest first, then the sinks, up to k.
        recent = n if kept == n else min(kept, recent_pages)
        sinks = min(kept - recent, sink_pages)
        chosen = kept - recent - sinks
        pages[b, :, :sinks] = page_table[b, :sinks]
        pages[b, :, kept - recent : kept] = page_table[b, n - recent : n]
        if chosen:
            best = _best(scores[b, :, sinks : n - recent], chosen)
            pages[b, :, sinks : sinks + chosen] = page_table[b, sinks:][best]
    return pages, counts[:, None].expand(-1, heads).contiguous()


def _best(scores: Tensor, k: int) -> Tensor:
    """Ascending indices int64 [H_kv, k] of the k largest of every row [H_kv, P]; ties: the lower index first."""
    if scores.dtype == torch.int32:
        threshold = _kth_count(scores, k)
    else:
        scores = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)  # a NaN affects only its own row
        threshold = scores.topk(k, dim=-1).values[:, -1:]
    chosen = scores >= threshold
    if int(chosen.count_nonzero()) > chosen.shape[0] * k:  # more ties with the k-th score than places left
        ties = scores == threshold
        room = k - (scores > threshold).sum(-1, keepdim=True)
        chosen &= ~ties | (ties.cumsum(-1, dtype=torch.int32) <= room)
    return chosen.nonzero()[:, 1].view(-1, k)


def _kth_count(scores: Tensor, k: int) -> Tensor:
    """The k-th largest int32 [H_kv, 1] of every row of small counts [H_kv, P], by a histogram instead of a sort."""
    distinct = int(scores.max()) + 1
    cells = scores + torch.arange(0, len(scores) * distinct, distinct, dtype=torch.int32)[:, None]
    histogram = cells.view(-1).bincount(minlength=len(scores) * distinct).view(-1, distinct)
    below = histogram.cumsum(-1)  # [H_kv, values] scores of at most each value
    # The result is the largest value for which at least k scores exceed value - 1, i.e. at most P - k do not.
    return (below <= scores.shape[1] - k).sum(-1, keepdim=True, dtype=torch.int32)
