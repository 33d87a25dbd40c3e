"""int4_logits in Triton: one program per (tile of tokens, KV head, sequence) unpacks codes into the operand of a product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_GROUP_ROWS = 16
"""Query heads of a group are padded to the fewest rows of a tensor-core product."""

_BLOCK_TOKENS = 64
_BLOCK_BYTES = {2: 32, 4: 16}
"""Bytes of codes per token and step, by the bytes of q's dtype: float32 operands of 32 take half of all registers."""


# What changes with batch and context must not compile anew; strides of q and the codes are an engine's own, and stay.
@triton.jit(
    do_not_specialize=["width", "stride_pages_b", "stride_pages_h", "stride_num_b", "stride_num_h"],
    do_not_specialize_on_alignment=["p_pages", "p_num_pages", "p_last"],
)
def _int4_logits_kernel(
    p_q,
    p_codes,
    p_scales,
    p_pages,
    p_num_pages,
    p_last,
    p_logits,
    scale,
    width,
    stride_q_b,
    stride_q_h,
    stride_c_page,
    stride_c_h,
    stride_c_s,
    stride_sc_page,
    stride_sc_h,
    stride_sc_s,
    stride_pages_b,
    stride_pages_h,
    stride_num_b,
    stride_num_h,
    G: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    i_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    num_pages = tl.load(p_num_pages + i_b * stride_num_b + i_h * stride_num_h)
    length = tl.where(num_pages > 0, (num_pages - 1) * PAGE_SIZE + tl.load(p_last + i_b), 0)
    m_t = i_t < length
    o_g = tl.arange(0, BLOCK_G)
    o_w = tl.arange(0, BLOCK_W)
    m_g = (o_g < G)[:, None]
    o_page = i_b * stride_pages_b + i_h * stride_pages_h + i_t // PAGE_SIZE
    page = tl.load(p_pages + o_page, mask=m_t, other=0).to(tl.int64)
    slot = i_t % PAGE_SIZE
    p_q += i_b * stride_q_b + (i_h * G + o_g)[:, None] * stride_q_h + o_w[None, :]  # [BLOCK_G, BLOCK_W]
    p_codes += (page * stride_c_page + i_h * stride_c_h + slot * stride_c_s)[None, :] + o_w[:, None]  # [BLOCK_W, BLOCK_T]
    p_scales += page * stride_sc_page + i_h * stride_sc_h + slot * stride_sc_s

    dtype: tl.constexpr = p_q.dtype.element_ty
    bytes_per_token: tl.constexpr = D * BITS // 8
    b_dot = tl.zeros([BLOCK_G, BLOCK_T], tl.float32)
    b_sums = tl.zeros([BLOCK_G, BLOCK_W], tl.float32)  # reduced after the loop: the compiler fails on a sum carried through it
    for i_w in range(0, bytes_per_token, BLOCK_W):
        m_w = i_w + o_w < bytes_per_token
        b_codes = tl.load(p_codes + i_w, mask=m_w[:, None] & m_t[None, :], other=0)
        for i_part in tl.static_range(8 // BITS):
            b_q = tl.load(p_q + i_part * bytes_per_token + i_w, mask=m_g & m_w[None, :], other=0.0)
            b_part = (b_codes >> (i_part * BITS)) & ((1 << BITS) - 1)
            # Codes are exact in every dtype of q. TF32, the default for float32, would round q.
            b_dot = tl.dot(b_q, b_part.to(dtype), acc=b_dot, input_precision="ieee")
            b_sums += b_q.to(tl.float32)

    b_sum = tl.sum(b_sums, axis=1)
    b_scale = tl.load(p_scales, mask=m_t, other=0.0).to(tl.float32)
    b_minimum = tl.load(p_scales + 1, mask=m_t, other=0.0).to(tl.float32)
    b_logit = scale * (b_scale[None, :] * b_dot + b_sum[:, None] * b_minimum[None, :])
    o_row = (i_b * tl.num_programs(1) + i_h) * G + o_g
    m_out = m_g & (i_t < width)[None, :]
    tl.store(p_logits + o_row[:, None] * width + i_t[None, :], tl.where(m_t[None, :], b_logit, float("-inf")), mask=m_out)


def int4_logits_triton(
    q: Tensor,
    key_codes: Tensor,
    key_scales: Tensor,
    pages: Tensor,
    num_pages: Tensor,
    last_page_len: Tensor,
    scale: float,
) -> Tensor:
    """See `distributed_sparse.kernels.int4_logits.int4_logits`."""
    q, pages = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, pages))
    assert key_codes.stride(-1) == key_scales.stride(-1) == 1
    batch, num_q_heads, dim = q.shape
    _, heads, page_size, bytes_per_token = key_codes.shape
    group = num_q_heads // heads
    width = pages.shape[2] * page_size
    logits = torch.empty(batch, num_q_heads, width, dtype=torch.float32, device=q.device)
    if logits.numel() == 0:
        return logits
    assert group <= _GROUP_ROWS
    _int4_logits_kernel[(triton.cdiv(width, _BLOCK_TOKENS), heads, batch)](
        q,
        key_codes,
        key_scales,
        pages,
        num_pages,
        last_page_len,
        logits,
        scale,
        width,
        q.stride(0),
        q.stride(1),
        *key_codes.stride()[:3],
        *key_scales.stride()[:3],
        pages.stride(0),
        pages.stride(1),
        num_pages.stride(0),
        num_pages.stride(1),
        G=group,
        D=dim,
        BITS=8 * bytes_per_token // dim,
        PAGE_SIZE=page_size,
        BLOCK_G=_GROUP_ROWS,
        BLOCK_T=_BLOCK_TOKENS,
        BLOCK_W=min(triton.next_power_of_2(bytes_per_token), _BLOCK_BYTES[q.element_size()]),
        num_warps=4,
        num_stages=3,
        enable_fp_fusion=False,
    )
    return logits
