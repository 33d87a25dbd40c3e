"""int4_logits: attention logits estimated from the low-bit copy of the keys."""

from __future__ import annotations

from torch import Tensor

from distributed_sparse.kernels.dispatch import op


@op
def int4_logits(
    q: Tensor,
    key_codes: Tensor,
    key_scales: Tensor,
    pages: Tensor,
    num_pages: Tensor,
    last_page_len: Tensor,
    scale: float,
) -> Tensor:
    """Estimate scale * q.k for every token of the listed pages (Twilight, arXiv 2502.02770, section 4.2).

    For a token with codes c, key scale s and minimum m (see `append`), q.k is estimated as s (q . c) + m sum(q), in float32.
    Supports 2, 4 and 8 bits per channel, inferred from the width of ``key_codes``. A row's bits do not depend on the batch.

    Args:
        q: [B, H_q, d] post-RoPE queries, float32 | float16 | bfloat16; H_q = G * H_kv, 1 <= G <= 16.
        key_codes: uint8 [num_pages_total, H_kv, page_size, d * bits / 8].
        key_scales: float16 [num_pages_total, H_kv, page_size, 2]: scale (0) and minimum (1) per token.
        pages: int32 [B, H_kv, P] physical page ids in logical order (stride 0 over heads is allowed); undefined past the
            count.
        num_pages: int32 [B, H_kv] (may be expanded); 0 is allowed.
        last_page_len: int32 [B] valid tokens in the last listed page of each of the sequence's rows; all others are full.
        scale: multiplies q.k, usually d ** -0.5.

    Returns:
        float32 [B, H_q, P * page_size]: entry i belongs to slot i % page_size of listed page i // page_size; -inf at and past
        the row's last token.
    """
