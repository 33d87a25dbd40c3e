"""whole_rows: let rows that list their whole context read the page table instead, for the same bits as dense attention."""

from __future__ import annotations

from torch import Tensor

from distributed_sparse.kernels.dispatch import op


@op
def whole_rows(num_tokens: Tensor, num_pages: Tensor, context_lens: Tensor, min_context: int = 0) -> tuple[Tensor, Tensor]:
    """Per (sequence, KV head) row, choose between the page table and the listed tokens: one of the two counts is 0.

    Args:
        num_tokens: int32 [B, H_kv] tokens that each row lists.
        num_pages, context_lens: int32 [B] of the page table.
        min_context: shorter contexts are read whole, regardless of what their rows list.

    Returns:
        int32 [B, H_kv] pages of the page table, num_pages or 0; int32 [B, H_kv] tokens, 0 or num_tokens.
    """
