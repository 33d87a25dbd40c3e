"""rms_norm in torch, for CPUs."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `rms_norm`."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype).mul_(weight)


def add_rms_norm_torch(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `add_rms_norm`."""
    residual = residual + x
    return rms_norm_torch(residual, weight, eps), residual
