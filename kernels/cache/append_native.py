"""append on a CPU with `append.cpp`: one pass per key, float32 only; half precision goes to torch."""

from __future__ import annotations

import torch
from torch import Tensor

from distributed_sparse.kernels import native
from distributed_sparse.kernels.cache.append_torch import append_torch, rotary_append_torch


def append_native(
    k, v, pages, starts, offsets, counts, k_pages, v_pages, page_min_max=None, key_codes=None, key_scales=None, key_offset=None
):
    """See `append`."""
    runs = (pages, starts, offsets, counts)
    metadata = (page_min_max, key_codes, key_scales, key_offset)
    if k.dtype != torch.float32:
        append_torch(k, v, *runs, k_pages, v_pages, *metadata)
    else:
        _run(None, k, v, None, None, runs, k_pages, v_pages, *metadata, return_keys=False)


def rotary_append_native(
    q, k, v, cos, sin, pages, starts, offsets, counts, k_pages, v_pages, page_min_max=None, key_codes=None, key_scales=None,
    key_offset=None, *, return_keys=False
):  # fmt: skip
    """See `rotary_append`."""
    runs = (pages, starts, offsets, counts)
    metadata = (page_min_max, key_codes, key_scales, key_offset)
    if k.dtype != torch.float32:
        return rotary_append_torch(q, k, v, cos, sin, *runs, k_pages, v_pages, *metadata, return_keys=return_keys)
    return _run(q, k, v, cos.contiguous(), sin.contiguous(), runs, k_pages, v_pages, *metadata, return_keys=return_keys)


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
    key_codes: Tensor | None,
    key_scales: Tensor | None,
    key_offset: Tensor | None,
    *,
    return_keys: bool,
) -> tuple[Tensor, Tensor | None]:
    """Returns the rotated q (empty without q) and, with ``return_keys``, the rotated k."""
    for written in (k_pages, v_pages, page_min_max, key_codes, key_scales):
        assert written is None or written.is_contiguous()
    assert (key_codes is None) == (key_scales is None)
    q, k, v = _of_heads(q) if q is not None else None, _of_heads(k), _of_heads(v)
    pages, starts, offsets, counts = (x.int().contiguous() for x in runs)
    turned = torch.empty(q.shape if q is not None else 0)
    turned_keys = torch.empty(k.shape) if return_keys else None
    native.run(
        "rotary_append_float32", q, q.stride(0) if q is not None else 0, k, k.stride(0), v, v.stride(0), cos, sin, pages,
        starts, offsets, counts, len(counts), len(k), q.shape[1] if q is not None else 0, k.shape[1], k.shape[2],
        k_pages.shape[2], k_pages, v_pages, page_min_max,
        8 * key_codes.shape[3] // k.shape[2] if key_codes is not None else 0, key_codes, key_scales,
        key_offset.float().contiguous() if key_codes is not None and key_offset is not None else None, turned, turned_keys
    )  # fmt: skip
    return turned, turned_keys


def _of_heads(x: Tensor) -> Tensor:
    """[N, H, d] with a token's heads contiguous; tokens may have any stride."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
