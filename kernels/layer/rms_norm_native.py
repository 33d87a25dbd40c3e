"""rms_norm on a CPU with `rms_norm.cpp`: one call for few float32 rows; other inputs go to torch."""

from __future__ import annotations

import torch
from torch import Tensor

from distributed_sparse.kernels import native
from distributed_sparse.kernels.layer.rms_norm_torch import add_rms_norm_torch, rms_norm_torch

FEW_ELEMENTS = 1 << 17
"""Up to this many elements, one thread in one call is faster than all threads in several."""


def rms_norm_native(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `rms_norm`."""
    if not _takes(x):
        return rms_norm_torch(x, weight, eps)
    return _run(x, None, weight, eps)[0]


def add_rms_norm_native(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `add_rms_norm`."""
    if not _takes(x):
        return add_rms_norm_torch(x, residual, weight, eps)
    return _run(x, residual, weight, eps)


def _takes(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.numel() <= FEW_ELEMENTS and native.serves(x)


def _run(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, weight, residual = x.contiguous(), weight.contiguous(), None if residual is None else residual.contiguous()
    out = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    dim = x.shape[-1]
    native.run(
        "add_rms_norm_float32", x, residual, weight, eps, x.numel() // dim, dim, total, out
    )  # fmt: skip
    return out, total
