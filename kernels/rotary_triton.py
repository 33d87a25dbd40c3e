"""rotary in Triton: queries and keys of a token in one launch, one program per (token, tile of heads)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_HEADS = 8


@triton.jit
def _rotary_kernel(
    p_q,
    p_k,
    p_cos,
    p_sin,
    p_q_out,
    p_k_out,
    stride_q_n,
    stride_q_h,
    stride_k_n,
    stride_k_h,
    stride_cos_n,
    stride_sin_n,
    H_Q: tl.constexpr,
    H_KV: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)  # query heads first, then key heads
    o_c = tl.arange(0, BLOCK_HALF)
    b_cos = tl.load(p_cos + i_n * stride_cos_n + o_c, mask=o_c < HALF, other=0.0)[None, :]  # [1, BLOCK_HALF]
    b_sin = tl.load(p_sin + i_n * stride_sin_n + o_c, mask=o_c < HALF, other=0.0)[None, :]

    m_q = (i_h < H_Q)[:, None] & (o_c < HALF)[None, :]
    o_q = i_n * stride_q_n + i_h[:, None] * stride_q_h + o_c[None, :]
    o_q_out = (i_n * H_Q + i_h)[:, None] * (2 * HALF) + o_c[None, :]
    _rotate(p_q, o_q, p_q_out, o_q_out, m_q, b_cos, b_sin, HALF)

    i_kv = i_h - H_Q
    m_k = ((i_kv >= 0) & (i_kv < H_KV))[:, None] & (o_c < HALF)[None, :]
    o_k = i_n * stride_k_n + i_kv[:, None] * stride_k_h + o_c[None, :]
    o_k_out = (i_n * H_KV + i_kv)[:, None] * (2 * HALF) + o_c[None, :]
    _rotate(p_k, o_k, p_k_out, o_k_out, m_k, b_cos, b_sin, HALF)


@triton.jit
def _rotate(p_x, o_x, p_out, o_out, mask, b_cos, b_sin, HALF: tl.constexpr):
    b_first = tl.load(p_x + o_x, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_H, BLOCK_HALF]
    b_second = tl.load(p_x + o_x + HALF, mask=mask, other=0.0).to(tl.float32)
    dtype: tl.constexpr = p_out.dtype.element_ty
    tl.store(p_out + o_out, (b_first * b_cos - b_second * b_sin).to(dtype), mask=mask)
    tl.store(p_out + o_out + HALF, (b_second * b_cos + b_first * b_sin).to(dtype), mask=mask)


def rotary_triton(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `distributed_sparse.kernels.rotary.rotary`."""
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    if num_tokens == 0:
        return q_out, k_out
    _rotary_kernel[(num_tokens, triton.cdiv(num_q_heads + num_kv_heads, _BLOCK_HEADS))](
        q,
        k,
        cos,
        sin,
        q_out,
        k_out,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        cos.stride(0),
        sin.stride(0),
        H_Q=num_q_heads,
        H_KV=num_kv_heads,
        HALF=head_dim // 2,
        BLOCK_H=_BLOCK_HEADS,
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
        num_warps=4,
        enable_fp_fusion=False,
    )
    return q_out, k_out
