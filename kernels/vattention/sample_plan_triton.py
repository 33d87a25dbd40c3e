"""sample_plan in Triton: one program per (sequence, KV head), one launch instead of eighty small ones."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from distributed_sparse.kernels.vattention.sample_plan import GUARANTEES, MIN_PILOT, ROUND_TO, SamplePlan
from distributed_sparse.kernels.vattention.sample_plan_torch import bound_quantiles

_BLOCK_ROWS = 128


# Arguments that change with the batch must not trigger recompilation.
@triton.jit(
    do_not_specialize=["rows", "heads", "stride_chosen_b", "stride_chosen_h"],
    do_not_specialize_on_alignment=["p_chosen", "p_context", "p_pilot"],
)
def _plan_pilot_kernel(
    p_chosen,
    p_context,
    p_residual,
    p_pilot,
    rows,
    heads,
    stride_chosen_b,
    stride_chosen_h,
    BLOCK_TOKENS: tl.constexpr,
    BASE_FRACTION: tl.constexpr,
    MIN_PILOT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_row = i_row < rows
    i_b, i_h = i_row // heads, i_row % heads
    b_n = tl.load(p_context + i_b, mask=m_row, other=0)
    b_chosen = tl.load(p_chosen + i_b * stride_chosen_b + i_h * stride_chosen_h, mask=m_row, other=0)
    b_missing = (BLOCK_TOKENS - b_n % BLOCK_TOKENS) % BLOCK_TOKENS  # of the newest block
    b_residual = b_n - b_chosen * BLOCK_TOKENS + tl.where(b_chosen > 0, b_missing, 0)
    # in float64, as on the host: a float argument of a kernel would be rounded to float32
    b_share = tl.ceil(b_residual.to(tl.float64) * tl.full([BLOCK], BASE_FRACTION, tl.float64)).to(tl.int32)
    b_pilot = tl.minimum(tl.maximum(b_share, MIN_PILOT), b_residual)
    tl.store(p_residual + i_row, b_residual, mask=m_row)
    tl.store(p_pilot + i_row, tl.where(b_residual >= 2 * MIN_PILOT, b_pilot, 0), mask=m_row)


def plan_pilot_triton(
    num_chosen: Tensor, context_lens: Tensor, *, block_tokens: int, base_fraction: float
) -> tuple[Tensor, Tensor]:
    """See `plan_pilot`."""
    batch, heads = num_chosen.shape
    residual, pilot = torch.empty(2, batch, heads, dtype=torch.int32, device=num_chosen.device).unbind(0)
    if batch:
        _plan_pilot_kernel[(triton.cdiv(batch * heads, _BLOCK_ROWS),)](
            num_chosen, context_lens, residual, pilot, batch * heads, heads, num_chosen.stride(0), num_chosen.stride(1),
            BLOCK_TOKENS=block_tokens, BASE_FRACTION=base_fraction, MIN_PILOT=MIN_PILOT, BLOCK=_BLOCK_ROWS,
            enable_fp_fusion=False
        )  # fmt: skip
    return residual, pilot


@triton.jit
def _at_least(b_x, low):
    """max(b_x, low); NaN propagates, as in torch."""
    return tl.where(b_x < low, low, b_x)


@triton.jit
def _raised(b_variance, b_kurtosis, b_m, Z99: tl.constexpr):
    """About the 99% upper bound of a variance estimated from m draws."""
    return b_variance * (1.0 + Z99 * tl.sqrt_rn(tl.div_rn(_at_least(b_kurtosis - 1.0, 0.0), b_m)))


@triton.jit
def _denominator_size(b_variance, b_denominator, b_n, EPSILON: tl.constexpr, Z: tl.constexpr):
    b_root = tl.div_rn(Z * b_n, EPSILON * b_denominator)
    return b_root * b_root * b_variance


@triton.jit(
    do_not_specialize=[
        "heads", "stride_stat_b", "stride_lse_b", "stride_chosen_b", "stride_chosen_h", "min_context", "max_sample",
    ],
    do_not_specialize_on_alignment=[
        "p_denominator", "p_norm_sq", "p_variance", "p_weight_kurtosis", "p_trace", "p_trace_of_square", "p_kurtosis", "p_lse",
        "p_chosen", "p_residual", "p_pilot", "p_num_pages", "p_context",
    ],
)  # fmt: skip
def _plan_samples_kernel(
    p_denominator,
    p_norm_sq,
    p_variance,
    p_weight_kurtosis,
    p_trace,
    p_trace_of_square,
    p_kurtosis,
    p_lse,
    p_chosen,
    p_residual,
    p_pilot,
    p_num_pages,
    p_context,
    p_counts,  # [5, B, H_kv]
    p_log_weight,
    p_out_lse,
    heads,
    stride_stat_b,
    stride_lse_b,
    stride_chosen_b,
    stride_chosen_h,
    min_context,
    max_sample,
    GUARANTEE: tl.constexpr,
    EPSILON: tl.constexpr,
    Z: tl.constexpr,  # quantile for the denominator
    Z_OUT: tl.constexpr,  # quantile for the output or the numerator
    Z99: tl.constexpr,
    ROUND_TO: tl.constexpr,
    G: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    i_row = tl.program_id(0)
    i_b, i_h = i_row // heads, i_row % heads
    n = tl.load(p_context + i_b)
    residual = tl.load(p_residual + i_row)
    pilot = tl.load(p_pilot + i_row)
    o_g = tl.arange(0, BLOCK_G)
    m_g = o_g < G
    o_stat = i_b * stride_stat_b + i_h * G + o_g
    b_denominator = tl.load(p_denominator + o_stat, mask=m_g, other=1.0)
    b_n = tl.full([BLOCK_G], 0.0, tl.float32) + residual.to(tl.float32)
    b_m = tl.full([BLOCK_G], 0.0, tl.float32) + pilot.to(tl.float32)

    b_size = tl.zeros([BLOCK_G], tl.float32)
    if GUARANTEE != 0:
        b_variance = tl.load(p_variance + o_stat, mask=m_g, other=0.0)
        b_variance = _raised(b_variance, tl.load(p_weight_kurtosis + o_stat, mask=m_g, other=1.0), b_m, Z99)
        b_size = _denominator_size(b_variance, b_denominator, b_n, EPSILON if GUARANTEE == 1 else EPSILON / 4, Z)
    if GUARANTEE != 1:
        b_trace = tl.load(p_trace + o_stat, mask=m_g, other=0.0)
        b_of_square = tl.load(p_trace_of_square + o_stat, mask=m_g, other=1.0)
        b_factor = tl.full([BLOCK_G], 1.0, tl.float32)
        if GUARANTEE == 0:
            b_factor = tl.div_rn(b_factor, b_denominator)
        # ||factor N||^2 without the pilot's own noise, at about its 99% lower bound; not positive: treated as unknown
        b_scaled = (b_factor * b_n) * (b_factor * b_n)
        b_noise = tl.div_rn(b_scaled, b_m) * (1.0 - tl.div_rn(b_m, b_n))
        b_scatter = Z99 * b_noise * tl.sqrt_rn(2.0 * b_of_square)
        b_norm_sq = b_factor * b_factor * tl.load(p_norm_sq + o_stat, mask=m_g, other=1.0) - b_noise * b_trace - b_scatter
        b_spread = _raised(b_trace, tl.load(p_kurtosis + o_stat, mask=m_g, other=1.0), b_m, Z99) * b_scaled
        if GUARANTEE == 0:
            b_nu = tl.div_rn(b_trace * b_trace, b_of_square)
            b_nu = tl.where(b_nu == b_nu, tl.maximum(b_nu, 1.0), 1.0)  # 0 / 0: both squares underflow
            b_part = tl.div_rn(tl.full([BLOCK_G], 2.0, tl.float32), 9.0 * b_nu)
            b_root = _at_least(1.0 - b_part + Z_OUT * tl.sqrt_rn(b_part), 0.0)
            b_needed = tl.div_rn(b_root * b_root * b_root * b_spread, EPSILON * EPSILON * b_norm_sq)
        else:
            b_needed = tl.div_rn(Z_OUT * Z_OUT * b_spread, (EPSILON / 4) * (EPSILON / 4) * b_norm_sq)
        b_needed = tl.where(b_norm_sq > 0, b_needed, float("inf"))
        b_needed = tl.where(b_trace == 0, 0.0, b_needed)  # all r are equal: any sample is exact
        b_larger = tl.where(b_size < b_needed, b_needed, b_size)
        b_size = tl.where(b_needed == b_needed, b_larger, b_needed)
    b_size = tl.where(b_size < float("inf"), tl.div_rn(b_size, 1.0 + tl.div_rn(b_size, b_n)), float("inf"))  # NaN: infinity too

    needed = tl.max(tl.where(m_g, b_size, 0.0), axis=0)
    needed = tl.minimum(tl.maximum(needed, pilot.to(tl.float32)), residual.to(tl.float32))
    budget = tl.minimum((tl.ceil(needed / ROUND_TO) * ROUND_TO).to(tl.int32), residual)
    chosen = n - residual
    fits = (pilot > 0) & (2 * (chosen + budget) <= n) & (n >= min_context) & (budget <= max_sample)
    num_counts = tl.num_programs(0)
    p_counts += i_row
    tl.store(p_counts, budget)
    tl.store(p_counts + num_counts, tl.where(fits, budget, 0))
    tl.store(p_counts + 2 * num_counts, tl.where(fits, 0, tl.load(p_num_pages + i_b)))
    listed = tl.load(p_chosen + i_b * stride_chosen_b + i_h * stride_chosen_h)
    tl.store(p_counts + 3 * num_counts, tl.where(fits, listed, 0))
    tl.store(p_counts + 4 * num_counts, pilot + tl.where(fits, 0, chosen))
    tl.store(p_log_weight + i_row, tl.log(residual.to(tl.float32) / tl.maximum(budget, 1).to(tl.float32)))
    b_lse = tl.load(p_lse + i_b * stride_lse_b + i_h * G + o_g, mask=m_g, other=0.0)
    tl.store(p_out_lse + i_row * G + o_g, tl.where(fits, b_lse, float("-inf")), mask=m_g)


def plan_samples_triton(
    statistics, lse, num_chosen, num_residual, num_pilot, num_pages, context_lens, *, guarantee, epsilon, delta, min_context,
    max_sample
):  # fmt: skip
    """See `plan_samples`."""
    batch, heads = num_residual.shape
    group = lse.shape[1] // heads
    assert all(x.stride() == statistics[0].stride() for x in statistics) and statistics[0].stride(1) == lse.stride(1) == 1
    num_residual, num_pilot = num_residual.contiguous(), num_pilot.contiguous()
    counts = torch.empty(5, batch, heads, dtype=torch.int32, device=lse.device)
    log_weight = torch.empty(batch, heads, dtype=torch.float32, device=lse.device)
    of_dense = torch.empty(batch, heads * group, dtype=torch.float32, device=lse.device)
    if batch:
        z, z_out, z99 = bound_quantiles(guarantee, delta)
        _plan_samples_kernel[(batch * heads,)](
            *statistics, lse, num_chosen, num_residual, num_pilot, num_pages, context_lens, counts, log_weight, of_dense,
            heads, statistics[0].stride(0), lse.stride(0), num_chosen.stride(0), num_chosen.stride(1), min_context,
            torch.iinfo(torch.int32).max if max_sample is None else max_sample,
            GUARANTEE=GUARANTEES.index(guarantee), EPSILON=epsilon, Z=z, Z_OUT=z_out, Z99=z99, ROUND_TO=ROUND_TO, G=group,
            BLOCK_G=triton.next_power_of_2(group), num_warps=1, enable_fp_fusion=False
        )  # fmt: skip
    budget, num_samples, of_pages, of_chosen, extra_tokens_read = counts.unbind(0)
    return SamplePlan(budget, num_samples, log_weight, of_pages, of_dense, of_chosen, extra_tokens_read)
