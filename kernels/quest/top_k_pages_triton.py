"""top_k_pages in Triton: one program per row; radix select finds the k-th score, running counts build the list."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK_PAGES = 1024
"""Pages per step. The same for every context length: each value would need its own compilation."""


@triton.jit
def _ordered(b_score):
    """Order-preserving uint32 image of float32 (-0.0 and +0.0 are one value), or of a count, which is its own image."""
    if b_score.dtype == tl.int32:
        return b_score.to(tl.uint32, bitcast=True)
    b_bits = (b_score + 0.0).to(tl.int32, bitcast=True)
    # Positive: set the sign bit. Negative: flip every bit.
    return (b_bits ^ ((b_bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


# Arguments that change with batch and context must not trigger recompilation.
@triton.jit(
    do_not_specialize=["stride_scores_b", "stride_scores_h", "stride_table_b", "capacity", "sink_pages", "recent_pages"],
    do_not_specialize_on_alignment=["p_table", "p_num_pages", "p_k"],
)
def _top_k_pages_kernel(
    p_scores,
    p_table,
    p_num_pages,
    p_k,
    p_pages,
    p_counts,
    heads,
    stride_scores_b,
    stride_scores_h,
    stride_table_b,
    capacity,
    sink_pages,
    recent_pages,
    BLOCK: tl.constexpr,
    DIGITS: tl.constexpr,  # digits of eight bits in an image
):
    i_row = tl.program_id(0)
    i_b = (i_row // heads).to(tl.int64)
    i_h = (i_row % heads).to(tl.int64)
    p_scores += i_b * stride_scores_b + i_h * stride_scores_h
    p_table += i_b * stride_table_b
    p_pages += i_row.to(tl.int64) * capacity
    n = tl.load(p_num_pages + i_b)
    count = tl.minimum(tl.load(p_k + i_b), n)
    # Forced pages: all pages if the row keeps everything; else the newest first, then the sinks, up to k.
    recent = tl.where(count == n, n, tl.minimum(count, recent_pages))
    sinks = tl.minimum(count - recent, sink_pages)
    newest = n - recent
    wanted = count - recent - sinks
    oldest = tl.where(wanted > 0, sinks, newest)  # candidates are the pages oldest..newest-1; none where none is wanted

    # The wanted-th best candidate, eight bits at a time from the top: `prefix` holds the bits found so far, `room` how many
    # pages with this prefix are still to be taken.
    prefix = tl.zeros([], tl.uint32)
    room = wanted
    o_bin = tl.arange(0, 256)
    if wanted > 0:
        for i_pass in tl.static_range(DIGITS):
            shift = 8 * (DIGITS - 1 - i_pass)
            b_hist = tl.zeros([256], tl.int32)
            for i_first in range(0, newest, BLOCK):
                i_p = i_first + tl.arange(0, BLOCK)
                m_p = (i_p >= oldest) & (i_p < newest)
                b_key = _ordered(tl.load(p_scores + i_p, mask=m_p, other=0))
                if i_pass > 0:
                    m_p = m_p & ((b_key >> (shift + 8)) == (prefix >> (shift + 8)))
                b_digit = tl.where(m_p, (b_key >> shift) & 0xFF, 0).to(tl.int32)
                b_hist += tl.histogram(b_digit, 256)
                b_hist -= tl.where(o_bin == 0, tl.sum(1 - m_p.to(tl.int32), axis=0), 0)  # masked lanes were counted in bin 0
            b_above = tl.sum(b_hist, axis=0) - tl.cumsum(b_hist, axis=0)  # [256] pages with a larger digit
            m_bin = (b_above < room) & (b_above + b_hist >= room)  # exactly one bin
            digit = tl.sum(tl.where(m_bin, o_bin, 0), axis=0)
            room -= tl.sum(tl.where(m_bin, b_above, 0), axis=0)
            prefix = prefix | (digit.to(tl.uint32) << shift)

    ties_before = tl.zeros([], tl.int32)
    taken_before = tl.zeros([], tl.int32)
    for i_first in range(0, n, BLOCK):
        i_p = i_first + tl.arange(0, BLOCK)
        m_forced = (i_p < sinks) | ((i_p >= newest) & (i_p < n))
        m_candidate = (i_p >= oldest) & (i_p < newest)
        b_key = _ordered(tl.load(p_scores + i_p, mask=m_candidate, other=0))
        b_tie = (m_candidate & (b_key == prefix)).to(tl.int32)
        b_tie_rank = ties_before + tl.cumsum(b_tie, axis=0)  # from 1, lower pages first
        m_taken = m_forced | (m_candidate & (b_key > prefix)) | ((b_tie > 0) & (b_tie_rank <= room))
        b_taken = m_taken.to(tl.int32)
        b_position = taken_before + tl.cumsum(b_taken, axis=0) - b_taken
        b_page = tl.load(p_table + i_p, mask=m_taken, other=0)
        tl.store(p_pages + b_position, b_page, mask=m_taken)
        ties_before += tl.sum(b_tie, axis=0)
        taken_before += tl.sum(b_taken, axis=0)
    tl.store(p_counts + i_row, count)


def top_k_pages_triton(scores, page_table, num_pages, k, *, sink_pages, recent_pages, capacity):
    """See `top_k_pages`."""
    scores, page_table = (x if x.stride(-1) == 1 else x.contiguous() for x in (scores, page_table))
    batch, heads, _ = scores.shape
    pages = torch.empty(batch, heads, capacity, dtype=torch.int32, device=scores.device)
    counts = torch.empty(batch, heads, dtype=torch.int32, device=scores.device)
    if counts.numel() == 0:
        return pages, counts
    _top_k_pages_kernel[(batch * heads,)](
        scores, page_table, num_pages, k, pages, counts, heads, scores.stride(0), scores.stride(1), page_table.stride(0),
        capacity, sink_pages, recent_pages,
        BLOCK=_BLOCK_PAGES, DIGITS=2 if scores.dtype == torch.int32 else 4, num_warps=4, enable_fp_fusion=False
    )  # fmt: skip
    return pages, counts
