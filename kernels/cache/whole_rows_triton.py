"""whole_rows in Triton: one launch instead of five."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_ROWS = 128


# Arguments that change with the batch must not trigger recompilation.
@triton.jit(
    do_not_specialize=["rows", "heads", "stride_tokens_b", "stride_tokens_h", "min_context"],
    do_not_specialize_on_alignment=["p_num_tokens", "p_num_pages", "p_context_lens", "p_tokens_out"],
)
def _whole_rows_kernel(
    p_num_tokens,
    p_num_pages,
    p_context_lens,
    p_pages_out,
    p_tokens_out,
    rows,
    heads,
    stride_tokens_b,
    stride_tokens_h,
    min_context,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_row = i_row < rows
    i_b, i_h = i_row // heads, i_row % heads
    b_tokens = tl.load(p_num_tokens + i_b * stride_tokens_b + i_h * stride_tokens_h, mask=m_row, other=0)
    b_context = tl.load(p_context_lens + i_b, mask=m_row, other=0)
    m_whole = (b_tokens >= b_context) | (b_context < min_context)
    b_pages = tl.load(p_num_pages + i_b, mask=m_row, other=0)
    tl.store(p_pages_out + i_row, tl.where(m_whole, b_pages, 0), mask=m_row)
    tl.store(p_tokens_out + i_row, tl.where(m_whole, 0, b_tokens), mask=m_row)


def whole_rows_triton(
    num_tokens: Tensor, num_pages: Tensor, context_lens: Tensor, min_context: int = 0
) -> tuple[Tensor, Tensor]:
    """See `whole_rows`."""
    batch, heads = num_tokens.shape
    pages, tokens = torch.empty(2, batch, heads, dtype=torch.int32, device=num_tokens.device).unbind(0)
    if batch:
        _whole_rows_kernel[(triton.cdiv(batch * heads, _BLOCK_ROWS),)](
            num_tokens, num_pages, context_lens, pages, tokens, batch * heads, heads, num_tokens.stride(0),
            num_tokens.stride(1), min_context,
            BLOCK=_BLOCK_ROWS, enable_fp_fusion=False
        )  # fmt: skip
    return pages, tokens
