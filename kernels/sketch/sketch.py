"""sketch: what the cache keeps of every full page at one bit per key channel, and the logits that it gives an estimate of.

Per full page and KV head, with H the normalised Hadamard matrix (`rotate`): the mean m of the keys, 4 bits per channel; of each
key's remainder y = H (k - m) the signs b and, in 4 bits, the magnitude c = mean |y|; the mean of the values, 2 bits each.
Then q.k is estimated by q.m + c (H q).b.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from distributed_sparse.kernels.dispatch import op

KEY_MEAN_BITS, VALUE_MEAN_BITS, MAGNITUDE_BITS = 4, 2, 4


class PageSketches(NamedTuple):
    """Sketches of all pages of a layer. Those of pages that are not full are any bits.

    Codes are packed as of `append`'s key_codes: with n codes to a byte and w bytes, byte i holds the elements i, i + w, i + 2w,
    ..., the first in its lowest bits. Code, scale and minimum (the last two rounded to fp16 first) decode to
    scale * code + minimum.

    Attributes:
        signs: uint8 [num_pages, H_kv, page_size, d / 8]: 1 where a channel of y is positive.
        magnitudes: uint8 [num_pages, H_kv, page_size / 2].
        key_means: uint8 [num_pages, H_kv, d / 2].
        value_means: uint8 [num_pages, H_kv, d / 4].
        scales: float16 [num_pages, H_kv, 6]: scale and minimum of key_means, of magnitudes, of value_means.
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
    """Write, in place, the sketches of the pages that a batch has filled: a pure function of the page's K and V.

    Args:
        k_pages, v_pages: [num_pages, H_kv, page_size, d], the batch's tokens included; d a multiple of 8.
        pages, offsets, counts: int32 [T] runs, as of `append`: a page is full where offset + count is page_size.
    """


@op
def sketch_logits(
    q: Tensor, sketches: PageSketches, page_table: Tensor, num_pages: Tensor, last_page_len: Tensor, scale: float
) -> Tensor:
    """Estimate scale * q.k for every token of a full page. A row's bits do not depend on the batch or its order.

    Args:
        q: [B, H_q, d] post-RoPE queries, float32 | float16 | bfloat16; H_q = G * H_kv.
        page_table: int32 [B, P] physical page ids in logical order; past the count any bits.
        num_pages: int32 [B]; 0 is allowed.
        last_page_len: int32 [B] valid tokens in the last listed page; all others are full.
        scale: multiplies q.k, usually d ** -0.5.

    Returns:
        float32 [B, H_q, P * page_size]; -inf at tokens of a page that is not full, and past it.
    """


@op
def sketch_probabilities(logits: Tensor, num_kv_heads: int, num_tokens: Tensor) -> Tensor:
    """The mean over a KV head's query heads of softmax(logits) over a row's first tokens.

    Args:
        logits: float32 [B, H_q, W], as of `sketch_logits`.
        num_tokens: int32 [B] tokens of each row's full pages.

    Returns:
        float32 [B, H_kv, W]; 0 past the row's tokens.
    """


class SketchSelection(NamedTuple):
    """What `select_by_sketch` keeps.

    Attributes:
        tokens: int32 [B, H_kv, P * page_size] logical positions, ascending; undefined past the count.
        num_tokens: int32 [B, H_kv].
        tail_out: float32 [B, H_q, d] estimated attention over what is not kept; 0 where nothing is dropped.
        tail_lse: float32 [B, H_q] its log-sum-exp; -inf where nothing is dropped.
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
    """Keep the tokens whose estimated probability is above tau / T, and estimate what the others add.

    Per KV head, p_t is the mean over its query heads of softmax(logits) over the tokens of full pages. Kept are: tokens with
    p_t > tau / T (T the row's context), the ``min_tokens`` of the largest p_t with all that tie with the last of them, the
    ``sink_pages`` first and ``recent_pages`` last pages, and a page that is not full. Of a query head, the tail is the
    attention over the dropped tokens with the estimated logits, where each has its page's mean value.

    Args:
        logits: float32 [B, H_q, P * page_size], as of `sketch_logits`.
        page_table, num_pages: as of `sketch_logits`.
        context_lens: int32 [B].
    """
