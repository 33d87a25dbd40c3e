"""prefill_attend: dense causal attention of prompt chunks over their paged context."""

from __future__ import annotations

from torch import Tensor

from distributed_sparse.kernels.dispatch import op


@op
def prefill_attend(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
    max_query_len: int,
) -> Tensor:
    """Attend R chunks, each over all tokens of its own sequence up to and including itself.

    The queries of chunk r are the *last* ``query_start[r+1] - query_start[r]`` tokens of its ``context_lens[r]`` tokens,
    whose keys and values are in the pages already. Causal: a query at position i sees positions 0..i.

    Args:
        q: [N, H_q, d] post-RoPE queries of all chunks, flattened; H_q = G * H_kv.
        k_pages, v_pages: [num_pages_total, H_kv, page_size, d], dtype of q.
        page_table: int32 [R, P] physical page ids in logical order; entries past the context are undefined.
        query_start: int32 [R + 1] cumulative query counts (vLLM's cu_seqlens_q); query_start[R] <= N, queries past it
            are padding, and their output is undefined.
        context_lens: int32 [R] tokens of the sequence after this chunk.
        scale: multiplies q.k.
        max_query_len: queries of the longest chunk, known on the host (sizes the grid).

    Returns:
        [N, H_q, d] in q's dtype.
    """
