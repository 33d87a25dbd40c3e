"""residual_statistics in Triton: one program per query head, in three passes over the pilot.

One program per query head rather than per KV head: no padding to 16 rows, a single sequence fills more multiprocessors, and
the keys and values shared by a group come from the L2 cache. "Mean" is over the whole pilot, for the Gram rows too.
Exponentials are relative to the pilot's largest logit until the end: relative to M, fourth powers would underflow where the
chosen part dominates.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from distributed_sparse.kernels.vattention.residual_statistics import GRAM_ROWS, ResidualStatistics

NUM_FIELDS = len(ResidualStatistics._fields)


def launch_shape(head_dim: int, dtype: torch.dtype) -> tuple[int, int, int, int | None]:
    """(tokens per step, Gram rows per tile, num_warps, registers allowed) that spill no register on sm_80 and sm_90.

    By default ptxas targets 80 registers in float32 for higher occupancy, and spills one or two.
    """
    if dtype == torch.float32:
        return (16, 16, 4, None) if head_dim <= 64 else (16, 16, 8, 128)
    return (32, 32, 4, None) if head_dim <= 128 else (16, 32, 8, None)


@triton.jit
def _load_tile(p_x, p_tokens, i_first, count, stride_page, stride_s, PAGE_SIZE: tl.constexpr, D: tl.constexpr,
               BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Rows [BLOCK_N, BLOCK_D] of listed slots, in the cache's dtype; 0 past the list: 0 * NaN is NaN."""
    o_n, o_d = i_first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    slot = tl.load(p_tokens + o_n, mask=o_n < count, other=0)
    o_slot = (slot // PAGE_SIZE).to(tl.int64) * stride_page + slot % PAGE_SIZE * stride_s
    return tl.load(p_x + o_slot[:, None] + o_d[None, :], mask=(o_n < count)[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def _dots(b_x, b_y):
    """[N] of [N, D] rows with one [D] vector, in float32."""
    return tl.sum(b_x.to(tl.float32) * b_y[None, :], axis=1)


# Arguments that change with batch and context must not trigger recompilation.
@triton.jit(
    do_not_specialize=[
        "stride_tokens_b", "stride_tokens_h", "stride_num_tokens_b", "stride_num_tokens_h",
        "stride_residual_b", "stride_residual_h", "rows",
    ],
    do_not_specialize_on_alignment=["p_tokens", "p_num_tokens", "p_num_residual", "p_lse", "p_result"],
)  # fmt: skip
def _residual_statistics_kernel(
    p_q,  # [B, H_q, d]
    p_k,  # [num_pages, H_kv, S, d]
    p_v,
    p_tokens,  # [B, H_kv, T]
    p_num_tokens,  # [B, H_kv]
    p_num_residual,  # [B, H_kv]
    p_out,  # [B, H_q, d]
    p_lse,  # [B, H_q]
    p_result,  # [7, B * H_q]
    scale,
    stride_page,
    stride_h,
    stride_s,
    stride_tokens_b,
    stride_tokens_h,
    stride_num_tokens_b,
    stride_num_tokens_h,
    stride_residual_b,
    stride_residual_h,
    rows,  # B * H_q
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GRAM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CENTRED: tl.constexpr,
):
    i_q, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_h = (i_q // G).to(tl.int64)
    i_row = i_b * tl.num_programs(0) + i_q
    count = tl.load(p_num_tokens + i_b * stride_num_tokens_b + i_h * stride_num_tokens_h)
    num_residual = tl.load(p_num_residual + i_b * stride_residual_b + i_h * stride_residual_h)
    p_tokens += i_b * stride_tokens_b + i_h * stride_tokens_h
    p_k += i_h * stride_h
    p_v += i_h * stride_h
    o_n, o_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_q = tl.load(p_q + i_row * D + o_d, mask=m_d, other=0.0).to(tl.float32) * scale

    # First pass: the largest logit, the sums of w and of w v.
    highest = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    b_sum = tl.zeros([BLOCK_D], tl.float32)
    for i_first in range(0, count, BLOCK_N):
        m_n = i_first + o_n < count
        b_k = _load_tile(p_k, p_tokens, i_first, count, stride_page, stride_s, PAGE_SIZE, D, BLOCK_N, BLOCK_D)
        b_v = _load_tile(p_v, p_tokens, i_first, count, stride_page, stride_s, PAGE_SIZE, D, BLOCK_N, BLOCK_D)
        b_s = tl.where(m_n, _dots(b_k, b_q), float("-inf"))
        new = tl.maximum(highest, tl.max(b_s, axis=0))
        b_w = tl.exp(b_s - new)
        rescale = tl.exp(highest - new)
        total = total * rescale + tl.sum(b_w, axis=0)
        b_sum = b_sum * rescale + tl.sum(b_w[:, None] * b_v.to(tl.float32), axis=0)
        highest = new

    lse = tl.load(p_lse + i_row)
    common = tl.maximum(lse, highest)
    chosen_factor, factor = tl.exp(lse - common), tl.exp(highest - common)
    m = count.to(tl.float32)
    ratio = num_residual.to(tl.float32) / m
    denominator = chosen_factor + ratio * factor * total
    b_out = tl.load(p_out + i_row * D + o_d, mask=m_d, other=0.0)
    b_out = tl.where(lse > float("-inf"), b_out, 0.0)  # out of an empty part may be NaN
    b_numerator = chosen_factor * b_out + ratio * factor * b_sum
    b_c = b_numerator / denominator if CENTRED else tl.zeros([BLOCK_D], tl.float32)
    mean = total / m
    b_y = b_sum / m

    # Second pass: moments of a = w - mean(w), and of |r - mean(r)|^2 with r - mean(r) = w v - a c - y.
    b_a_2, b_a_4 = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    b_r_2, b_r_4 = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    for i_first in range(0, count, BLOCK_N):
        m_n = i_first + o_n < count
        b_k = _load_tile(p_k, p_tokens, i_first, count, stride_page, stride_s, PAGE_SIZE, D, BLOCK_N, BLOCK_D)
        b_v = _load_tile(p_v, p_tokens, i_first, count, stride_page, stride_s, PAGE_SIZE, D, BLOCK_N, BLOCK_D)
        b_w = tl.exp(_dots(b_k, b_q) - highest)
        b_a = tl.where(m_n, b_w - mean, 0.0)
        b_a_2 += b_a * b_a
        b_a_4 += b_a * b_a * b_a * b_a
        b_r = b_w[:, None] * b_v.to(tl.float32) - b_a[:, None] * b_c[None, :] - b_y[None, :]
        b_norm = tl.where(m_n, tl.sum(b_r * b_r, axis=1), 0.0)
        b_r_2 += b_norm
        b_r_4 += b_norm * b_norm
    a_2, a_4 = tl.sum(b_a_2, axis=0), tl.sum(b_a_4, axis=0)
    r_2, r_4 = tl.sum(b_r_2, axis=0), tl.sum(b_r_4, axis=0)
    trace = r_2 / (m - 1)

    # Third pass: the Gram matrix of the first rows, tile by tile: (w_i v_i - t_i) . (w_j v_j - t_j), t = a c + y.
    gram_rows = tl.minimum(count, GRAM)
    c_c, c_y, y_y = tl.sum(b_c * b_c, axis=0), tl.sum(b_c * b_y, axis=0), tl.sum(b_y * b_y, axis=0)
    gram = tl.zeros([], tl.float32)
    for i_first in range(0, gram_rows, BLOCK_R):
        b_k = _load_tile(p_k, p_tokens, i_first, gram_rows, stride_page, stride_s, PAGE_SIZE, D, BLOCK_R, BLOCK_D)
        b_vi = _load_tile(p_v, p_tokens, i_first, gram_rows, stride_page, stride_s, PAGE_SIZE, D, BLOCK_R, BLOCK_D)
        m_i = i_first + tl.arange(0, BLOCK_R) < gram_rows
        b_wi = tl.exp(_dots(b_k, b_q) - highest)
        b_ai = b_wi - mean
        b_ci, b_yi = b_wi * _dots(b_vi, b_c), b_wi * _dots(b_vi, b_y)
        for j_first in range(0, i_first + BLOCK_R, BLOCK_R):  # on and below the diagonal
            b_k = _load_tile(p_k, p_tokens, j_first, gram_rows, stride_page, stride_s, PAGE_SIZE, D, BLOCK_R, BLOCK_D)
            b_vj = _load_tile(p_v, p_tokens, j_first, gram_rows, stride_page, stride_s, PAGE_SIZE, D, BLOCK_R, BLOCK_D)
            m_j = j_first + tl.arange(0, BLOCK_R) < gram_rows
            b_wj = tl.exp(_dots(b_k, b_q) - highest)
            b_aj = b_wj - mean
            b_cj, b_yj = b_wj * _dots(b_vj, b_c), b_wj * _dots(b_vj, b_y)
            b_g = tl.dot(b_vi, tl.trans(b_vj), input_precision="ieee") * b_wi[:, None] * b_wj[None, :]  # [BLOCK_R, BLOCK_R]
            b_g -= b_ci[:, None] * b_aj[None, :] + b_yi[:, None] + b_cj[None, :] * b_ai[:, None] + b_yj[None, :]
            b_g += b_ai[:, None] * b_aj[None, :] * c_c + (b_ai[:, None] + b_aj[None, :]) * c_y + y_y
            b_g = tl.where(m_i[:, None] & m_j[None, :], b_g, 0.0)
            times = tl.where(j_first < i_first, 2.0, 1.0)
            gram += times * tl.sum(tl.sum(b_g * b_g, axis=1), axis=0)
    n = gram_rows.to(tl.float32)
    trace_of_square = tl.maximum(gram / (n * n) - trace * trace / n, trace * trace / D)

    p_result += i_row
    square = factor * factor
    tl.store(p_result, denominator)
    tl.store(p_result + rows, tl.sum(b_numerator * b_numerator, axis=0))
    tl.store(p_result + 2 * rows, square * (a_2 / (m - 1)))
    tl.store(p_result + 3 * rows, tl.where(a_2 > 0, m * a_4 / (a_2 * a_2), 1.0))
    tl.store(p_result + 4 * rows, square * trace)
    tl.store(p_result + 5 * rows, square * square * trace_of_square)
    tl.store(p_result + 6 * rows, tl.where(r_2 > 0, m * r_4 / (r_2 * r_2), 1.0))


def residual_statistics_triton(q, k_pages, v_pages, tokens, num_tokens, num_residual, partial, scale, *, centred):
    """See `residual_statistics`."""
    batch, num_q_heads, dim = q.shape
    _, heads, page_size, _ = k_pages.shape
    assert k_pages.is_contiguous() and v_pages.is_contiguous(), "K and V caches must be contiguous: they are never copied"
    assert tokens.stride(2) == 1, "token lists must have stride 1 in the last dimension"
    rows = batch * num_q_heads
    result = torch.empty(NUM_FIELDS, rows, dtype=torch.float32, device=q.device)
    block_n, block_r, num_warps, registers = launch_shape(dim, q.dtype)
    _residual_statistics_kernel[num_q_heads, batch](
        q.contiguous(), k_pages, v_pages, tokens, num_tokens, num_residual, partial[0].contiguous(), partial[1].contiguous(),
        result, scale, *k_pages.stride()[:3], *tokens.stride()[:2], *num_tokens.stride(), *num_residual.stride(), rows,
        G=num_q_heads // heads, D=dim, BLOCK_D=triton.next_power_of_2(dim), BLOCK_N=block_n, BLOCK_R=block_r, GRAM=GRAM_ROWS,
        PAGE_SIZE=page_size, CENTRED=centred, num_warps=num_warps, num_stages=2, maxnreg=registers, enable_fp_fusion=True
    )  # fmt: skip
    return ResidualStatistics(*result.view(NUM_FIELDS, batch, num_q_heads).unbind(0))
