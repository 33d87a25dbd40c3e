"""whole_rows: rows that list their whole context read their page table instead, and so have a dense row's bits."""

from __future__ import annotations

from torch import Tensor

from distributed_sparse.kernels.dispatch import op


@op
def whole_rows(num_tokens: Tensor, num_pages: Tensor, context_lens: Tensor, min_context: int = 0) -> tuple[Tensor, Tensor]:
    """Counts of pages and of tokens, one of which is 0 in every row.

    Args:
        num_tokens: int32 [B, H_kv] tokens that each row lists.
        num_pages, context_lens: int32 [B] of the page table.
        min_context: shorter contexts are read whole, whatever their rows list.

    Returns:
        int32 [B, H_kv] pages of the page table, num_pages or 0; int32 [B, H_kv] tokens, 0 or num_tokens.
    """
