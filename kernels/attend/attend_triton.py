"""attend and combine in Triton: split-K over chunks of a row's lists, then a merge in index order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from distributed_sparse.kernels.attend.attend import CHUNK_TOKENS

GROUP_PADDED = tl.constexpr(16)
"""tl.dot needs 16 rows: smaller groups of query heads are padded."""

PROGRAMS_PER_SM = 2
"""Programs launched per multiprocessor; the chunks are distributed among them."""

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


def attend_triton(
    q, k_pages, v_pages, pages, num_pages, last_page_len, scale, *, tokens=None, num_tokens=None, log_weight=None,
    partial=None, return_lse=False
):  # fmt: skip
    """See `attend`. Two launches; the grid does not depend on the counts."""
    batch, num_q_heads, head_dim = q.shape
    _, num_kv_heads, page_size, _ = k_pages.shape
    num_rows, group = batch * num_kv_heads, num_q_heads // num_kv_heads
    assert k_pages.is_contiguous() and v_pages.is_contiguous(), "K and V caches must be contiguous: they are never copied"
    assert group <= GROUP_PADDED.value
    assert pages.stride(2) == 1 and (tokens is None or tokens.stride(2) == 1), "lists must have stride 1 in the last dimension"

    capacity = triton.cdiv(pages.shape[2] * page_size, CHUNK_TOKENS)
    if tokens is not None:
        capacity += triton.cdiv(tokens.shape[2], CHUNK_TOKENS)
    outs = torch.empty(num_rows, capacity, group, head_dim, dtype=torch.float32, device=q.device)
    lses = torch.empty(num_rows, capacity, group, dtype=torch.float32, device=q.device)
    num_partials = torch.empty(num_rows, dtype=torch.int32, device=q.device)
    block_n, num_warps, num_stages = launch_shape(head_dim, q.dtype)
    _attend_kernel[num_rows, programs_per_row(num_rows, capacity, q.device)](
        q.contiguous(), k_pages, v_pages, pages, num_pages, last_page_len, tokens, num_tokens,
        log_weight.contiguous() if log_weight is not None else None, outs, lses, num_partials, *pages.stride()[:2],
        *num_pages.stride(), *(tokens.stride()[:2] if tokens is not None else (0, 0)),
        *(num_tokens.stride() if num_tokens is not None else (0, 0)), num_kv_heads, capacity, scale,
        PAGE_SIZE=page_size, GROUP=group, HEAD_DIM=head_dim, HEAD_DIM_PADDED=triton.next_power_of_2(head_dim),
        CHUNK=CHUNK_TOKENS, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True
    )  # fmt: skip
    if partial is not None:
        partial = (partial[0].reshape(num_rows, group, head_dim), partial[1].reshape(num_rows, group))
    out, lse = _combine(outs, lses, num_partials, partial, torch.float32 if return_lse else q.dtype)
    out = out.view(batch, num_q_heads, head_dim)
    return (out, lse.view(batch, num_q_heads)) if return_lse else out


def combine_triton(
    outs: Tensor, lses: Tensor, num_partials: Tensor, partial: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """See `combine_torch`."""
    return _combine(outs.contiguous(), lses.contiguous(), num_partials, partial, torch.float32)


def programs_per_row(num_rows: int, capacity: int, device: torch.device) -> int:
    """Programs per row. May depend on batch and device: which program computes a chunk does not affect the bits."""
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    return max(min(PROGRAMS_PER_SM * num_sms // num_rows, capacity), 1)


def launch_shape(head_dim: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(BLOCK_N, num_warps, num_stages): large tiles that spill no register on sm_80 and sm_90."""
    if dtype == torch.float32:
        return (16, 4, 3) if head_dim <= 64 else (16, 8, 3)
    return (64, 4, 3) if head_dim <= 128 else (32, 4, 3)


