"""append: write new keys and values into their pages, with the pages' key min and max and a low-bit copy of the keys.

`rotary_append` also applies the rotary position embedding to queries and keys.
"""

from __future__ import annotations

from torch import Tensor

from distributed_sparse.kernels.dispatch import op


@op
def append(
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    starts: Tensor,
    offsets: Tensor,
    counts: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_min_max: Tensor | None = None,
    key_codes: Tensor | None = None,
    key_scales: Tensor | None = None,
    key_offset: Tensor | None = None,
) -> None:
    """Write K and V of a flattened batch of N tokens into T pages, in place.

    The batch is cut into T *runs*: run t is ``counts[t]`` consecutive tokens from index ``starts[t]`` of the batch, written to
    page ``pages[t]`` from slot ``offsets[t]`` on. No page occurs in two runs, except the null page 0, whose content is
    never read. A decode step has one run of one token per sequence; a prefill chunk one run per page it touches.
    Keys are stored as ``k + 0.0``, so -0.0 becomes +0.0 and min/max do not depend on the order of reduction.

    Args:
        k, v: [N, H_kv, d] post-RoPE keys and values, dtype of the cache (float32, float16 or bfloat16).
        pages: int32 [T] physical page ids.
        starts: int32 [T] index of the run's first token in the batch.
        offsets: int32 [T] the run's first slot in its page; a run with offset 0 resets the page's metadata.
        counts: int32 [T] tokens of the run, 0 <= counts[t] <= page_size - offsets[t]; 0 leaves the page untouched.
        k_pages, v_pages: [num_pages, H_kv, page_size, d] written in place. Offsets are 64-bit.
        page_min_max: [num_pages, H_kv, 2, d] channel-wise min (0) and max (1) of each page's keys, in the dtype of the
            cache and therefore exact; None if no method needs it (Quest, arXiv 2406.10774, section 3.2).
        key_codes: uint8 [num_pages, H_kv, page_size, d * bits / 8], bits 2, 4 or 8: a low-bit copy of the keys, asymmetric per
            (token, KV head) (Twilight, arXiv 2502.02770, section 4.2). With x = k + 0.0 (- key_offset) in float32,
            levels = 2^bits - 1: minimum = fp16(min x), scale = fp16((max x - min x) / levels), rounded to fp16 *first*, then
            code = clamp(floor((x - minimum) / scale + 0.5), 0, levels), all in IEEE float32; scale 0 gives code 0. Byte i holds
            the channels i, i + d/n, i + 2 d/n, ... (n = 8 / bits codes to a byte), the first in the lowest bits. None if no
            method needs it.
        key_scales: float16 [num_pages, H_kv, page_size, 2]: scale (0) and minimum (1); required with key_codes.
        key_offset: float32 [H_kv, d] subtracted from the keys before quantisation (not from K itself); None: no offset.
    """


@op
def rotary_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    pages: Tensor,
    starts: Tensor,
    offsets: Tensor,
    counts: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_min_max: Tensor | None = None,
    key_codes: Tensor | None = None,
    key_scales: Tensor | None = None,
    key_offset: Tensor | None = None,
    *,
    return_keys: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Apply RoPE to q and k (RoFormer, arXiv 2104.09864) and append the rotated keys.

    Rotates channel pairs (i, i + d/2), the half-rotation layout of Hugging Face, in float32 and rounds once to the dtype. The
    rounded key is appended, and page_min_max and key_codes are computed from it.

    Args:
        q: [N, H_q, d] pre-RoPE queries, dtype of the cache; H_q = G * H_kv. Need not be contiguous, nor k and v (views of a
            fused qkv).
        k: [N, H_kv, d] pre-RoPE keys.
        cos, sin: float32 [N, d/2] of position * inverse frequency, with the attention factor of the rope type folded in.
        return_keys: also return the rotated keys.

    The other arguments are those of `append`.

    Returns:
        New contiguous rotated q, and rotated k with ``return_keys``, else None. Undefined for tokens that are in no run.
    """
