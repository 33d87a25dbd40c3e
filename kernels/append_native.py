"""append on a CPU with `cpp/append.cpp`: float32 without a low-bit copy, as for dense and Quest; the rest goes to torch."""

from __future__ import annotations

import torch
from torch import Tensor

from distributed_sparse.kernels import native
from distributed_sparse.kernels.append_torch import append_torch, rotary_append_torch


def append_native(
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    starts: Tensor,
    offsets: Tensor,
    counts: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_min_max: Tensor | None = None,
    key_codes: Tensor | None = None,
    key_scales: Tensor | None = None,
    key_offset: Tensor | None = None,
) -> None:
    """See `distributed_sparse.kernels.append.append`."""
    runs = (pages, starts, offsets, counts)
    if k.dtype != torch.float32 or key_codes is not None:
        append_torch(k, v, *runs, k_pages, v_pages, page_min_max, key_codes, key_scales, key_offset)
    else:
        _run(None, k, v, None, None, runs, k_pages, v_pages, page_min_max)


def rotary_append_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    pages: Tensor,
    starts: Tensor,
    offsets: Tensor,
    counts: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_min_max: Tensor | None = None,
    key_codes: Tensor | None = None,
    key_scales: Tensor | None = None,
    key_offset: Tensor | None = None,
    *,
    return_keys: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """See `distributed_sparse.kernels.append.rotary_append`."""
    runs = (pages, starts, offsets, counts)
    if k.dtype != torch.float32 or key_codes is not None or return_keys:
        metadata = (page_min_max, key_codes, key_scales, key_offset)
        return rotary_append_torch(q, k, v, cos, sin, *runs, k_pages, v_pages, *metadata, return_keys=return_keys)
    return _run(q, k, v, cos.contiguous(), sin.contiguous(), runs, k_pages, v_pages, page_min_max), None


def _run(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    runs: tuple[Tensor, Tensor, Tensor, Tensor],
    k_pages: Tensor,
    v_pages: Tensor,
    page_min_max: Tensor | None,
) -> Tensor:
    """The rotated q, or an empty tensor where there is none."""
    assert k_pages.is_contiguous() and v_pages.is_contiguous()
    assert page_min_max is None or page_min_max.is_contiguous()
    q, k, v = _of_heads(q) if q is not None else None, _of_heads(k), _of_heads(v)
    pages, starts, offsets, counts = (x.int().contiguous() for x in runs)
    turned = torch.empty(q.shape if q is not None else 0)
    native.run(
        "rotary_append_float32",
        q,
        q.stride(0) if q is not None else 0,
        k,
        k.stride(0),
        v,
        v.stride(0),
        cos,
        sin,
        pages,
        starts,
        offsets,
        counts,
        len(counts),
        len(k),
        q.shape[1] if q is not None else 0,
        k.shape[1],
        k.shape[2],
        k_pages.shape[2],
        k_pages,
        v_pages,
        page_min_max,
        turned,
    )
    return turned


def _of_heads(x: Tensor) -> Tensor:
    """[N, H, d] with a token's heads side by side; tokens may lie apart."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
