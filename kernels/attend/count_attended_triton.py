"""count_attended in Triton: one launch with one program per KV head, so each counter has one writer."""

from __future__ import annotations

import triton
import triton.language as tl

_BLOCK_ROWS = 128


# Arguments that change with the batch, the layer and the method's lists must not trigger recompilation.
@triton.jit(
    do_not_specialize=[
        "batch", "stride_np_b", "stride_np_h", "stride_nt_b", "stride_nt_h",
        "stride_pp_b", "stride_pp_h", "stride_pt_b", "stride_pt_h", "stride_er_b", "stride_er_h",
    ],
    do_not_specialize_on_alignment=[
        "p_attended", "p_sparse", "p_total_extra", "p_num_pages", "p_last_page_len", "p_context_lens",
        "p_num_tokens", "p_partial_pages", "p_partial_tokens", "p_extra_read",
    ],
)  # fmt: skip
def _count_attended_kernel(
    p_attended,  # [H_kv]
    p_sparse,  # [H_kv]
    p_total_extra,  # [H_kv]
    p_num_pages,  # [B, H_kv]
    p_last_page_len,  # [B]
    p_context_lens,  # [B]
    p_num_tokens,  # [B, H_kv] | None, like the next three
    p_partial_pages,
    p_partial_tokens,
    p_extra_read,
    batch,
    stride_np_b,
    stride_np_h,
    stride_nt_b,
    stride_nt_h,
    stride_pp_b,
    stride_pp_h,
    stride_pt_b,
    stride_pt_h,
    stride_er_b,
    stride_er_h,
    PAGE_SIZE: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    i_h = tl.program_id(0)
    b_attended = tl.zeros([BLOCK_B], tl.int64)
    b_sparse = tl.zeros([BLOCK_B], tl.int32)
    b_extra = tl.zeros([BLOCK_B], tl.int64)
    for i_first in range(0, batch, BLOCK_B):
        i_b = i_first + tl.arange(0, BLOCK_B)
        b_context = tl.load(p_context_lens + i_b, mask=i_b < batch, other=0)
        m_b = b_context > 0  # a padded row's counts are undefined
        b_missing = PAGE_SIZE - tl.load(p_last_page_len + i_b, mask=m_b, other=PAGE_SIZE)
        b_read = _tokens_of_pages(p_num_pages + i_b * stride_np_b + i_h * stride_np_h, b_missing, m_b, PAGE_SIZE)
        if p_num_tokens is not None:
            b_read += tl.load(p_num_tokens + i_b * stride_nt_b + i_h * stride_nt_h, mask=m_b, other=0)
        if p_partial_pages is not None:
            b_read += _tokens_of_pages(p_partial_pages + i_b * stride_pp_b + i_h * stride_pp_h, b_missing, m_b, PAGE_SIZE)
        if p_partial_tokens is not None:
            b_read += tl.load(p_partial_tokens + i_b * stride_pt_b + i_h * stride_pt_h, mask=m_b, other=0)
        if p_extra_read is not None:
            b_extra += tl.load(p_extra_read + i_b * stride_er_b + i_h * stride_er_h, mask=m_b, other=0)
        b_attended += b_read
        b_sparse += (m_b & (b_read < b_context)).to(tl.int32)
    tl.store(p_attended + i_h, tl.load(p_attended + i_h) + tl.sum(b_attended, axis=0))
    tl.store(p_sparse + i_h, tl.load(p_sparse + i_h) + tl.sum(b_sparse, axis=0))
    if p_extra_read is not None:
        tl.store(p_total_extra + i_h, tl.load(p_total_extra + i_h) + tl.sum(b_extra, axis=0))


@triton.jit
def _tokens_of_pages(p_listed, b_missing, m_b, PAGE_SIZE: tl.constexpr):
    """int32 tokens of the listed pages; the last page lacks b_missing tokens."""
    b_listed = tl.load(p_listed, mask=m_b, other=0)
    return b_listed * PAGE_SIZE - tl.where(b_listed > 0, b_missing, 0)


def count_attended_triton(
    tokens_attended, sparse_rows, total_extra_tokens, num_pages, last_page_len, context_lens, page_size, *, num_tokens=None,
    partial_num_pages=None, partial_num_tokens=None, extra_tokens_read=None
):  # fmt: skip
    """See `count_attended`."""
    batch, heads = num_pages.shape
    counters = (tokens_attended, sparse_rows, total_extra_tokens)
    assert all(counter.is_contiguous() for counter in counters)
    assert last_page_len.stride(0) == context_lens.stride(0) == 1 or batch <= 1
    lists = (num_pages, num_tokens, partial_num_pages, partial_num_tokens, extra_tokens_read)
    _count_attended_kernel[(heads,)](
        *counters, num_pages, last_page_len, context_lens, num_tokens, partial_num_pages, partial_num_tokens,
        extra_tokens_read, batch, *(stride for counts in lists for stride in ((0, 0) if counts is None else counts.stride())),
        PAGE_SIZE=page_size, BLOCK_B=_BLOCK_ROWS, num_warps=4, enable_fp_fusion=False
    )  # fmt: skip
