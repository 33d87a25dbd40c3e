"""prefill_attend in Triton: tiles of (query token, query head of the group) over blocks of paged keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


def prefill_attend_triton(q, k_pages, v_pages, page_table, query_start, context_lens, scale, max_query_len):
    """See `prefill_attend`."""
    _, num_q_heads, head_dim = q.shape
    _, num_kv_heads, page_size, _ = k_pages.shape
    group = num_q_heads // num_kv_heads
    assert k_pages.is_contiguous() and v_pages.is_contiguous(), "K and V caches must be contiguous: they are never copied"
    assert page_table.stride(1) == 1, "the page table must have stride 1 in the last dimension"

    q = q.contiguous()
    out = torch.empty_like(q)
    block_m, block_n, num_warps, num_stages = launch_shape(head_dim, q.dtype)
    _prefill_attend_kernel[triton.cdiv(max_query_len * group, block_m), num_kv_heads, len(context_lens)](
        q, k_pages, v_pages, page_table, query_start, context_lens, out, page_table.stride(0), num_kv_heads, scale,
        PAGE_SIZE=page_size, GROUP=group, HEAD_DIM=head_dim, HEAD_DIM_PADDED=triton.next_power_of_2(head_dim),
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True
    )  # fmt: skip
    return out


def launch_shape(head_dim: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_N, num_warps, num_stages): large tiles that spill no register on sm_80 and sm_90."""
    if head_dim <= 64:
        return (32, 16, 4, 2) if dtype == torch.float32 else (128, 64, 8, 2)
    if head_dim <= 128:
        return (32, 16, 8, 2) if dtype == torch.float32 else (128, 32, 8, 3)
    return (16, 16, 4, 2) if dtype == torch.float32 else (64, 32, 8, 2)


# Arguments that change with chunks and context must not trigger recompilation.
@triton.jit(
    do_not_specialize=["stride_table", "num_kv_heads"],
    do_not_specialize_on_alignment=["page_table", "query_start", "context_lens"],
)
def _prefill_attend_kernel(
    q,  # [N, H_q, d]
    k,  # [num_pages, H_kv, S, d]
    v,
    page_table,  # [R, P]
    query_start,  # [R + 1]
    context_lens,  # [R]
    out,  # [N, H_q, d]
    stride_table,
    num_kv_heads,
    scale,
    PAGE_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (tile, kv head, chunk). Row m of a chunk is its token m // GROUP and the group's query head m % GROUP."""
    i_m = tl.num_programs(0) - 1 - tl.program_id(0)  # the last tiles see the most keys, so they start first
    i_h, i_r = tl.program_id(1), tl.program_id(2)
    first_query = tl.load(query_start + i_r)
    num_queries = tl.load(query_start + i_r + 1) - first_query
    if i_m * BLOCK_M >= num_queries * GROUP:
        return
    context_len = tl.load(context_lens + i_r)

    o_m, o_d = i_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, HEAD_DIM_PADDED)
    o_token = o_m // GROUP
    m_q = (o_token < num_queries)[:, None] & (o_d < HEAD_DIM)[None, :]
    o_head = (first_query + o_token).to(tl.int64) * (num_kv_heads * GROUP) + i_h * GROUP + o_m % GROUP
    o_q = o_head[:, None] * HEAD_DIM + o_d[None, :]
    b_q = tl.load(q + o_q, mask=m_q, other=0.0)  # [BM, D]
    o_position = context_len - num_queries + o_token  # [BM]

    # Every token of the tile sees the keys that its first token sees: only later blocks need a mask.
    first_position = context_len - num_queries + i_m * BLOCK_M // GROUP
    last_position = tl.minimum(context_len - num_queries + (i_m * BLOCK_M + BLOCK_M - 1) // GROUP, context_len - 1)
    unmasked = (first_position + 1) // BLOCK_N * BLOCK_N

    p_table = page_table + i_r.to(tl.int64) * stride_table
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, HEAD_DIM_PADDED], tl.float32)
    for start in range(0, unmasked, BLOCK_N):
        b_max, b_sum, b_acc = _attend_block(
            b_q, k, v, p_table, start, context_len, o_position, i_h, num_kv_heads, scale, b_max, b_sum, b_acc,
            False, PAGE_SIZE, HEAD_DIM, HEAD_DIM_PADDED, BLOCK_N,
        )  # fmt: skip
    for start in range(unmasked, last_position + 1, BLOCK_N):
        b_max, b_sum, b_acc = _attend_block(
            b_q, k, v, p_table, start, context_len, o_position, i_h, num_kv_heads, scale, b_max, b_sum, b_acc,
            True, PAGE_SIZE, HEAD_DIM, HEAD_DIM_PADDED, BLOCK_N,
        )  # fmt: skip
    tl.store(out + o_q, (b_acc / b_sum[:, None]).to(out.dtype.element_ty), mask=m_q)


@triton.jit
def _attend_block(
    b_q,  # [BM, D]
    k,
    v,
    p_table,  # the sequence's page ids
    start,  # the block's first position
    context_len,
    o_position,  # [BM]
    i_h,
    num_kv_heads,
    scale,
    b_max,  # [BM]
    b_sum,  # [BM]
    b_acc,  # [BM, D]
    IS_MASKED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One step of the online softmax (arXiv 2205.14135) in base 2. Slots past the context load as 0: 0 * NaN is NaN."""
    o_n, o_d = start + tl.arange(0, BLOCK_N), tl.arange(0, HEAD_DIM_PADDED)
    m_n = o_n < context_len if IS_MASKED else o_n >= 0
    page = tl.load(p_table + o_n // PAGE_SIZE, mask=m_n, other=0)
    o_kv = ((page.to(tl.int64) * num_kv_heads + i_h) * PAGE_SIZE + o_n % PAGE_SIZE) * HEAD_DIM  # [BN]
    m_kv = m_n[:, None] & (o_d < HEAD_DIM)[None, :]
    b_k = tl.load(k + o_kv[:, None] + o_d[None, :], mask=m_kv, other=0.0)  # [BN, D]
    b_v = tl.load(v + o_kv[:, None] + o_d[None, :], mask=m_kv, other=0.0)  # [BN, D]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * (scale * LOG2_E)  # [BM, BN]
    if IS_MASKED:
        b_s = tl.where(m_n[None, :] & (o_n[None, :] <= o_position[:, None]), b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_p = tl.exp2(b_s - b_new[:, None])
    b_scale = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_scale + tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_scale[:, None], input_precision="ieee")
    return b_new, b_sum, b_acc
