"""append in Triton: one program per (run, KV head) writes the run's tokens and folds them into its page's min and max."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK_TOKENS = 16


# The runs are rows of one transferred table: where they start changes with the batch, and must not compile anew.
@triton.jit(do_not_specialize_on_alignment=["p_pages", "p_starts", "p_offsets", "p_counts"])
def _append_kernel(
    p_k,
    p_v,
    p_pages,
    p_starts,
    p_offsets,
    p_counts,
    p_k_pages,
    p_v_pages,
    p_min_max,
    stride_k_n,
    stride_k_h,
    stride_v_n,
    stride_v_h,
    stride_kp_page,
    stride_kp_h,
    stride_kp_s,
    stride_vp_page,
    stride_vp_h,
    stride_vp_s,
    stride_mm_page,
    stride_mm_h,
    stride_mm_m,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_MIN_MAX: tl.constexpr,
):
    i_run = tl.program_id(0)
    i_h = tl.program_id(1).to(tl.int64)
    count = tl.load(p_counts + i_run)
    if count == 0:
        return
    page = tl.load(p_pages + i_run).to(tl.int64)
    start = tl.load(p_starts + i_run).to(tl.int64)
    offset = tl.load(p_offsets + i_run).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    p_k += start * stride_k_n + i_h * stride_k_h
    p_v += start * stride_v_n + i_h * stride_v_h
    p_k_pages += page * stride_kp_page + i_h * stride_kp_h + offset * stride_kp_s
    p_v_pages += page * stride_vp_page + i_h * stride_vp_h + offset * stride_vp_s

    dtype: tl.constexpr = p_k_pages.dtype.element_ty
    b_low = tl.full([BLOCK_D], float("inf"), tl.float32)
    b_high = tl.full([BLOCK_D], float("-inf"), tl.float32)
    for i_first in range(0, count, BLOCK_T):
        i_t = i_first + tl.arange(0, BLOCK_T)
        mask = (i_t < count)[:, None] & m_d[None, :]
        b_k = tl.load(p_k + i_t[:, None] * stride_k_n + o_d[None, :], mask=mask, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_D]
        b_k = b_k + 0.0  # -0.0 becomes +0.0
        b_v = tl.load(p_v + i_t[:, None] * stride_v_n + o_d[None, :], mask=mask, other=0.0)
        tl.store(p_k_pages + i_t[:, None] * stride_kp_s + o_d[None, :], b_k.to(dtype), mask=mask)
        tl.store(p_v_pages + i_t[:, None] * stride_vp_s + o_d[None, :], b_v, mask=mask)
        if HAS_MIN_MAX:
            b_low = tl.minimum(b_low, tl.min(tl.where(mask, b_k, float("inf")), axis=0))
            b_high = tl.maximum(b_high, tl.max(tl.where(mask, b_k, float("-inf")), axis=0))

    if HAS_MIN_MAX:
        p_low = p_min_max + page * stride_mm_page + i_h * stride_mm_h + o_d
        p_high = p_low + stride_mm_m
        if offset > 0:  # a run from offset 0 starts the page anew
            b_low = tl.minimum(b_low, tl.load(p_low, mask=m_d, other=0.0).to(tl.float32))
            b_high = tl.maximum(b_high, tl.load(p_high, mask=m_d, other=0.0).to(tl.float32))
        tl.store(p_low, b_low.to(dtype), mask=m_d)
        tl.store(p_high, b_high.to(dtype), mask=m_d)


def append_triton(
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    starts: Tensor,
    offsets: Tensor,
    counts: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_min_max: Tensor | None = None,
) -> None:
    """See `distributed_sparse.kernels.append.append`."""
    if pages.numel() == 0:
        return
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    assert k_pages.stride(-1) == v_pages.stride(-1) == 1
    assert page_min_max is None or page_min_max.stride(-1) == 1
    dim = k.shape[-1]
    _append_kernel[(pages.numel(), k.shape[1])](
        k,
        v,
        pages,
        starts,
        offsets,
        counts,
        k_pages,
        v_pages,
        page_min_max,
        *k.stride()[:2],
        *v.stride()[:2],
        *k_pages.stride()[:3],
        *v_pages.stride()[:3],
        *((0, 0, 0) if page_min_max is None else page_min_max.stride()[:3]),
        D=dim,
        BLOCK_T=_BLOCK_TOKENS,
        BLOCK_D=triton.next_power_of_2(dim),
        HAS_MIN_MAX=page_min_max is not None,
        num_warps=4,
        enable_fp_fusion=False,
    )
