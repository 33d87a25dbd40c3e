"""append in torch: one scatter for all tokens, one reduction over all pages, one quantisation of all keys."""

from __future__ import annotations

import torch
from torch import Tensor


def append_torch(
    k, v, pages, starts, offsets, counts, k_pages, v_pages, page_min_max=None, key_codes=None, key_scales=None, key_offset=None
):
    """See `append`."""
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
    new_keys = k.index_select(0, token)
    k_pages[page, :, slot] = new_keys
    v_pages[page, :, slot] = v.index_select(0, token)
    if key_codes is not None:
        assert key_scales is not None
        bits = 8 * key_codes.shape[-1] // k.shape[-1]
        x = new_keys.float() if key_offset is None else new_keys.float() - key_offset
        key_codes[page, :, slot], key_scales[page, :, slot] = quantise(x, bits)
    if page_min_max is None:
        return

    # Shorter runs are padded with their last token, which changes neither min nor max.
    token = starts[:, None] + torch.minimum(step, counts[:, None] - 1)  # [T, longest]
    by_run = k.index_select(0, token.flatten()).view(*token.shape, *k.shape[1:])
    low, high = by_run.amin(dim=1), by_run.amax(dim=1)  # [T, H_kv, d]
    old_low, old_high = page_min_max.index_select(0, pages).unbind(dim=2)
    is_new = (offsets == 0)[:, None, None]
    low = torch.where(is_new, low, torch.minimum(old_low, low))
    high = torch.where(is_new, high, torch.maximum(old_high, high))
    page_min_max[pages] = torch.stack([low, high], dim=2)


def rotary_append_torch(
    q, k, v, cos, sin, pages, starts, offsets, counts, k_pages, v_pages, page_min_max=None, key_codes=None, key_scales=None,
    key_offset=None, *, return_keys=False
):  # fmt: skip
    """See `rotary_append`."""
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    runs = (pages, starts, offsets, counts)
    append_torch(k, v, *runs, k_pages, v_pages, page_min_max, key_codes, key_scales, key_offset)
    return q, k if return_keys else None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each channel pair (i, i + d/2) of x [N, H, d] by its token's angle. Contiguous, in x's dtype."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [N, 1, d/2]
    first, second = x.float().chunk(2, dim=-1)
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).sub_(second * sin)
    torch.mul(second, cos, out=out_second).add_(first * sin)
    return out.to(x.dtype)


def quantise(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Quantise float32 [..., n]: codes uint8 [..., n * bits / 8], packed by `pack`; scale and minimum, float16 [..., 2]."""
    levels = 2**bits - 1
    low, high = x.aminmax(dim=-1, keepdim=True)
    scales = torch.cat([(high - low) / levels, low], dim=-1).half()
    scale, minimum = scales.float().split(1, dim=-1)  # readers decode with the rounded values
    codes = (x - minimum).div_(scale).add_(0.5).floor_().clamp_(0, levels).masked_fill_(scale == 0, 0)
    return pack(codes.to(torch.uint8), bits), scales


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 [..., n] into w = n * bits / 8 bytes: byte i holds codes i, i + w, ..., the first in its lowest bits."""
    parts = codes.chunk(8 // bits, dim=-1)
    packed = parts[0].clone()
    for i, part in enumerate(parts[1:], start=1):
        packed |= part << (i * bits)
    return packed
