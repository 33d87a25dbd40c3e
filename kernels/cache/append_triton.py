"""append in Triton: one program per (run, KV head) writes the run's tokens, their low-bit copy, and its page's min and max.

For `rotary_append`, a second program per (run, KV head) rotates the queries of the head's group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_APPEND_SHAPE = (16, 4)
_ROTARY_SHAPE = (8, 8)
"""(rows of a tile, warps) without register spills. A row is a token of a run, or a (token, query head of the group) pair."""


# The runs are rows of one transferred table. Their alignment changes with the batch and must not trigger recompilation.
@triton.jit(do_not_specialize_on_alignment=["p_pages", "p_starts", "p_offsets", "p_counts"])
def _append_kernel(
    p_q,  # [N, H_q, d]; with p_cos, else None
    p_k,
    p_v,
    p_cos,  # [N, d/2] | None: k is rotated already
    p_sin,
    p_q_out,  # [N, H_q, d], contiguous; with p_cos
    p_k_out,  # [N, H_kv, d], contiguous, | None
    p_pages,
    p_starts,
    p_offsets,
    p_counts,
    p_k_pages,
    p_v_pages,
    p_min_max,
    p_codes,
    p_scales,
    p_offset,
    stride_q_n,
    stride_q_h,
    stride_k_n,
    stride_k_h,
    stride_v_n,
    stride_v_h,
    stride_cos_n,
    stride_sin_n,
    stride_kp_page,
    stride_kp_h,
    stride_kp_s,
    stride_vp_page,
    stride_vp_h,
    stride_vp_s,
    stride_mm_page,
    stride_mm_h,
    stride_mm_m,
    stride_c_page,
    stride_c_h,
    stride_c_s,
    stride_sc_page,
    stride_sc_h,
    stride_sc_s,
    stride_o_h,
    H_KV: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_MIN_MAX: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
):
    i_run = tl.program_id(0)
    i_h = tl.program_id(1).to(tl.int64)
    count = tl.load(p_counts + i_run)
    if count == 0:
        return
    start = tl.load(p_starts + i_run).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    if p_cos is not None:
        p_cos += start * stride_cos_n
        p_sin += start * stride_sin_n
        if i_h >= H_KV:
            p_q += start * stride_q_n + (i_h - H_KV) * G * stride_q_h
            p_q_out += (start * H_KV + i_h - H_KV) * G * D
            for i_first in range(0, count * G, BLOCK_T):
                i_r = i_first + tl.arange(0, BLOCK_T)
                i_t, i_g = i_r // G, i_r % G
                mask = (i_t < count)[:, None] & m_d[None, :]
                p_row = p_q + i_t * stride_q_n + i_g * stride_q_h
                b_q = _turned(p_row, p_cos + i_t * stride_cos_n, p_sin + i_t * stride_sin_n, o_d, mask, D)
                o_out = (i_t * (H_KV * G) + i_g)[:, None] * D + o_d[None, :]
                tl.store(p_q_out + o_out, b_q.to(p_q_out.dtype.element_ty), mask=mask)
            return
    page = tl.load(p_pages + i_run).to(tl.int64)
    offset = tl.load(p_offsets + i_run).to(tl.int64)
    p_k += start * stride_k_n + i_h * stride_k_h
    p_v += start * stride_v_n + i_h * stride_v_h
    p_k_pages += page * stride_kp_page + i_h * stride_kp_h + offset * stride_kp_s
    p_v_pages += page * stride_vp_page + i_h * stride_vp_h + offset * stride_vp_s

    if BITS > 0:
        p_codes += page * stride_c_page + i_h * stride_c_h + offset * stride_c_s
        p_scales += page * stride_sc_page + i_h * stride_sc_h + offset * stride_sc_s
    if HAS_OFFSET:
        p_offset += i_h * stride_o_h

    dtype: tl.constexpr = p_k_pages.dtype.element_ty
    b_low = tl.full([BLOCK_D], float("inf"), tl.float32)
    b_high = tl.full([BLOCK_D], float("-inf"), tl.float32)
    for i_first in range(0, count, BLOCK_T):
        i_t = i_first + tl.arange(0, BLOCK_T)
        mask = (i_t < count)[:, None] & m_d[None, :]
        b_k = _keys(p_k, p_cos, p_sin, i_t, o_d, mask, stride_k_n, stride_cos_n, stride_sin_n, dtype, D)  # [BLOCK_T, BLOCK_D]
        if p_k_out is not None:
            o_out = ((start + i_t) * H_KV + i_h)[:, None] * D + o_d[None, :]
            tl.store(p_k_out + o_out, b_k.to(dtype), mask=mask)
        b_k = b_k + 0.0  # -0.0 becomes +0.0
        b_v = tl.load(p_v + i_t[:, None] * stride_v_n + o_d[None, :], mask=mask, other=0.0)
        tl.store(p_k_pages + i_t[:, None] * stride_kp_s + o_d[None, :], b_k.to(dtype), mask=mask)
        tl.store(p_v_pages + i_t[:, None] * stride_vp_s + o_d[None, :], b_v, mask=mask)
        if HAS_MIN_MAX:
            b_low = tl.minimum(b_low, tl.min(tl.where(mask, b_k, float("inf")), axis=0))
            b_high = tl.maximum(b_high, tl.max(tl.where(mask, b_k, float("-inf")), axis=0))
        if BITS > 0:
            levels: tl.constexpr = (1 << BITS) - 1
            width: tl.constexpr = D * BITS // 8
            if HAS_OFFSET:
                b_k -= tl.load(p_offset + o_d, mask=m_d, other=0.0)[None, :]
            b_least = tl.min(tl.where(m_d[None, :], b_k, float("inf")), axis=1)  # [BLOCK_T]
            b_most = tl.max(tl.where(m_d[None, :], b_k, float("-inf")), axis=1)
            b_scale = tl.div_rn(b_most - b_least, tl.full([BLOCK_T], levels, tl.float32)).to(tl.float16)
            b_minimum = b_least.to(tl.float16)
            m_t = i_t < count
            tl.store(p_scales + i_t * stride_sc_s, b_scale, mask=m_t)
            tl.store(p_scales + i_t * stride_sc_s + 1, b_minimum, mask=m_t)
            # Readers decode with the rounded values, so quantise with them too.
            b_scale = b_scale.to(tl.float32)[:, None]
            b_minimum = b_minimum.to(tl.float32)[:, None]
            o_w = tl.arange(0, BLOCK_W)
            m_w = m_t[:, None] & (o_w < width)[None, :]
            b_packed = tl.zeros([BLOCK_T, BLOCK_W], tl.int32)
            for i_part in tl.static_range(8 // BITS):
                o_c = i_part * width + o_w  # reload the keys (cache hits): codes of a byte are d / n channels apart
                b_x = _keys(p_k, p_cos, p_sin, i_t, o_c, m_w, stride_k_n, stride_cos_n, stride_sin_n, dtype, D) + 0.0
                if HAS_OFFSET:
                    b_x -= tl.load(p_offset + o_c, mask=o_w < width, other=0.0)[None, :]
                b_divisor = tl.broadcast_to(tl.where(b_scale == 0.0, 1.0, b_scale), [BLOCK_T, BLOCK_W])
                b_code = tl.floor(tl.div_rn(b_x - b_minimum, b_divisor) + 0.5)
                b_code = tl.minimum(tl.maximum(tl.where(b_scale == 0.0, 0.0, b_code), 0.0), levels)
                b_packed |= b_code.to(tl.int32) << (i_part * BITS)
            tl.store(p_codes + i_t[:, None] * stride_c_s + o_w[None, :], b_packed.to(tl.uint8), mask=m_w)

    if HAS_MIN_MAX:
        p_low = p_min_max + page * stride_mm_page + i_h * stride_mm_h + o_d
        p_high = p_low + stride_mm_m
        if offset > 0:  # a run from offset 0 resets the page's metadata
            b_low = tl.minimum(b_low, tl.load(p_low, mask=m_d, other=0.0).to(tl.float32))
            b_high = tl.maximum(b_high, tl.load(p_high, mask=m_d, other=0.0).to(tl.float32))
        tl.store(p_low, b_low.to(dtype), mask=m_d)
        tl.store(p_high, b_high.to(dtype), mask=m_d)


@triton.jit
def _keys(
    p_k, p_cos, p_sin, i_t, o_c, mask, stride_k_n, stride_cos_n, stride_sin_n, dtype: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """float32 [tokens, channels] of the keys as stored in the cache: rotated if angles are given, then rounded."""
    if p_cos is not None:
        p_row = p_k + i_t * stride_k_n
        b_k = _turned(p_row, p_cos + i_t * stride_cos_n, p_sin + i_t * stride_sin_n, o_c, mask, D).to(dtype).to(tl.float32)
    else:
        b_k = tl.load(p_k + i_t[:, None] * stride_k_n + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
    return b_k


@triton.jit
def _turned(p_rows, p_cos, p_sin, o_c, mask, D: tl.constexpr):
    """float32 [rows, channels]: channels o_c of the rows, each rotated with its partner d/2 channels away."""
    HALF: tl.constexpr = D // 2
    is_first = o_c < HALF
    o_partner = tl.where(is_first, o_c + HALF, o_c - HALF)
    o_angle = tl.where(is_first, o_c, o_c - HALF)
    b_x = tl.load(p_rows[:, None] + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
    b_partner = tl.load(p_rows[:, None] + o_partner[None, :], mask=mask, other=0.0).to(tl.float32)
    b_cos = tl.load(p_cos[:, None] + o_angle[None, :], mask=mask, other=0.0)
    b_sin = tl.load(p_sin[:, None] + o_angle[None, :], mask=mask, other=0.0)
    b_turn = b_partner * b_sin
    return b_x * b_cos + tl.where(is_first[None, :], -b_turn, b_turn)


def append_triton(
    k, v, pages, starts, offsets, counts, k_pages, v_pages, page_min_max=None, key_codes=None, key_scales=None, key_offset=None
):
    """See `append`."""
    runs = (pages, starts, offsets, counts)
    _launch(None, k, v, None, None, None, None, *runs, k_pages, v_pages, page_min_max, key_codes, key_scales, key_offset)


def rotary_append_triton(
    q, k, v, cos, sin, pages, starts, offsets, counts, k_pages, v_pages, page_min_max=None, key_codes=None, key_scales=None,
    key_offset=None, *, return_keys=False
):  # fmt: skip
    """See `rotary_append`."""
    q, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, cos, sin))
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device) if return_keys else None
    runs = (pages, starts, offsets, counts)
    metadata = (page_min_max, key_codes, key_scales, key_offset)
    _launch(q, k, v, cos, sin, q_out, k_out, *runs, k_pages, v_pages, *metadata)
    return q_out, k_out


def _launch(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_out: Tensor | None,
    k_out: Tensor | None,
    pages: Tensor,
    starts: Tensor,
    offsets: Tensor,
    counts: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_min_max: Tensor | None,
    key_codes: Tensor | None,
    key_scales: Tensor | None,
    key_offset: Tensor | None,
) -> None:
    if pages.numel() == 0:
        return
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    assert k.dtype == k_pages.dtype
    assert k_pages.stride(-1) == v_pages.stride(-1) == 1
    assert page_min_max is None or page_min_max.stride(-1) == 1
    assert key_codes is None or (key_scales is not None and key_codes.stride(-1) == key_scales.stride(-1) == 1)
    assert key_offset is None or key_offset.stride(-1) == 1
    heads, dim = k.shape[1:]
    width = 0 if key_codes is None else key_codes.shape[-1]
    block_tokens, num_warps = _APPEND_SHAPE if q is None else _ROTARY_SHAPE
    _append_kernel[(pages.numel(), heads if q is None else 2 * heads)](
        q, k, v, cos, sin, q_out, k_out, pages, starts, offsets, counts, k_pages, v_pages, page_min_max, key_codes,
        key_scales, key_offset, *((0, 0) if q is None else q.stride()[:2]), *k.stride()[:2], *v.stride()[:2],
        0 if cos is None else cos.stride(0), 0 if sin is None else sin.stride(0), *k_pages.stride()[:3],
        *v_pages.stride()[:3], *((0, 0, 0) if page_min_max is None else page_min_max.stride()[:3]),
        *((0, 0, 0) if key_codes is None else key_codes.stride()[:3]),
        *((0, 0, 0) if key_scales is None else key_scales.stride()[:3]), 0 if key_offset is None else key_offset.stride(0),
        H_KV=heads, G=1 if q is None else q.shape[1] // heads, D=dim, BLOCK_T=block_tokens,
        BLOCK_D=triton.next_power_of_2(dim), HAS_MIN_MAX=page_min_max is not None, BITS=8 * width // dim,
        BLOCK_W=triton.next_power_of_2(width), HAS_OFFSET=key_codes is not None and key_offset is not None,
        num_warps=num_warps, enable_fp_fusion=False
    )  # fmt: skip
