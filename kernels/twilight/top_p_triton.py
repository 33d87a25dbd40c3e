"""top_p in Triton: one program per query head finds its threshold, one per KV head lists the kept tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ROW_TOKENS = (2048, 8192)
"""Rows up to these lengths are searched with logits and weights in registers: at most 32 + 32 of a thread's 255."""

_HALVINGS = 14
"""Bisection steps over the range of a row's logits. A range of 12 shrinks to .0007, which holds one or two of 8192 logits. A
pass over memory makes two steps."""

_LARGEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).max)

_LIST_TOKENS, _LIST_LOGITS = 4096, 32768
"""Tokens per step of the listing (eight per thread), and logits per step over all query heads of a group."""


@triton.jit
def _ordered(logit):
    """Order-preserving int32 image of float32; -0.0 and +0.0 have one image."""
    bits = (logit + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative: flip all bits but the sign


@triton.jit
def _logit_of(image):
    """The float32 of an image."""
    return (image ^ ((image >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _mean(low, high):
    """The mean rounded down, without the sum, which may overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _load_logits(p_logits, i_t, n, VECTOR: tl.constexpr):
    """Logits, -inf from n on. The mask is rounded up for wide loads: up to VECTOR - 1 more logits of the last page are read."""
    b_logit = tl.load(p_logits + i_t, mask=i_t < (n + VECTOR - 1) // VECTOR * VECTOR, other=float("-inf"))
    return tl.where(i_t < n, b_logit, float("-inf"))


@triton.jit
def _weights(b_logit, top):
    """e^(logit - top) by exp2, whose instruction needs no handling of subnormals; 0 instead of NaN."""
    return tl.maximum(tl.exp2((b_logit - top) * 1.4426950408889634), 0.0)


@triton.jit
def _mass(b_logit, b_weight, least):
    """Weight of the logits >= least, over axis 0. Products are exact: fused into the sum or not, it has the same bits.

    All sums of a search, the target included, add the same positions in the same order, so a sum with fewer terms is never
    larger, rounding included: the search has one answer whatever thresholds it tries.
    """
    return tl.sum((b_logit >= least).to(tl.float32) * b_weight, axis=0)


@triton.jit
def _search_registers(p_logits, n, p, WIDTH: tl.constexpr, HALVINGS: tl.constexpr, VECTOR: tl.constexpr):
    """The image of the threshold of a row of n <= WIDTH logits. Reads logits and computes weights once."""
    i_t = tl.arange(0, WIDTH)
    b_logit = _load_logits(p_logits, i_t, n, VECTOR)
    top = tl.minimum(tl.max(b_logit, axis=0), _LARGEST)  # never +inf: avoids inf - inf
    b_weight = _weights(b_logit, top)
    low = float("-inf")
    high = _logit_of(_ordered(top) + 1)
    target = _mass(b_logit, b_weight, low) * p
    # Bisect logits, not images, most of which are of numbers near 0. All logits below `bound` together weigh less than 1 - p
    # up to rounding, so this bound is tested like any other threshold.
    bound = top - tl.log(n / (1.0 - p)) - 1.0
    middle = tl.maximum(tl.min(tl.where(i_t < n, b_logit, top), axis=0), bound)
    for _ in range(HALVINGS + 1):
        is_enough = _mass(b_logit, b_weight, middle) >= target
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle)
        middle = 0.5 * low + 0.5 * high
    low_image = _ordered(low)
    high_image = _ordered(high)
    while low_image + 1 < high_image:  # few logits lie between: if the largest suffices, it is the threshold
        best = tl.max(tl.where(b_logit < _logit_of(high_image), b_logit, float("-inf")), axis=0)
        is_enough = _mass(b_logit, b_weight, best) >= target
        low_image = tl.where(is_enough, _ordered(best), low_image)
        high_image = _ordered(best) + tl.where(is_enough, 1, 0)
        if low_image + 1 < high_image:
            mean = _mean(low_image, high_image)
            is_enough = _mass(b_logit, b_weight, _logit_of(mean)) >= target
            low_image = tl.where(is_enough, mean, low_image)
            high_image = tl.where(is_enough, high_image, mean)
    return low_image


@triton.jit
def _masses(p_logits, n, top, first, second, third, ROWS: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr):
    """`_mass` of a row of any length for three thresholds."""
    i_tile = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]  # a column belongs to one thread
    whole = n // (ROWS * COLUMNS) * (ROWS * COLUMNS)  # unmasked tiles take two thirds of the instructions
    b_logit = _load_logits(p_logits + whole, i_tile, n - whole, VECTOR)
    b_weight = _weights(b_logit, top)
    b_first = _mass(b_logit, b_weight, first)
    b_second = _mass(b_logit, b_weight, second)
    b_third = _mass(b_logit, b_weight, third)
    for i_first in range(0, whole, ROWS * COLUMNS):
        b_logit = tl.load(p_logits + i_first + i_tile)
        b_weight = _weights(b_logit, top)
        b_first += _mass(b_logit, b_weight, first)
        b_second += _mass(b_logit, b_weight, second)
        b_third += _mass(b_logit, b_weight, third)
    return tl.sum(b_first, axis=0), tl.sum(b_second, axis=0), tl.sum(b_third, axis=0)


@triton.jit
def _best(p_logits, n, most, ROWS: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr):
    """The largest logit <= most of a row of any length."""
    i_tile = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    whole = n // (ROWS * COLUMNS) * (ROWS * COLUMNS)
    b_logit = _load_logits(p_logits + whole, i_tile, n - whole, VECTOR)
    b_best = tl.where(b_logit <= most, b_logit, float("-inf"))
    for i_first in range(0, whole, ROWS * COLUMNS):
        b_logit = tl.load(p_logits + i_first + i_tile)
        b_best = tl.maximum(b_best, tl.where(b_logit <= most, b_logit, float("-inf")))
    return tl.max(tl.max(b_best, axis=0), axis=0)


@triton.jit
def _narrow(low, high, target, first, second, third, masses):
    """Narrow [low, high) with the masses of three ascending thresholds."""
    of_first, of_second, of_third = masses
    low = tl.where(of_first >= target, first, low)
    low = tl.where(of_second >= target, second, low)
    low = tl.where(of_third >= target, third, low)
    high = tl.where(of_third >= target, high, third)
    high = tl.where(of_second >= target, high, second)
    high = tl.where(of_first >= target, high, first)
    return low, high


@triton.jit
def _search_memory(p_logits, n, p, PASSES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr):
    """Like `_search_registers` for a row of any length. A pass over the logits tests three thresholds: two bits."""
    top = tl.minimum(_best(p_logits, n, float("inf"), ROWS, COLUMNS, VECTOR), _LARGEST)
    low = float("-inf")
    high = _logit_of(_ordered(top) + 1)
    target = float("inf")
    first = low  # the whole row: the mass of which p is a share
    second = top - tl.log(n / (1.0 - p)) - 1.0
    third = 0.5 * second + 0.5 * top
    for i_pass in range(PASSES + 1):
        masses = _masses(p_logits, n, top, first, second, third, ROWS, COLUMNS, VECTOR)
        target = tl.where(i_pass == 0, masses[0] * p, target)
        low, high = _narrow(low, high, target, first, second, third, masses)
        second = 0.5 * low + 0.5 * high
        first = 0.5 * low + 0.5 * second
        third = 0.5 * second + 0.5 * high
    low_image = _ordered(low)
    high_image = _ordered(high)
    while low_image + 1 < high_image:
        best_image = _ordered(_best(p_logits, n, _logit_of(high_image - 1), ROWS, COLUMNS, VECTOR))
        high_image = best_image + 1  # the same set
        mean = _mean(low_image, best_image)
        low_mean = _mean(low_image, mean)
        first, second, third = _logit_of(low_mean), _logit_of(mean), _logit_of(best_image)
        masses = _masses(p_logits, n, top, first, second, third, ROWS, COLUMNS, VECTOR)
        low_image, high_image = _narrow(low_image, high_image, target, low_mean, mean, best_image, masses)
    return low_image


# Arguments that change with batch and context must not trigger recompilation.
@triton.jit(
    do_not_specialize=["p", "stride_logits_b", "stride_logits_h", "stride_num_b", "stride_num_h"],
    do_not_specialize_on_alignment=["p_num_pages", "p_last"],
)
def _top_p_threshold_kernel(
    p_logits,
    p_num_pages,
    p_last,
    p_threshold,
    p,
    stride_logits_b,
    stride_logits_h,
    stride_num_b,
    stride_num_h,
    G: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SHORT: tl.constexpr,
    LONG: tl.constexpr,
    HALVINGS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    i_q = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    num_pages = tl.load(p_num_pages + i_b * stride_num_b + (i_q // G) * stride_num_h)
    n = tl.where(num_pages > 0, (num_pages - 1) * PAGE_SIZE + tl.load(p_last + i_b), 0)
    p_logits += tl.multiple_of(i_b * stride_logits_b + i_q.to(tl.int64) * stride_logits_h, VECTOR)
    image = tl.full([], -2139095041, tl.int32)  # of -inf
    if (p < 1.0) & (n > 0):  # the order of sums depends on the row's own length alone
        if n <= SHORT:
            image = _search_registers(p_logits, n, p, SHORT, HALVINGS, VECTOR)
        elif n <= LONG:
            image = _search_registers(p_logits, n, p, LONG, HALVINGS, VECTOR)
        else:
            image = _search_memory(p_logits, n, p, HALVINGS // 2 + 1, 4, 256 * VECTOR, VECTOR)
    tl.store(p_threshold + i_b * tl.num_programs(0) + i_q, tl.where(n > 0, _logit_of(image), float("inf")))


@triton.jit(
    do_not_specialize=[
        "width",
        "p",
        "sink_pages",
        "recent_pages",
        "stride_logits_b",
        "stride_logits_h",
        "stride_pages_b",
        "stride_pages_h",
        "stride_num_b",
        "stride_num_h",
    ],
    do_not_specialize_on_alignment=["p_pages", "p_num_pages", "p_last"],
)
def _top_p_list_kernel(
    p_logits,
    p_pages,
    p_num_pages,
    p_last,
    p_threshold,
    p_tokens,
    p_num_tokens,
    p,
    width,
    sink_pages,
    recent_pages,
    stride_logits_b,
    stride_logits_h,
    stride_pages_b,
    stride_pages_h,
    stride_num_b,
    stride_num_h,
    G: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    i_h = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(1).to(tl.int64)
    i_row = i_b * tl.num_programs(0) + i_h
    num_pages = tl.load(p_num_pages + i_b * stride_num_b + i_h * stride_num_h)
    n = tl.where(num_pages > 0, (num_pages - 1) * PAGE_SIZE + tl.load(p_last + i_b), 0)
    p_logits += tl.multiple_of(i_b * stride_logits_b + i_h * G * stride_logits_h, VECTOR)
    p_pages += i_b * stride_pages_b + i_h * stride_pages_h
    p_threshold += i_row * G
    p_tokens += i_row * width
    sinks = sink_pages * PAGE_SIZE
    newest = (num_pages - recent_pages) * PAGE_SIZE
    kept_before = tl.zeros([], tl.int32)
    for i_first in range(0, n, BLOCK):
        i_t = i_first + tl.arange(0, BLOCK)
        m_row = i_t < n
        b_page = tl.load(p_pages + i_t // PAGE_SIZE, mask=m_row, other=0)  # load all pages: do not wait for the mask
        m_kept = (i_t < sinks) | (i_t >= newest) | (p >= 1.0)
        for i_g in tl.static_range(G):
            p_head = p_logits + tl.multiple_of(i_g * stride_logits_h, VECTOR)
            m_kept = m_kept | (_load_logits(p_head, i_t, n, VECTOR) >= tl.load(p_threshold + i_g))
        m_kept = m_kept & m_row
        b_kept = m_kept.to(tl.int32)
        b_position = kept_before + tl.cumsum(b_kept, axis=0) - b_kept
        tl.store(p_tokens + b_position, b_page * PAGE_SIZE + i_t % PAGE_SIZE, mask=m_kept)
        kept_before += tl.sum(b_kept, axis=0)
    tl.store(p_num_tokens + i_row, kept_before)


def top_p_triton(logits, pages, num_pages, last_page_len, p, *, page_size, sink_pages, recent_pages):
    """See `top_p`. Two launches."""
    vector = min(page_size, 4)  # logits per load
    if logits.stride(-1) != 1 or any(x % vector for x in (logits.data_ptr() // 4, *logits.stride()[:2])):
        logits = logits.clone(memory_format=torch.contiguous_format)
    pages = pages if pages.stride(-1) == 1 else pages.contiguous()
    batch, num_q_heads, width = logits.shape
    heads = num_pages.shape[1]
    group = num_q_heads // heads
    tokens = torch.empty(batch, heads, width, dtype=torch.int32, device=logits.device)
    num_tokens = torch.empty(batch, heads, dtype=torch.int32, device=logits.device)
    threshold = torch.empty(batch, num_q_heads, dtype=torch.float32, device=logits.device)
    if num_tokens.numel() == 0:
        return tokens, num_tokens, threshold
    strides = (*logits.stride()[:2], *pages.stride()[:2], *num_pages.stride())
    _top_p_threshold_kernel[(num_q_heads, batch)](
        logits, num_pages, last_page_len, threshold, p, *strides[:2], *strides[4:],
        G=group, PAGE_SIZE=page_size, SHORT=_ROW_TOKENS[0], LONG=_ROW_TOKENS[1], HALVINGS=_HALVINGS, VECTOR=vector,
        num_warps=8, enable_fp_fusion=True
    )  # fmt: skip
    _top_p_list_kernel[(heads, batch)](
        logits, pages, num_pages, last_page_len, threshold, tokens, num_tokens, p, width, sink_pages, recent_pages, *strides,
        G=group, PAGE_SIZE=page_size, BLOCK=min(_LIST_TOKENS, _LIST_LOGITS // triton.next_power_of_2(group)), VECTOR=vector,
        num_warps=16, enable_fp_fusion=False
    )  # fmt: skip
    return tokens, num_tokens, threshold
