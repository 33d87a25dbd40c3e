"""top_p in Triton: one program per (sequence, KV head) bisects the thresholds of all its query heads at once, then lists."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_ELEMENTS = 4096
"""Logits per step, over all query heads of a group: one number for every context length, as each would be compiled apart."""


@triton.jit
def _ordered(b_logit):
    """int32 image of float32 that keeps the order (of -0.0 and +0.0 too: they are one value)."""
    b_bits = (b_logit + 0.0).to(tl.int32, bitcast=True)
    return b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)  # negative: flip all bits but the sign


@triton.jit
def _logit_of(b_image):
    """The float32 of an image."""
    return (b_image ^ ((b_image >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


# What changes with batch and context must not compile anew.
@triton.jit(
    do_not_specialize=[
        "heads",
        "width",
        "p",
        "sink_pages",
        "recent_pages",
        "stride_logits_b",
        "stride_logits_h",
        "stride_pages_b",
        "stride_pages_h",
        "stride_num_b",
        "stride_num_h",
    ],
    do_not_specialize_on_alignment=["p_pages", "p_num_pages", "p_last"],
)
def _top_p_kernel(
    p_logits,
    p_pages,
    p_num_pages,
    p_last,
    p_tokens,
    p_num_tokens,
    p_threshold,
    p,
    heads,
    width,
    sink_pages,
    recent_pages,
    stride_logits_b,
    stride_logits_h,
    stride_pages_b,
    stride_pages_h,
    stride_num_b,
    stride_num_h,
    G: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0)
    i_b = (i_row // heads).to(tl.int64)
    i_h = (i_row % heads).to(tl.int64)
    num_pages = tl.load(p_num_pages + i_b * stride_num_b + i_h * stride_num_h)
    n = tl.where(num_pages > 0, (num_pages - 1) * PAGE_SIZE + tl.load(p_last + i_b), 0)
    o_g = tl.arange(0, BLOCK_G)
    m_g = o_g < G
    p_logits += i_b * stride_logits_b + (i_h * G + o_g)[:, None] * stride_logits_h  # [BLOCK_G, 1]
    p_pages += i_b * stride_pages_b + i_h * stride_pages_h
    p_tokens += i_row.to(tl.int64) * width

    # Between the image of -inf, whose set is the whole row, and that past the maximum, whose set is empty.
    low = tl.full([BLOCK_G], -2139095041, tl.int32)
    if p < 1.0:
        b_max = tl.full([BLOCK_G, BLOCK], float("-inf"), tl.float32)
        for i_first in range(0, n, BLOCK):
            i_t = i_first + tl.arange(0, BLOCK)
            m_t = m_g[:, None] & (i_t < n)[None, :]
            b_max = tl.maximum(b_max, tl.load(p_logits + i_t[None, :], mask=m_t, other=float("-inf")))
        b_top = tl.max(b_max, axis=1)  # [BLOCK_G]
        high = _ordered(b_top) + 1
        # The first step sums over the whole row: the mass of which p is a share, in the order of all later sums. A sum with
        # fewer terms in the same places is never larger, rounding included: the search has one answer.
        target = tl.full([BLOCK_G], float("inf"), tl.float32)
        middle = low
        for i_step in range(33):
            b_mass = tl.zeros([BLOCK_G, BLOCK], tl.float32)
            b_least = _logit_of(middle)[:, None]
            for i_first in range(0, n, BLOCK):
                i_t = i_first + tl.arange(0, BLOCK)
                m_t = m_g[:, None] & (i_t < n)[None, :]
                b_logit = tl.load(p_logits + i_t[None, :], mask=m_t, other=float("-inf"))
                b_mass += tl.where(m_t & (b_logit >= b_least), tl.exp(b_logit - b_top[:, None]), 0.0)
            b_sum = tl.sum(b_mass, axis=1)
            target = tl.where(i_step == 0, b_sum * p, target)
            m_enough = b_sum >= target
            low = tl.where(m_enough, middle, low)
            high = tl.where(m_enough, high, middle)
            middle = (low & high) + ((low ^ high) >> 1)  # their mean, rounded down: the sum itself may overflow
    b_threshold = tl.where(n > 0, _logit_of(low), float("inf"))
    tl.store(p_threshold + i_row * G + o_g, b_threshold, mask=m_g)

    sinks = sink_pages * PAGE_SIZE
    newest = (num_pages - recent_pages) * PAGE_SIZE
    kept_before = tl.zeros([], tl.int32)
    for i_first in range(0, n, BLOCK):
        i_t = i_first + tl.arange(0, BLOCK)
        m_row = i_t < n
        m_t = m_g[:, None] & m_row[None, :]
        b_logit = tl.load(p_logits + i_t[None, :], mask=m_t, other=float("-inf"))
        b_in_a_head = tl.max((m_t & (b_logit >= b_threshold[:, None])).to(tl.int32), axis=0)  # [BLOCK]
        m_kept = m_row & ((b_in_a_head > 0) | (i_t < sinks) | (i_t >= newest) | (p >= 1.0))
        b_kept = m_kept.to(tl.int32)
        b_position = kept_before + tl.cumsum(b_kept, axis=0) - b_kept
        b_page = tl.load(p_pages + i_t // PAGE_SIZE, mask=m_kept, other=0)
        tl.store(p_tokens + b_position, b_page * PAGE_SIZE + i_t % PAGE_SIZE, mask=m_kept)
        kept_before += tl.sum(b_kept, axis=0)
    tl.store(p_num_tokens + i_row, kept_before)


def top_p_triton(
    logits: Tensor,
    pages: Tensor,
    num_pages: Tensor,
    last_page_len: Tensor,
    p: float,
    *,
    page_size: int,
    sink_pages: int,
    recent_pages: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `distributed_sparse.kernels.top_p.top_p`."""
    logits, pages = (x if x.stride(-1) == 1 else x.contiguous() for x in (logits, pages))
    batch, num_q_heads, width = logits.shape
    heads = num_pages.shape[1]
    tokens = torch.empty(batch, heads, width, dtype=torch.int32, device=logits.device)
    num_tokens = torch.empty(batch, heads, dtype=torch.int32, device=logits.device)
    threshold = torch.empty(batch, num_q_heads, dtype=torch.float32, device=logits.device)
    if num_tokens.numel() == 0:
        return tokens, num_tokens, threshold
    group = num_q_heads // heads
    block_g = triton.next_power_of_2(group)
    _top_p_kernel[(batch * heads,)](
        logits,
        pages,
        num_pages,
        last_page_len,
        tokens,
        num_tokens,
        threshold,
        p,
        heads,
        width,
        sink_pages,
        recent_pages,
        logits.stride(0),
        logits.stride(1),
        pages.stride(0),
        pages.stride(1),
        num_pages.stride(0),
        num_pages.stride(1),
        G=group,
        PAGE_SIZE=page_size,
        BLOCK_G=block_g,
        BLOCK=_BLOCK_ELEMENTS // block_g,
        num_warps=8,
        enable_fp_fusion=False,
    )
    return tokens, num_tokens, threshold