def _combine(
    outs: Tensor, lses: Tensor, num_partials: Tensor, partial: tuple[Tensor, Tensor] | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    num_rows, capacity, group, head_dim = outs.shape
    out = torch.empty(num_rows, group, head_dim, dtype=dtype, device=outs.device)
    lse = torch.empty(num_rows, group, dtype=torch.float32, device=outs.device)
    partial_out, partial_lse = (partial[0].contiguous(), partial[1].contiguous()) if partial is not None else (None, None)
    _combine_kernel[num_rows, group](
        outs, lses, num_partials, partial_out, partial_lse, out, lse, capacity,
        GROUP=group, HEAD_DIM=head_dim, HEAD_DIM_PADDED=triton.next_power_of_2(head_dim), BLOCK_C=64, num_warps=1,
        enable_fp_fusion=True
    )  # fmt: skip
    return out, lse


# Arguments that change with batch and context (widths, addresses of index tables) must not trigger recompilation.
@triton.jit(
    do_not_specialize=[
        "stride_pages_b", "stride_pages_h", "stride_num_pages_b", "stride_num_pages_h",
        "stride_tokens_b", "stride_tokens_h", "stride_num_tokens_b", "stride_num_tokens_h", "num_kv_heads", "capacity",
    ],
    do_not_specialize_on_alignment=["pages", "num_pages", "last_page_len", "tokens", "num_tokens", "log_weight"],
)  # fmt: skip
def _attend_kernel(
    q,  # [R, GROUP, d]
    k,  # [num_pages, H_kv, S, d]
    v,
    pages,  # [B, H_kv, P]
    num_pages,  # [B, H_kv]
    last_page_len,  # [B]
    tokens,  # [B, H_kv, T] | None
    num_tokens,  # [B, H_kv] | None
    log_weight,  # [R] | None
    outs,  # [R, capacity, GROUP, d]
    lses,  # [R, capacity, GROUP]
    num_partials,  # [R]
    stride_pages_b,
    stride_pages_h,
    stride_num_pages_b,
    stride_num_pages_h,
    stride_tokens_b,
    stride_tokens_h,
    stride_num_tokens_b,
    stride_num_tokens_h,
    num_kv_heads,
    capacity,
    scale,
    PAGE_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (row, p) attends chunks p, p + P, p + 2P, ... of its row and writes one normalised partial result per chunk."""
    i_row = tl.program_id(0).to(tl.int64)
    i_p, num_programs = tl.program_id(1), tl.num_programs(1)
    i_b, i_h = i_row // num_kv_heads, i_row % num_kv_heads

    o_g, o_d = tl.arange(0, GROUP_PADDED), tl.arange(0, HEAD_DIM_PADDED)
    m_q = (o_g < GROUP)[:, None] & (o_d < HEAD_DIM)[None, :]
    b_q = tl.load(q + (i_row * GROUP + o_g)[:, None] * HEAD_DIM + o_d[None, :], mask=m_q, other=0.0)  # [16, D]

    listed = tl.load(num_pages + i_b * stride_num_pages_b + i_h * stride_num_pages_h)
    page_tokens = tl.where(listed > 0, (listed - 1) * PAGE_SIZE + tl.load(last_page_len + i_b), 0)
    page_chunks = tl.cdiv(page_tokens, CHUNK)
    p_list = pages + i_b * stride_pages_b + i_h * stride_pages_h
    p_out, p_lse = outs + i_row * capacity * GROUP * HEAD_DIM, lses + i_row * capacity * GROUP
    for i_c in range(i_p, page_chunks, num_programs):
        _attend_chunk(
            b_q, k, v, p_list, i_c * CHUNK, tl.minimum(page_tokens - i_c * CHUNK, CHUNK), i_h, num_kv_heads, scale, 0.0,
            p_out + i_c * GROUP * HEAD_DIM, p_lse + i_c * GROUP,
            False, PAGE_SIZE, GROUP, HEAD_DIM, HEAD_DIM_PADDED, BLOCK_N,
        )  # fmt: skip

    num_chunks = page_chunks
    if tokens is not None:
        listed = tl.load(num_tokens + i_b * stride_num_tokens_b + i_h * stride_num_tokens_h)
        num_chunks += tl.cdiv(listed, CHUNK)
        b_log_weight = 0.0
        if log_weight is not None:
            b_log_weight = tl.load(log_weight + i_row)
        p_list = tokens + i_b * stride_tokens_b + i_h * stride_tokens_h
        # This program's first token chunk: chunks are numbered pages first.
        i_first = i_p + tl.cdiv(tl.maximum(page_chunks - i_p, 0), num_programs) * num_programs
        for i_c in range(i_first, num_chunks, num_programs):
            begin = (i_c - page_chunks) * CHUNK
            _attend_chunk(
                b_q, k, v, p_list, begin, tl.minimum(listed - begin, CHUNK), i_h, num_kv_heads, scale, b_log_weight,
                p_out + i_c * GROUP * HEAD_DIM, p_lse + i_c * GROUP,
                True, PAGE_SIZE, GROUP, HEAD_DIM, HEAD_DIM_PADDED, BLOCK_N,
            )  # fmt: skip
    if i_p == 0:
        tl.store(num_partials + i_row, num_chunks)


@triton.jit
def _attend_chunk(
    b_q,  # [16, D]
    k,
    v,
    p_list,  # the row's page ids, or its token slots
    begin,  # the chunk's first token, counted along the list
    length,  # its tokens, at least 1
    i_h,
    num_kv_heads,
    scale,
    log_weight,
    p_out,
    p_lse,
    IS_TOKENS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One chunk's online softmax (arXiv 2205.14135) in base 2. Masked entries are loaded as 0, since 0 * NaN is NaN."""
    o_g, o_d = tl.arange(0, GROUP_PADDED), tl.arange(0, HEAD_DIM_PADDED)
    b_max = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    b_sum = tl.zeros([GROUP_PADDED], tl.float32)
    b_acc = tl.zeros([GROUP_PADDED, HEAD_DIM_PADDED], tl.float32)
    for start in range(0, length, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < length
        if IS_TOKENS:
            slot = tl.load(p_list + begin + o_n, mask=m_n, other=0)
            page, offset = slot // PAGE_SIZE, slot % PAGE_SIZE
        else:
            page = tl.load(p_list + (begin + o_n) // PAGE_SIZE, mask=m_n, other=0)
            offset = (begin + o_n) % PAGE_SIZE
        o_kv = ((page.to(tl.int64) * num_kv_heads + i_h) * PAGE_SIZE + offset) * HEAD_DIM  # [BN]
        if HEAD_DIM == HEAD_DIM_PADDED:
            b_k = tl.load(k + o_kv[None, :] + o_d[:, None], mask=m_n[None, :], other=0.0)  # [D, BN]
            b_v = tl.load(v + o_kv[:, None] + o_d[None, :], mask=m_n[:, None], other=0.0)  # [BN, D]
        else:
            m_d = o_d < HEAD_DIM
            b_k = tl.load(k + o_kv[None, :] + o_d[:, None], mask=m_n[None, :] & m_d[:, None], other=0.0)
            b_v = tl.load(v + o_kv[:, None] + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)
        b_s = tl.dot(b_q, b_k, input_precision="ieee") * (scale * LOG2_E)  # [16, BN]
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None])
        b_scale = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_scale + tl.sum(b_p, 1)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_scale[:, None], input_precision="ieee")
        b_max = b_new
    m_g = o_g < GROUP
    m_out = m_g[:, None] & (o_d < HEAD_DIM)[None, :]
    tl.store(p_out + o_g[:, None] * HEAD_DIM + o_d[None, :], b_acc / b_sum[:, None], mask=m_out)
    # The log weight is equal for all tokens of the chunk: it changes the lse, not the output.
    tl.store(p_lse + o_g, (b_max + tl.log2(b_sum)) * LN_2 + log_weight, mask=m_g)


@triton.jit(do_not_specialize=["capacity"], do_not_specialize_on_alignment=["num_partials", "partial_lse"])
def _combine_kernel(
    outs,  # [R, capacity, GROUP, d]
    lses,  # [R, capacity, GROUP]
    num_partials,  # [R]
    partial_out,  # [R, GROUP, d] | None
    partial_lse,  # [R, GROUP] | None
    out,  # [R, GROUP, d]
    lse,  # [R, GROUP]
    capacity,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Program (row, query head of the group) sums partial results one by one in index order, the given partial last."""
    i_row, i_g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_out = i_row * GROUP + i_g
    count = tl.minimum(tl.load(num_partials + i_row), capacity)
    p_lse = lses + i_row * capacity * GROUP + i_g
    o_d = tl.arange(0, HEAD_DIM_PADDED)
    m_d = o_d < HEAD_DIM
    p_out = outs + (i_row * capacity * GROUP + i_g) * HEAD_DIM + o_d

    b_highest = tl.full([BLOCK_C], float("-inf"), tl.float32)
    for start in range(0, count, BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C)
        b_highest = tl.maximum(b_highest, tl.load(p_lse + o_c * GROUP, mask=o_c < count, other=float("-inf")))
    highest = tl.max(b_highest, 0)
    last_lse = float("-inf")
    if partial_lse is not None:
        last_lse = tl.load(partial_lse + i_out)
        highest = tl.maximum(highest, last_lse)
    highest = tl.where(highest == float("-inf"), 0.0, highest)

    b_acc = tl.zeros([HEAD_DIM_PADDED], tl.float32)
    total = 0.0
    for i_c in tl.range(0, count, loop_unroll_factor=8):
        part_lse = tl.load(p_lse + i_c * GROUP)
        weight = tl.exp(part_lse - highest)
        b_part = tl.load(p_out + i_c * GROUP * HEAD_DIM, mask=m_d, other=0.0)
        b_acc += tl.where(part_lse > float("-inf"), weight * b_part, 0.0)  # an empty partial's output may be NaN
        total += weight
    if partial_out is not None:
        weight = tl.exp(last_lse - highest)
        b_part = tl.load(partial_out + i_out * HEAD_DIM + o_d, mask=m_d, other=0.0)
        b_acc += tl.where(last_lse > float("-inf"), weight * b_part, 0.0)
        total += weight
    is_empty = total == 0
    divisor = tl.where(is_empty, 1.0, total)
    tl.store(out + i_out * HEAD_DIM + o_d, (b_acc / divisor).to(out.dtype.element_ty), mask=m_d)
    tl.store(lse + i_out, tl.where(is_empty, float("-inf"), highest + tl.log(divisor)))
