"""attend: decode attention of one query token per sequence over the pages and tokens that a `Selection` lists."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distributed_sparse.kernels.dispatch import op

CHUNK_TOKENS = 512
"""A row's page list and token list are each cut into chunks of this many tokens. Each chunk gives one partial result; they are
combined in index order, so the chunks and every bit of the result depend on the row alone."""


@op
def attend(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    pages: Tensor,
    num_pages: Tensor,
    last_page_len: Tensor,
    scale: float,
    *,
    tokens: Tensor | None = None,
    num_tokens: Tensor | None = None,
    log_weight: Tensor | None = None,
    partial: tuple[Tensor, Tensor] | None = None,
    return_lse: bool = False,
) -> Any:
    """Attend over listed pages, then listed tokens, then merge an already attended partial result.

    Chunks are numbered: pages first, then tokens; the partial comes last. Rows are independent: a row's result has
    the same bits in any batch, order, or number of KV heads (the torch implementation on a CPU: with one thread).

    Args:
        q: [B, H_q, d] post-RoPE queries, float32 | float16 | bfloat16; H_q = G * H_kv, 1 <= G <= 16; d 64, 96, 128 or 256.
        k_pages, v_pages: [num_pages_total, H_kv, page_size, d], dtype of q; page_size 16, 32 or 64.
        pages: int32 [B, H_kv, P] physical page ids in logical order (stride 0 over heads is allowed: dense is the page
            table itself, expanded). Entries past the count are undefined.
        num_pages: int32 [B, H_kv] (may be expanded); 0 is allowed.
        last_page_len: int32 [B] valid tokens in the *last listed* page of each of the sequence's rows, 1..page_size; all
            other listed pages are full.
        scale: multiplies q.k, usually d ** -0.5.
        tokens: int32 [B, H_kv, T] physical token slots (page * page_size + offset), in any order that depends on the row
            alone (sums follow it); past the count undefined.
        num_tokens: int32 [B, H_kv].
        log_weight: float32 [B, H_kv] added to the logits of ``tokens`` (before the running maximum); None means 0.
        partial: (out float32 [B, H_q, d], lse float32 [B, H_q]) a result over disjoint tokens, already normalised; a row
            with lse = -inf has none.
        return_lse: also return the log-sum-exp, and the output in float32 (what another call takes as ``partial``).

    Returns:
        out [B, H_q, d] in q's dtype; with ``return_lse`` (out float32 [B, H_q, d], lse float32 [B, H_q]). A row that lists
        nothing gives out 0 and lse -inf.
    """
