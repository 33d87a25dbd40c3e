"""rms_norm in Triton: one program per tile of rows, the residual addition fused."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE_ELEMENTS = 1024
"""Elements of one tile where rows are short (q/k norms); the tile's shape, and so a row's bits, depend on D alone."""


@triton.jit(do_not_specialize=["num_rows"])  # a new batch must not trigger recompilation
def _rms_norm_kernel(
    p_x,
    p_residual,
    p_weight,
    p_y,
    p_sum,
    num_rows,
    heads,
    stride_x_n,
    stride_x_h,
    stride_r_n,
    stride_r_h,
    eps,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    i_row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    i_n = (i_row // heads).to(tl.int64)
    i_h = (i_row % heads).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    mask = (i_row < num_rows)[:, None] & (o_d < D)[None, :]

    o_x = (i_n * stride_x_n + i_h * stride_x_h)[:, None] + o_d[None, :]
    b_x = tl.load(p_x + o_x, mask=mask, other=0.0)  # [BLOCK_R, BLOCK_D]
    o_y = i_row.to(tl.int64)[:, None] * D + o_d[None, :]
    if HAS_RESIDUAL:
        o_r = (i_n * stride_r_n + i_h * stride_r_h)[:, None] + o_d[None, :]
        b_r = tl.load(p_residual + o_r, mask=mask, other=0.0)
        b_x = (b_x.to(tl.float32) + b_r.to(tl.float32)).to(b_x.dtype)  # rounded before the norm, as the torch path does
        tl.store(p_sum + o_y, b_x, mask=mask)

    b_wide = b_x.to(tl.float32)
    b_scale = tl.rsqrt(tl.sum(b_wide * b_wide, axis=1) / D + eps)  # [BLOCK_R]
    b_normed = (b_wide * b_scale[:, None]).to(b_x.dtype)  # rounded before the weight, as Hugging Face does
    b_weight = tl.load(p_weight + o_d, mask=o_d < D, other=0.0)
    b_y = b_normed.to(tl.float32) * b_weight.to(tl.float32)[None, :]
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=mask)


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `rms_norm`."""
    return _launch(x, None, weight, eps)[0]


def add_rms_norm_triton(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `add_rms_norm`."""
    y, total = _launch(x, residual, weight, eps)
    assert total is not None
    return y, total


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y, total
    x_rows = _rows(x)
    r_rows = x_rows if residual is None else _rows(residual)
    num_n, heads, dim = x_rows.shape
    block_d = triton.next_power_of_2(dim)
    block_r = max(1, _TILE_ELEMENTS // block_d)
    _rms_norm_kernel[(triton.cdiv(num_n * heads, block_r),)](
        x_rows, r_rows, weight, y, y if total is None else total, num_n * heads, heads, x_rows.stride(0), x_rows.stride(1),
        r_rows.stride(0), r_rows.stride(1), eps,
        D=dim, BLOCK_R=block_r, BLOCK_D=block_d, HAS_RESIDUAL=residual is not None, num_warps=min(16, max(4, block_d // 512)),
        enable_fp_fusion=False
    )  # fmt: skip
    return y, total


def _rows(x: Tensor) -> Tensor:
    """A view [n, heads, D] with unit stride in D; a copy only if the strides require it."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x if x.dim() == 3 else x.reshape(-1, 1, x.shape[-1])
