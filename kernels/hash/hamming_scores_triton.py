"""hamming_scores in Triton: one program per (tile of tokens, KV head, sequence)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_WORDS = 2048
"""Signature words per program."""


@triton.jit
def _popcount(b_x):
    """Ones of each uint32: sums of two, four and eight neighbours, then of the four bytes."""
    b_x -= (b_x >> 1) & 0x55555555
    b_x = (b_x & 0x33333333) + ((b_x >> 2) & 0x33333333)
    b_x = (b_x + (b_x >> 4)) & 0x0F0F0F0F
    return ((b_x * 0x01010101) >> 24).to(tl.int32)


# Arguments that change with batch and context must not trigger recompilation.
@triton.jit(
    do_not_specialize=["width", "stride_table_b"],
    do_not_specialize_on_alignment=["p_table", "p_context_lens", "p_scores"],
)
def _hamming_scores_kernel(
    p_q,  # [B, H_q, W]
    p_signatures,  # [num_pages, H_kv, S, G, W]
    p_table,  # [B, P]
    p_context_lens,  # [B]
    p_scores,  # [B, H_kv, width]
    width,
    stride_page,
    stride_h,
    stride_table_b,
    PAGE_SIZE: tl.constexpr,
    WORDS: tl.constexpr,  # G * W
    WORDS_PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    i_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    i_h, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    i_b = tl.program_id(2).to(tl.int64)
    m_t = i_t < tl.load(p_context_lens + i_b)
    o_w = tl.arange(0, WORDS_PADDED)
    b_q = tl.load(p_q + (i_b * heads + i_h) * WORDS + o_w, mask=o_w < WORDS, other=0)
    b_page = tl.load(p_table + i_b * stride_table_b + i_t // PAGE_SIZE, mask=m_t, other=0).to(tl.int64)
    o_token = b_page * stride_page + i_h * stride_h + i_t % PAGE_SIZE * WORDS
    m_word = m_t[:, None] & (o_w < WORDS)[None, :]
    b_k = tl.load(p_signatures + o_token[:, None] + o_w[None, :], mask=m_word, other=0)  # [BLOCK_T, WORDS_PADDED]
    b_differ = tl.where(m_word, b_q[None, :] ^ b_k, 0).to(tl.uint32, bitcast=True)
    b_score = 32 * WORDS - tl.sum(_popcount(b_differ), axis=1)
    o_row = (i_b * heads + i_h) * width
    tl.store(p_scores + o_row + i_t, tl.where(m_t, b_score, -1), mask=i_t < width)


def hamming_scores_triton(q_signatures: Tensor, signatures: Tensor, page_table: Tensor, context_lens: Tensor) -> Tensor:
    """See `hamming_scores`."""
    page_table = page_table if page_table.stride(-1) == 1 else page_table.contiguous()
    _, heads, page_size, group, words = signatures.shape
    assert signatures[0, 0].is_contiguous(), "the signatures of a page and KV head must be contiguous"
    batch, width = len(page_table), page_table.shape[1] * page_size
    scores = torch.empty(batch, heads, width, dtype=torch.int32, device=signatures.device)
    if scores.numel() == 0:
        return scores
    words_padded = triton.next_power_of_2(group * words)
    block_tokens = _BLOCK_WORDS // words_padded
    _hamming_scores_kernel[(triton.cdiv(width, block_tokens), heads, batch)](
        q_signatures.contiguous(), signatures, page_table, context_lens, scores, width, signatures.stride(0),
        signatures.stride(1), page_table.stride(0),
        PAGE_SIZE=page_size, WORDS=group * words, WORDS_PADDED=words_padded, BLOCK_T=block_tokens, num_warps=4,
        enable_fp_fusion=False
    )  # fmt: skip
    return scores
