"""hamming_scores: number of signature bits of every token that agree with the query's."""

from __future__ import annotations

from torch import Tensor

from distributed_sparse.kernels.dispatch import op


@op
def hamming_scores(q_signatures: Tensor, signatures: Tensor, page_table: Tensor, context_lens: Tensor) -> Tensor:
    """Count agreeing bits per token, summed over the group (HashAttention, arXiv 2412.14468, section 3).

    A query head's score is bits - 2 * Hamming in the paper; the number of agreeing bits, bits - Hamming, ranks tokens equally.

    Args:
        q_signatures: int32 [B, H_q, W], W words of 32 bits; H_q = G * H_kv.
        signatures: int32 [num_pages_total, H_kv, page_size, G, W].
        page_table: int32 [B, P] physical page ids in logical order; undefined past the count.
        context_lens: int32 [B]; 0 for a padded row.

    Returns:
        int32 [B, H_kv, P * page_size]: 0 .. G * 32 * W at positions below context_lens[b], -1 at and past it.
    """
