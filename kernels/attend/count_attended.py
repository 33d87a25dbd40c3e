"""count_attended: add the tokens that a layer's selection read to the counters behind the reports."""

from __future__ import annotations

from torch import Tensor

from distributed_sparse.kernels.dispatch import op


@op
def count_attended(
    tokens_attended: Tensor,
    sparse_rows: Tensor,
    total_extra_tokens: Tensor,
    num_pages: Tensor,
    last_page_len: Tensor,
    context_lens: Tensor,
    page_size: int,
    *,
    num_tokens: Tensor | None = None,
    partial_num_pages: Tensor | None = None,
    partial_num_tokens: Tensor | None = None,
    extra_tokens_read: Tensor | None = None,
) -> None:
    """Count the tokens that every (sequence, KV head) row attends, in place. Integer sums: exact in any order.

    A row attends the tokens of its listed pages (all full but the last one), its listed tokens, and those of its partial
    result. It is sparse if these are fewer than its context. A row without context (padding) counts nothing.

    Args:
        tokens_attended, sparse_rows, total_extra_tokens: int64 [H_kv] sums per KV head, added to.
        num_pages: int32 [B, H_kv] (may be expanded).
        last_page_len: int32 [B] tokens in the last listed page.
        context_lens: int32 [B] tokens in the cache, 0 for a padded row.
        page_size: tokens of a full page.
        num_tokens: int32 [B, H_kv] listed tokens; None: no tokens are listed.
        partial_num_pages, partial_num_tokens: int32 [B, H_kv] pages and tokens of the partial result; None: none.
        extra_tokens_read: int32 [B, H_kv] tokens read but not attended; None: none.
    """
