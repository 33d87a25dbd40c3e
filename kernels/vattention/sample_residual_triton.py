"""sample_residual in Triton: one program per (block of samples, row)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from distributed_sparse.kernels.philox import SAMPLE_RESIDUAL
from distributed_sparse.kernels.vattention.sample_residual import MIN_WIDTH

_BLOCK_SAMPLES = 256


@triton.jit
def _feistel_round(b_high, b_low, key, high_mask):
    """(L, R) -> (R, L ^ f(R)); f is lowbias32 of R ^ key, masked to the width of L."""
    b_mixed = b_low ^ key
    b_mixed ^= b_mixed >> 16
    b_mixed *= 0x7FEB352D
    b_mixed ^= b_mixed >> 15
    b_mixed *= 0x846CA68B
    b_mixed ^= b_mixed >> 16
    return b_low, b_high ^ (b_mixed & high_mask)


@triton.jit
def _permute(b_x, low_bits, high_mask, low_mask, k0, k1, k2, k3, k4, k5, k6, k7):
    """Apply all rounds once, on [0, 2^w)."""
    b_high, b_low = b_x >> low_bits, b_x & low_mask
    b_high, b_low = _feistel_round(b_high, b_low, k0, high_mask)
    b_high, b_low = _feistel_round(b_high, b_low, k1, low_mask)
    b_high, b_low = _feistel_round(b_high, b_low, k2, high_mask)
    b_high, b_low = _feistel_round(b_high, b_low, k3, low_mask)
    b_high, b_low = _feistel_round(b_high, b_low, k4, high_mask)
    b_high, b_low = _feistel_round(b_high, b_low, k5, low_mask)
    b_high, b_low = _feistel_round(b_high, b_low, k6, high_mask)
    b_high, b_low = _feistel_round(b_high, b_low, k7, low_mask)
    return (b_high << low_bits) | b_low


# Arguments that change with batch, context and layer must not trigger recompilation.
@triton.jit(
    do_not_specialize=[
        "heads", "stride_chosen_b", "stride_chosen_h", "stride_num_chosen_b", "stride_num_chosen_h", "stride_table_b",
        "stride_num_samples_b", "stride_num_samples_h", "stride_key", "stride_key_b", "use", "first_kv_head", "capacity",
    ],
    do_not_specialize_on_alignment=[
        "p_chosen", "p_num_chosen", "p_table", "p_context_lens", "p_num_samples", "p_key", "p_slots",
    ],
)  # fmt: skip
def _sample_residual_kernel(
    p_chosen,  # [B, H_kv, F]
    p_num_chosen,  # [B, H_kv]
    p_table,  # [B, P]
    p_context_lens,  # [B]
    p_num_samples,  # [B, H_kv]
    p_key,  # int64 [4, B]
    p_slots,  # [B * H_kv, capacity]
    heads,
    stride_chosen_b,
    stride_chosen_h,
    stride_num_chosen_b,
    stride_num_chosen_h,
    stride_table_b,
    stride_num_samples_b,
    stride_num_samples_h,
    stride_key,
    stride_key_b,
    use,  # SAMPLE_RESIDUAL | draw << 4 | layer << 8
    first_kv_head,
    capacity,
    BLOCK_TOKENS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    MIN_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_row // heads, i_row % heads
    first = tl.program_id(0) * BLOCK
    count = tl.load(p_num_samples + i_b * stride_num_samples_b + i_h * stride_num_samples_h)
    if first >= count:
        return
    num_chosen = tl.load(p_num_chosen + i_b * stride_num_chosen_b + i_h * stride_num_chosen_h)
    num_residual = (tl.cdiv(tl.load(p_context_lens + i_b), BLOCK_TOKENS) - num_chosen) * BLOCK_TOKENS

    p_key += i_b * stride_key_b
    seed = tl.load(p_key) | (tl.load(p_key + stride_key) << 32)
    sample_index = tl.load(p_key + 2 * stride_key).to(tl.uint32)
    position = tl.load(p_key + 3 * stride_key).to(tl.uint32)
    c3 = use.to(tl.uint32) | ((first_kv_head + i_h).to(tl.uint32) << 20)
    c0 = tl.zeros([], tl.uint32)
    k0, k1, k2, k3 = tl.philox(seed, c0, sample_index, position, c3)
    k4, k5, k6, k7 = tl.philox(seed, c0 + 1, sample_index, position, c3)

    width = tl.sum(((num_residual - 1) >> tl.arange(0, 32) > 0).to(tl.int32), axis=0)  # bit length of n_s - 1
    width = tl.maximum(width, MIN_BITS)
    high_bits = (width // 2).to(tl.uint32)
    low_bits = (width - width // 2).to(tl.uint32)
    one = tl.full([], 1, tl.uint32)
    high_mask, low_mask = (one << high_bits) - 1, (one << low_bits) - 1

    limit = num_residual.to(tl.uint32)
    i_s = first + tl.arange(0, BLOCK)
    m_s = i_s < count
    b_x = _permute(i_s.to(tl.uint32), low_bits, high_mask, low_mask, k0, k1, k2, k3, k4, k5, k6, k7)
    m_walking = m_s & (b_x >= limit)  # a start at or past n_s might never walk into range
    while tl.max(m_walking.to(tl.int32), axis=0) > 0:
        b_next = _permute(b_x, low_bits, high_mask, low_mask, k0, k1, k2, k3, k4, k5, k6, k7)
        b_x = tl.where(m_walking, b_next, b_x)
        m_walking = m_s & (b_x >= limit)

    # chosen[j] - j unchosen blocks precede chosen block j. The number of j with chosen[j] - j <= rank is the number of chosen
    # blocks before the rank-th unchosen block; find it by binary search.
    b_rank = b_x.to(tl.int32)
    b_block_rank = b_rank // BLOCK_TOKENS
    p_chosen += i_b * stride_chosen_b + i_h * stride_chosen_h
    b_from = tl.zeros([BLOCK], tl.int32)
    b_to = b_from + num_chosen
    open_steps = num_chosen
    while open_steps > 0:
        b_middle = (b_from + b_to) // 2
        m_open = m_s & (b_from < b_to)
        b_before = tl.load(p_chosen + b_middle, mask=m_open, other=0) - b_middle
        m_right = b_before <= b_block_rank
        b_from = tl.where(m_open & m_right, b_middle + 1, b_from)
        b_to = tl.where(m_open & ~m_right, b_middle, b_to)
        open_steps = open_steps // 2
    b_position = (b_block_rank + b_from) * BLOCK_TOKENS + b_rank % BLOCK_TOKENS
    b_page = tl.load(p_table + i_b * stride_table_b + b_position // PAGE_SIZE, mask=m_s, other=0)
    tl.store(p_slots + i_row * capacity + i_s, b_page * PAGE_SIZE + b_position % PAGE_SIZE, mask=m_s)


def sample_residual_triton(
    chosen, num_chosen, page_table, context_lens, num_samples, random_key, *, block_tokens, page_size, layer, first_kv_head,
    draw, capacity
):  # fmt: skip
    """See `sample_residual`."""
    chosen, page_table = (x if x.stride(-1) == 1 else x.contiguous() for x in (chosen, page_table))
    batch, heads, _ = chosen.shape
    slots = torch.empty(batch, heads, capacity, dtype=torch.int32, device=chosen.device)
    if slots.numel() == 0:
        return slots
    _sample_residual_kernel[(triton.cdiv(capacity, _BLOCK_SAMPLES), batch * heads)](
        chosen, num_chosen, page_table, context_lens, num_samples, random_key, slots, heads, *chosen.stride()[:2],
        *num_chosen.stride(), page_table.stride(0), *num_samples.stride(), *random_key.stride(),
        SAMPLE_RESIDUAL | draw << 4 | layer << 8, first_kv_head, capacity,
        BLOCK_TOKENS=block_tokens, PAGE_SIZE=page_size, MIN_BITS=MIN_WIDTH, BLOCK=_BLOCK_SAMPLES, num_warps=4,
        enable_fp_fusion=False
    )  # fmt: skip
    return slots
