"""top_p in Triton: one program per query head searches its threshold, one per KV head lists what its query heads keep."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROW_TOKENS = (2048, 8192)
"""Rows up to these lengths are searched in registers, logits and weights: at most 32 + 32 of a thread's 255."""

_LIST_TOKENS = 4096
"""Tokens per step of the listing."""


@triton.jit
def _ordered(logit):
    """int32 image of float32 that keeps the order (of -0.0 and +0.0 too: they are one value)."""
    bits = (logit + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative: flip all bits but the sign


@triton.jit
def _logit_of(image):
    """The float32 of an image."""
    return (image ^ ((image >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _mean(low, high):
    """Rounded down; the sum itself may overflow."""
    return (low & high) + ((low ^ high) >> 1)


# A search's sums, the target's included, run over the same places in the same order. One with fewer terms is never larger
# then, rounding included: the search has one answer.


@triton.jit
def _mass(b_logit, b_weight, image):
    return tl.sum((b_logit >= _logit_of(image)).to(tl.float32) * b_weight, axis=0)


@triton.jit
def _search_registers(p_logits, n, p, lowest, WIDTH: tl.constexpr):
    """The threshold's image of a row of n <= WIDTH logits, which are read, and their weights computed, once."""
    i_t = tl.arange(0, WIDTH)
    b_logit = tl.load(p_logits + i_t, mask=i_t < n, other=float("-inf"))
    top = tl.max(b_logit, axis=0)
    b_weight = tl.where(i_t < n, tl.exp(b_logit - top), 0.0)
    low = lowest
    high = _ordered(top) + 1
    target = _mass(b_logit, b_weight, low) * p
    for _ in range(32):
        middle = _mean(low, high)
        is_enough = _mass(b_logit, b_weight, middle) >= target
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle)
    return low


@triton.jit
def _add_masses(b_mass, b_logit, b_weight, image):
    return b_mass + tl.sum((b_logit >= _logit_of(image)).to(tl.float32) * b_weight, axis=0)


@triton.jit
def _search_memory(p_logits, n, p, lowest, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The threshold's image of a row of any length: each pass over its logits tries three and so finds two bits."""
    i_tile = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]  # a column is a thread's own
    b_max = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
    for i_first in range(0, n, ROWS * COLUMNS):
        i_t = i_first + i_tile
        b_max = tl.maximum(b_max, tl.load(p_logits + i_t, mask=i_t < n, other=float("-inf")))
    top = tl.max(tl.max(b_max, axis=0), axis=0)
    low = lowest
    high = _ordered(top) + 1
    target = float("inf")
    for i_pass in range(17):
        second = _mean(low, high)
        first = tl.where(i_pass == 0, low, _mean(low, second))  # of the whole row: the mass of which p is a share
        third = _mean(second, high)
        b_first = tl.zeros([COLUMNS], tl.float32)
        b_second = tl.zeros([COLUMNS], tl.float32)
        b_third = tl.zeros([COLUMNS], tl.float32)
        for i_first in range(0, n, ROWS * COLUMNS):
            i_t = i_first + i_tile
            b_logit = tl.load(p_logits + i_t, mask=i_t < n, other=float("-inf"))
            b_weight = tl.where(i_t < n, tl.exp(b_logit - top), 0.0)
            b_first = _add_masses(b_first, b_logit, b_weight, first)
            b_second = _add_masses(b_second, b_logit, b_weight, second)
            b_third = _add_masses(b_third, b_logit, b_weight, third)
        mass = tl.sum(b_first, axis=0)
        target = tl.where(i_pass == 0, mass * p, target)
        is_first = mass >= target
        is_second = tl.sum(b_second, axis=0) >= target
        is_third = tl.sum(b_third, axis=0) >= target
        low = tl.where(is_third, third, tl.where(is_second, second, tl.where(is_first, first, low)))
        high = tl.where(is_third, high, tl.where(is_second, third, tl.where(is_first, second, first)))
    return low


# What changes with batch and context must not compile anew.
@triton.jit(
    do_not_specialize=["p", "stride_logits_b", "stride_logits_h", "stride_num_b", "stride_num_h"],
    do_not_specialize_on_alignment=["p_num_pages", "p_last"],
)
def _top_p_threshold_kernel(
    p_logits,
    p_num_pages,
    p_last,
    p_threshold,
    p,
    stride_logits_b,
    stride_logits_h,
    stride_num_b,
    stride_num_h,
    G: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SHORT: tl.constexpr,
    LONG: tl.constexpr,
):
    i_g = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    num_pages = tl.load(p_num_pages + i_b * stride_num_b + (i_g // G) * stride_num_h)
    n = tl.where(num_pages > 0, (num_pages - 1) * PAGE_SIZE + tl.load(p_last + i_b), 0)
    p_logits += i_b * stride_logits_b + i_g.to(tl.int64) * stride_logits_h
    # Between the image of -inf, whose set is the whole row, and that past the maximum, whose set is empty.
    low = tl.full([], -2139095041, tl.int32)
    if p < 1.0:  # the branch, and so the order of the sums, depends on the row's own length
        if n <= SHORT:
            low = _search_registers(p_logits, n, p, low, SHORT)
        elif n <= LONG:
            low = _search_registers(p_logits, n, p, low, LONG)
        else:
            low = _search_memory(p_logits, n, p, low, LONG // 256, 256)
    threshold = tl.where(n > 0, _logit_of(low), float("inf"))
    tl.store(p_threshold + i_b * tl.num_programs(0) + i_g, threshold)


@triton.jit(
    do_not_specialize=[
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
def _top_p_list_kernel(
    p_logits,
    p_pages,
    p_num_pages,
    p_last,
    p_threshold,
    p_tokens,
    p_num_tokens,
    p,
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
    BLOCK: tl.constexpr,
):
    i_h = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(1).to(tl.int64)
    i_row = i_b * tl.num_programs(0) + i_h
    num_pages = tl.load(p_num_pages + i_b * stride_num_b + i_h * stride_num_h)
    n = tl.where(num_pages > 0, (num_pages - 1) * PAGE_SIZE + tl.load(p_last + i_b), 0)
    p_logits += i_b * stride_logits_b + i_h * G * stride_logits_h
    p_pages += i_b * stride_pages_b + i_h * stride_pages_h
    p_threshold += i_row * G
    p_tokens += i_row * width
    sinks = sink_pages * PAGE_SIZE
    newest = (num_pages - recent_pages) * PAGE_SIZE
    kept_before = tl.zeros([], tl.int32)
    for i_first in range(0, n, BLOCK):
        i_t = i_first + tl.arange(0, BLOCK)
        m_row = i_t < n
        b_page = tl.load(p_pages + i_t // PAGE_SIZE, mask=m_row, other=0)  # of all: not to wait for what is kept
        m_kept = (i_t < sinks) | (i_t >= newest) | (p >= 1.0)
        for i_g in tl.static_range(G):
            b_logit = tl.load(p_logits + i_g * stride_logits_h + i_t, mask=m_row, other=float("-inf"))
            m_kept = m_kept | (b_logit >= tl.load(p_threshold + i_g))
        m_kept = m_kept & m_row
        b_kept = m_kept.to(tl.int32)
        b_position = kept_before + tl.cumsum(b_kept, axis=0) - b_kept
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
    """See `distributed_sparse.kernels.top_p.top_p`. Two launches."""
    logits, pages = (x if x.stride(-1) == 1 else x.contiguous() for x in (logits, pages))
    batch, num_q_heads, width = logits.shape
    heads = num_pages.shape[1]
    group = num_q_heads // heads
    tokens = torch.empty(batch, heads, width, dtype=torch.int32, device=logits.device)
    num_tokens = torch.empty(batch, heads, dtype=torch.int32, device=logits.device)
    threshold = torch.empty(batch, num_q_heads, dtype=torch.float32, device=logits.device)
    if num_tokens.numel() == 0:
        return tokens, num_tokens, threshold
    strides = (*logits.stride()[:2], *pages.stride()[:2], *num_pages.stride())
    _top_p_threshold_kernel[(num_q_heads, batch)](
        logits,
        num_pages,
        last_page_len,
        threshold,
        p,
        *strides[:2],
        *strides[4:],
        G=group,
        PAGE_SIZE=page_size,
        SHORT=_ROW_TOKENS[0],
        LONG=_ROW_TOKENS[1],
        num_warps=8,
        enable_fp_fusion=True,
    )
    _top_p_list_kernel[(heads, batch)](
        logits,
        pages,
        num_pages,
        last_page_len,
        threshold,
        tokens,
        num_tokens,
        p,
        width,
        sink_pages,
        recent_pages,
        *strides,
        G=group,
        PAGE_SIZE=page_size,
        BLOCK=_LIST_TOKENS,
        num_warps=8,
        enable_fp_fusion=False,
    )
    return tokens, num_tokens, threshold
