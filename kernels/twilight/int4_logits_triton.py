"""int4_logits in Triton: one program per (tile of tokens, KV head, sequence) unpacks codes into an operand of tl.dot."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_MAX_GROUP = 16
_BLOCK_TOKENS = 64
_BLOCK_WORDS = 16
"""Four-byte words of codes per token and step: one load of four threads, which hold a row of a tensor-core operand."""

_BLOCK_BYTES = {2: 32, 4: 16}
"""Bytes of codes per token and step, by q's itemsize: with float32, 32 bytes would take half of all registers."""


@triton.jit
def _pairs(b_words, power, START: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """2 ** BITS + code, for the codes at bit START of each word's halves, by OR-ing codes into the mantissa of ``power``."""
    MANTISSA: tl.constexpr = 7 if dtype == tl.bfloat16 else 10
    PLACE: tl.constexpr = MANTISSA - BITS
    FIELD: tl.constexpr = ((1 << BITS) - 1 << PLACE) * 0x10001
    b_shifted = b_words << (PLACE - START) if START <= PLACE else b_words >> (START - PLACE)
    b_pair = (b_shifted & FIELD) | power
    b_low, b_high = b_pair.to(tl.uint16), (b_pair >> 16).to(tl.uint16)
    return tl.join(b_low.to(dtype, bitcast=True), b_high.to(dtype, bitcast=True))  # [BLOCK_T, BLOCK_W, 2]


@triton.jit
def _dot_words(
    p_q,
    p_codes,
    m_g,
    m_t,
    power,
    D: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """q . codes [BLOCK_T, BLOCK_G] and sum(q) [BLOCK_G] for 16-bit q, without the slow conversions from integers.

    The channels of a step are ordered so that the words a thread loads are exactly its fragment of the operand. Any other order
    would move all numbers through shared memory.
    """
    dtype: tl.constexpr = p_q.dtype.element_ty
    bytes_per_token: tl.constexpr = D * BITS // 8
    runs: tl.constexpr = BLOCK_W // 4
    p_words = p_codes.to(tl.pointer_type(tl.uint32))
    o_w = tl.arange(0, BLOCK_W)
    i_k = tl.arange(0, 4 * BLOCK_W)  # byte 4 (4 run + word) + 2 half + odd of the step is at [word, odd, run, half]
    o_k = i_k // 2 % runs * 16 + i_k // (4 * runs) * 4 + i_k % 2 * 2 + i_k // (2 * runs) % 2
    b_dot = tl.zeros([BLOCK_T, BLOCK_G], tl.float32)
    b_ones = tl.full([16, 4 * BLOCK_W], 1.0, dtype)  # sum(q) as one more product with equal rows: fewer instructions
    b_sums = tl.zeros([16, BLOCK_G], tl.float32)
    for i_w in tl.static_range(0, bytes_per_token, 4 * BLOCK_W):
        m_w = i_w // 4 + o_w < bytes_per_token // 4
        m_k = i_w + o_k < bytes_per_token
        b_words = tl.load(p_words + i_w // 4 + o_w[None, :], mask=m_t[:, None] & m_w[None, :], other=0)
        for i_part in tl.static_range(8 // BITS):
            b_q = tl.load(p_q + i_part * bytes_per_token + i_w + o_k[:, None], mask=m_g & m_k[:, None], other=0.0)
            b_even = _pairs(b_words, power, i_part * BITS, BITS, dtype)
            b_odd = _pairs(b_words, power, i_part * BITS + 8, BITS, dtype)
            b_numbers = tl.join(b_even, b_odd).reshape(BLOCK_T, runs, 4, 2, 2).permute(0, 2, 4, 1, 3)
            b_dot = tl.dot(b_numbers.reshape(BLOCK_T, 4 * BLOCK_W), b_q, acc=b_dot)  # q . (2 ** BITS + code)
            b_sums = tl.dot(b_ones, b_q, acc=b_sums)
    b_sum = tl.max(b_sums, axis=0)
    return b_dot - (1 << BITS) * b_sum[None, :], b_sum


@triton.jit
def _dot_bytes(
    p_q,
    p_codes,
    m_g,
    m_t,
    D: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """q . codes [BLOCK_T, BLOCK_G] and sum(q) [BLOCK_G] for any dtype, number of bits and alignment."""
    dtype: tl.constexpr = p_q.dtype.element_ty
    bytes_per_token: tl.constexpr = D * BITS // 8
    o_w = tl.arange(0, BLOCK_W)
    b_dot = tl.zeros([BLOCK_T, BLOCK_G], tl.float32)
    b_sums = tl.zeros([BLOCK_W, BLOCK_G], tl.float32)  # reduced after the loop: the compiler fails on a loop-carried sum
    for i_w in range(0, bytes_per_token, BLOCK_W):
        m_w = i_w + o_w < bytes_per_token
        b_codes = tl.load(p_codes + i_w + o_w[None, :], mask=m_t[:, None] & m_w[None, :], other=0)
        for i_part in tl.static_range(8 // BITS):
            p_part = p_q + i_part * bytes_per_token + i_w + o_w[:, None]
            b_q = tl.load(p_part, mask=m_g & m_w[:, None], other=0.0)
            b_part = (b_codes >> (i_part * BITS)) & ((1 << BITS) - 1)
            # Codes are exact in every dtype of q. TF32, the default for float32, would round q.
            b_dot = tl.dot(b_part.to(dtype), b_q, acc=b_dot, input_precision="ieee")
            b_sums += b_q.to(tl.float32)
    return b_dot, tl.sum(b_sums, axis=0)


# Arguments that change with batch and context must not trigger recompilation; strides of q and
# the codes are fixed per engine.
@triton.jit(
    do_not_specialize=["power", "width", "stride_pages_b", "stride_pages_h", "stride_num_b", "stride_num_h"],
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
    power,
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
    IN_WORDS: tl.constexpr,
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
    m_g = (o_g < G)[None, :]
    o_page = i_b * stride_pages_b + i_h * stride_pages_h + i_t // PAGE_SIZE
    page = tl.load(p_pages + o_page, mask=m_t, other=0).to(tl.int64)
    slot = i_t % PAGE_SIZE
    p_q += i_b * stride_q_b + (i_h * G + o_g)[None, :] * stride_q_h  # [1, BLOCK_G]
    p_codes += (page * stride_c_page + i_h * stride_c_h + slot * stride_c_s)[:, None]  # [BLOCK_T, 1]
    p_scales += page * stride_sc_page + i_h * stride_sc_h + slot * stride_sc_s

    if IN_WORDS:
        b_dot, b_sum = _dot_words(p_q, p_codes, m_g, m_t, power, D, BITS, BLOCK_G, BLOCK_T, BLOCK_W)
    else:
        b_dot, b_sum = _dot_bytes(p_q, p_codes, m_g, m_t, D, BITS, BLOCK_G, BLOCK_T, BLOCK_W)
    b_scale = tl.load(p_scales, mask=m_t, other=0.0).to(tl.float32)
    b_minimum = tl.load(p_scales + 1, mask=m_t, other=0.0).to(tl.float32)
    b_logit = scale * (b_scale[:, None] * b_dot + b_sum[None, :] * b_minimum[:, None])
    o_row = (i_b * tl.num_programs(1) + i_h) * G + o_g
    m_out = m_g & (i_t < width)[:, None]
    tl.store(p_logits + o_row[None, :] * width + i_t[:, None], tl.where(m_t[:, None], b_logit, float("-inf")), mask=m_out)


def int4_logits_triton(q, key_codes, key_scales, pages, num_pages, last_page_len, scale):
    """See `int4_logits`."""
    q, pages = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, pages))
    assert key_codes.stride(-1) == key_scales.stride(-1) == 1
    batch, num_q_heads, dim = q.shape
    _, heads, page_size, bytes_per_token = key_codes.shape
    bits = 8 * bytes_per_token // dim
    group = num_q_heads // heads
    width = pages.shape[2] * page_size
    logits = torch.empty(batch, num_q_heads, width, dtype=torch.float32, device=q.device)
    if logits.numel() == 0:
        return logits
    assert group <= _MAX_GROUP
    places = (bytes_per_token, key_codes.data_ptr(), *key_codes.stride()[:3])
    in_words = q.element_size() == 2 and bits < 8 and all(n % 4 == 0 for n in places)
    # 2 ** bits in q's dtype, in both halves. A run-time argument: with a constant, AND and OR are not fused.
    power = (127 + bits << 7 if q.dtype == torch.bfloat16 else 15 + bits << 10) * 0x10001
    if in_words:
        words = bytes_per_token // 4  # fewer than eight words: less padding
        block = _BLOCK_WORDS if words >= 8 else max(4, triton.next_power_of_2(words))
    else:
        block = min(triton.next_power_of_2(bytes_per_token), _BLOCK_BYTES[q.element_size()])
    _int4_logits_kernel[(triton.cdiv(width, _BLOCK_TOKENS), heads, batch)](
        q,
        key_codes,
        key_scales,
        pages,
        num_pages,
        last_page_len,
        logits,
        scale,
        power,
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
        BITS=bits,
        PAGE_SIZE=page_size,
        IN_WORDS=in_words,
        BLOCK_G=8 if group <= 8 else 16,  # columns of a tensor-core product
        BLOCK_T=_BLOCK_TOKENS,
        BLOCK_W=block,
        num_warps=1 if in_words else 4,  # one warp computes all rows of the product
        num_stages=3,
        enable_fp_fusion=False,
    )
    return logits
