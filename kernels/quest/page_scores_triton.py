"""page_scores in Triton: one program per (tile of pages, KV head, sequence)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from distributed_sparse.kernels.quest.page_scores import sums_over_group

_GROUP_ROWS = 16
"""Query heads of a group are padded to the minimum rows of a tensor-core product."""

_BLOCK_PAGES = 64
_BLOCK_CHANNELS = 32
"""Channels per step: divides every head_dim, and keeps the operands of float32 products in registers without spilling."""


# Arguments that change with batch and context must not trigger recompilation; other strides are fixed per engine.
@triton.jit(
    do_not_specialize=["width", "stride_table_b"],
    do_not_specialize_on_alignment=["p_table", "p_num_pages"],
)
def _page_scores_kernel(
    p_q,
    p_min_max,
    p_table,
    p_num_pages,
    p_scores,
    width,
    stride_q_b,
    stride_q_h,
    stride_mm_page,
    stride_mm_h,
    stride_mm_m,
    stride_table_b,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TAKE_MAX: tl.constexpr,
):
    i_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    m_p = i_p < tl.load(p_num_pages + i_b)
    o_g = tl.arange(0, BLOCK_G)
    o_d = tl.arange(0, BLOCK_D)
    page = tl.load(p_table + i_b * stride_table_b + i_p, mask=m_p, other=0).to(tl.int64)
    p_q += i_b * stride_q_b + (i_h * G + o_g)[:, None] * stride_q_h + o_d[None, :]  # [BLOCK_G, BLOCK_D]
    p_min = p_min_max + (page * stride_mm_page + i_h * stride_mm_h)[None, :] + o_d[:, None]  # [BLOCK_D, BLOCK_P]
    p_max = p_min + stride_mm_m
    m_g = (o_g < G)[:, None]

    b_score = tl.zeros([BLOCK_G, BLOCK_P], tl.float32)
    for i_d in range(0, D, BLOCK_D):
        b_q = tl.load(p_q + i_d, mask=m_g, other=0.0)
        b_min = tl.load(p_min + i_d, mask=m_p[None, :], other=0.0)
        b_max = tl.load(p_max + i_d, mask=m_p[None, :], other=0.0)
        zero = tl.zeros([BLOCK_G, BLOCK_D], b_q.dtype)
        # With TF32, the default for float32, this would not be an upper bound.
        b_score = tl.dot(tl.where(b_q < zero, b_q, zero), b_min, acc=b_score, input_precision="ieee")
        b_score = tl.dot(tl.where(b_q > zero, b_q, zero), b_max, acc=b_score, input_precision="ieee")

    b_kept = tl.where(m_g, b_score, float("-inf") if TAKE_MAX else 0.0)
    b_row = tl.max(b_kept, axis=0) if TAKE_MAX else tl.sum(b_kept, axis=0)  # [BLOCK_P]
    o_row = (i_b * tl.num_programs(1) + i_h) * width
    tl.store(p_scores + o_row + i_p, tl.where(m_p, b_row, float("-inf")), mask=i_p < width)


def page_scores_triton(
    q: Tensor, page_min_max: Tensor, page_table: Tensor, num_pages: Tensor, group_reduction: str = "max"
) -> Tensor:
    """See `page_scores`."""
    q = q if q.stride(-1) == 1 else q.contiguous()
    page_table = page_table if page_table.stride(-1) == 1 else page_table.contiguous()
    assert page_min_max.stride(-1) == 1
    batch, num_q_heads, dim = q.shape
    heads = page_min_max.shape[1]
    group = num_q_heads // heads
    width = page_table.shape[1]
    scores = torch.empty(batch, heads, width, dtype=torch.float32, device=q.device)
    if scores.numel() == 0:
        return scores
    assert dim % _BLOCK_CHANNELS == 0
    assert group <= _GROUP_ROWS
    _page_scores_kernel[(triton.cdiv(width, _BLOCK_PAGES), heads, batch)](
        q, page_min_max, page_table, num_pages, scores, width, q.stride(0), q.stride(1), *page_min_max.stride()[:3],
        page_table.stride(0),
        G=group, D=dim, BLOCK_G=_GROUP_ROWS, BLOCK_P=_BLOCK_PAGES, BLOCK_D=_BLOCK_CHANNELS,
        TAKE_MAX=not sums_over_group(group_reduction), num_warps=4, num_stages=3, enable_fp_fusion=False
    )  # fmt: skip
    return scores
