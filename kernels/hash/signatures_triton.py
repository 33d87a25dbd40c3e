"""signatures in Triton: a word is the sum of its 32 signs, each shifted to its bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_WORDS = 64


@triton.jit
def _packed(b_x):
    """int32 [N] words of the signs of [N, 32]."""
    b_place = tl.full([32], 1, tl.uint32) << tl.arange(0, 32).to(tl.uint32)
    b_bits = tl.where(b_x > 0, b_place[None, :], tl.zeros([32], tl.uint32)[None, :])
    return tl.sum(b_bits.to(tl.int32, bitcast=True), axis=1)


# The number of words changes with the batch and must not trigger recompilation.
@triton.jit(do_not_specialize=["num_words"])
def _pack_signs_kernel(p_x, p_words, num_words, BLOCK: tl.constexpr):
    i_w = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_w = i_w < num_words
    b_x = tl.load(p_x + i_w[:, None] * 32 + tl.arange(0, 32)[None, :], mask=m_w[:, None], other=0.0)  # [BLOCK, 32]
    tl.store(p_words + i_w, _packed(b_x), mask=m_w)


# The runs are rows of one transferred table. Their alignment changes with the batch and must not trigger recompilation.
@triton.jit(do_not_specialize_on_alignment=["p_pages", "p_starts", "p_offsets", "p_counts"])
def _append_signatures_kernel(
    p_x,
    p_pages,
    p_starts,
    p_offsets,
    p_counts,
    p_signatures,
    stride_x_n,
    stride_x_h,
    stride_page,
    stride_h,
    stride_s,
    G: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_run = tl.program_id(0)
    i_h = tl.program_id(1).to(tl.int64)
    count = tl.load(p_counts + i_run)
    page = tl.load(p_pages + i_run).to(tl.int64)
    start = tl.load(p_starts + i_run).to(tl.int64)
    offset = tl.load(p_offsets + i_run).to(tl.int64)
    p_signatures += page * stride_page + i_h * stride_h + offset * stride_s
    p_x += start * stride_x_n + i_h * G * stride_x_h
    for i_first in range(0, count * G * W, BLOCK):
        i_w = i_first + tl.arange(0, BLOCK)  # the run's words, token after token
        m_w = i_w < count * G * W
        token, word = i_w // (G * W), i_w % (G * W)
        o_x = token * stride_x_n + word // W * stride_x_h + word % W * 32
        b_x = tl.load(p_x + o_x[:, None] + tl.arange(0, 32)[None, :], mask=m_w[:, None], other=0.0)  # [BLOCK, 32]
        tl.store(p_signatures + token * stride_s + word, _packed(b_x), mask=m_w)


def pack_signs_triton(x: Tensor) -> Tensor:
    """See `pack_signs`."""
    words = torch.empty(*x.shape[:-1], x.shape[-1] // 32, dtype=torch.int32, device=x.device)
    if words.numel():
        grid = (triton.cdiv(words.numel(), _BLOCK_WORDS),)
        _pack_signs_kernel[grid](x.contiguous(), words, words.numel(), BLOCK=_BLOCK_WORDS, num_warps=4, enable_fp_fusion=False)
    return words


def append_signatures_triton(
    x: Tensor, pages: Tensor, starts: Tensor, offsets: Tensor, counts: Tensor, signatures: Tensor
) -> None:
    """See `append_signatures`."""
    if pages.numel() == 0:
        return
    x = x if x.stride(-1) == 1 else x.contiguous()
    group, words = signatures.shape[3:]
    assert signatures.stride(4) == 1 and signatures.stride(3) == words
    _append_signatures_kernel[(pages.numel(), signatures.shape[1])](
        x, pages, starts, offsets, counts, signatures, *x.stride()[:2], *signatures.stride()[:3],
        G=group, W=words, BLOCK=_BLOCK_WORDS, num_warps=4, enable_fp_fusion=False
    )  # fmt: skip
