"""top_p in torch: a histogram of the softmax mass finds the threshold's bin, and a sort of that bin finds the threshold."""

from __future__ import annotations

import torch
from torch import Tensor

from distributed_sparse.kernels.scratch import scratch

_BINS = 4096

_RANGE = 64.0
"""Bins cover this range below a row's maximum, or down to its minimum if that is nearer. Lower logits go to the last bin:
their mass, n e^-64, is lost in the rounding of a float64 sum over any n that fits into memory."""

_LARGEST = torch.finfo(torch.float32).max


def top_p_torch(logits, pages, num_pages, last_page_len, p, *, page_size, sink_pages, recent_pages):
    """See `top_p`."""
    batch, num_q_heads, width = logits.shape
    heads = num_pages.shape[1]
    tokens = torch.empty(batch, heads, width, dtype=torch.int32)
    num_tokens = torch.zeros(batch, heads, dtype=torch.int32)
    threshold = torch.full((batch, num_q_heads), float("inf"))
    lengths = ((num_pages - 1) * page_size + last_page_len[:, None]).masked_fill(num_pages == 0, 0)  # [B, H_kv]
    for b, longest in enumerate(lengths.amax(dim=1).tolist()):
        if longest == 0:
            continue
        length = lengths[b, :, None]
        position = torch.arange(longest, dtype=torch.int32)
        valid = position < length  # [H_kv, n]
        if p >= 1:
            threshold[b] = float("-inf")
            kept = valid.clone()
        else:
            # NaN becomes the lowest logit and affects only its own row; infinities become finite: no difference is NaN.
            row = logits[b, :, :longest].nan_to_num(nan=-_LARGEST, posinf=_LARGEST, neginf=-_LARGEST)
            of_head = row.view(heads, -1, longest)
            least = of_head.amin(dim=-1)
            if not valid.all():
                of_head.masked_fill_(~valid[:, None], _LARGEST)
                least = of_head.amin(dim=-1)
                of_head.masked_fill_(~valid[:, None], -_LARGEST)
            threshold[b] = _threshold(row, least.flatten(), p)
            in_a_head = (row >= threshold[b, :, None]).view(heads, -1, longest)
            kept = in_a_head.view(torch.uint8).amax(dim=1).view(torch.bool) & valid
        threshold[b].view(heads, -1).masked_fill_(length == 0, float("inf"))
        kept |= position < length.clamp(max=sink_pages * page_size)
        kept |= valid & (position >= (num_pages[b, :, None] - recent_pages) * page_size)

        listed = pages[b, :, : -(-longest // page_size), None]
        slots = (listed * page_size + torch.arange(page_size, dtype=torch.int32)).flatten(1)[:, :longest]
        num_tokens[b] = kept.sum(dim=-1)
        tokens[b].masked_scatter_(torch.arange(width) < num_tokens[b, :, None], slots.masked_select(kept))
    return tokens, num_tokens, threshold


def _threshold(row: Tensor, least: Tensor, p: float) -> Tensor:
    """The largest t [R] with softmax mass of {row >= t} at least p, of finite rows [R, n] whose least valid entry is known.

    Sums are float64 and run over a row from its first token to its last, then from its highest bin to its lowest.
    """
    top = row.amax(dim=-1, keepdim=True)
    weights = scratch("top_p: weights", row.shape, torch.float64)
    bins = scratch("top_p: bins", row.shape, torch.int64)
    weights.copy_(row).sub_(top).exp_()
    per_unit = _BINS / (top - least[:, None]).clamp(1e-30, _RANGE)
    bins.copy_((top - row).mul_(per_unit).clamp_(max=_BINS - 1))  # monotonic in the logit, rounding included
    mass = weights.new_zeros(len(row), _BINS).scatter_add_(1, bins, weights).cumsum_(dim=-1)
    target = mass[:, -1:] * p
    crossing = torch.searchsorted(mass, target)  # the first bin at which the mass reaches p
    above = torch.where(crossing > 0, mass.gather(1, (crossing - 1).clamp(min=0)), 0.0)

    in_bin = bins == crossing
    count = in_bin.sum(dim=-1, keepdim=True)
    best_first = row.masked_fill(~in_bin, -_LARGEST).topk(int(count.max()), dim=-1).values
    reached = above + (best_first.double() - top).exp_().cumsum_(dim=-1)
    index = torch.searchsorted(reached, target).minimum(count - 1)  # another order of sums may miss it by a rounding error
    return best_first.gather(1, index)[:, 0]
