"""sketch: a sketch of every full page with one bit per key channel, and the logits estimated from it.

A page and KV head's sketch, with H the normalised Hadamard matrix (`rotate`): the mean m of the keys, 4 bits per channel; for
each key the signs b of y = H (k - m) and the magnitude c = mean |y| in 4 bits; the mean of the values, 2 bits per channel.
q.k is estimated as q.m + c (H q).b.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from distributed_sparse.kernels.dispatch import op

KEY_MEAN_BITS, VALUE_MEAN_BITS, MAGNITUDE_BITS = 4, 2, 4


class PageSketches(NamedTuple):
    """Sketches of all pages of a layer; undefined for pages that are not full.

    Codes are packed like `append`'s key_codes: with n codes to a byte and w bytes, byte i holds the elements i, i + w, i + 2w,
    ..., the first in its lowest bits. A code decodes to scale * code + minimum;
    scale and minimum are rounded to fp16 before quantising.

    Attributes:
        signs: uint8 [num_pages, H_kv, page_size, d / 8]: 1 where a channel of y is positive.
        magnitudes: uint8 [num_pages, H_kv, page_size / 2].
        key_means: uint8 [num_pages, H_kv, d / 2].
        value_means: uint8 [num_pages, H_kv, d / 4].
        scales: float16 [num_pages, H_kv, 6]: scale and minimum of key_means, magnitudes, value_means.
    """

    signs: Tensor
    magnitudes: Tensor
    key_means: Tensor
    value_means: Tensor
    scales: Tensor


@op
def append_sketches(
    k_pages: Tensor, v_pages: Tensor, pages: Tensor, offsets: Tensor, counts: Tensor, sketches: PageSketches
) -> None:
    """Write, in place, the sketches of the pages that a batch has filled. A sketch depends on the page's K and V alone.

    Args:
        k_pages, v_pages: [num_pages, H_kv, page_size, d], the batch's tokens included; d a multiple of 8.
        pages, offsets, counts: int32 [T] runs, as in `append`; a page is full where offset + count is page_size.
    """


@op
def sketch_logits(
    q: Tensor, sketches: PageSketches, page_table: Tensor, num_pages: Tensor, last_page_len: Tensor, scale: float
) -> Tensor:
    """Estimate scale * q.k for every token of a full page. A row's bits do not depend on the batch.

    Args:
        q: [B, H_q, d] post-RoPE queries, float32 | float16 | bfloat16; H_q = G * H_kv.
        page_table: int32 [B, P] physical page ids in logical order; undefined past the count.
        num_pages: int32 [B]; 0 is allowed.
        last_page_len: int32 [B] valid tokens in the last listed page; all others are full.
        scale: multiplies q.k, usually d ** -0.5.

    Returns:
        float32 [B, H_q, P * page_size]; -inf at tokens of a page that is not full and past the row's end.
    """


@op
def sketch_probabilities(logits: Tensor, num_kv_heads: int, num_tokens: Tensor) -> Tensor:
    """The mean over a KV head's query heads of softmax(logits) over a row's first tokens.

    Args:
        logits: float32 [B, H_q, W], as returned by `sketch_logits`.
        num_tokens: int32 [B] tokens of each row's full pages.

    Returns:
        float32 [B, H_kv, W]; 0 past the row's tokens.
    """


class SketchSelection(NamedTuple):
    """Result of `select_by_sketch`.

    Attributes:
        tokens: int32 [B, H_kv, P * page_size] logical positions, ascending; undefined past the count.
        num_tokens: int32 [B, H_kv].
        tail_out: float32 [B, H_q, d] estimated attention over the dropped tokens; 0 if none are dropped.
        tail_lse: float32 [B, H_q] its log-sum-exp; -inf if no tokens are dropped.
    """

    tokens: Tensor
    num_tokens: Tensor
    tail_out: Tensor
    tail_lse: Tensor


@op
def select_by_sketch(
    logits: Tensor,
    sketches: PageSketches,
    page_table: Tensor,
    num_pages: Tensor,
    context_lens: Tensor,
    tau: float,
    *,
    min_tokens: int,
    sink_pages: int,
    recent_pages: int,
) -> SketchSelection:
    """Keep the tokens whose estimated probability is above tau / T, and estimate the attention over the others.

    Per KV head, p_t is the mean over its query heads of softmax(logits) over the tokens of full pages. Kept are: tokens with
    p_t > tau / T (T the row's context), the ``min_tokens`` largest p_t and all ties with the last of them, the
    ``sink_pages`` first and ``recent_pages`` last pages, and a page that is not full. A query head's tail is the
    attention over the dropped tokens with the estimated logits and each token's page mean as its value.

    Args:
        logits: float32 [B, H_q, P * page_size], as returned by `sketch_logits`.
        page_table, num_pages: as in `sketch_logits`.
        context_lens: int32 [B].
    """
