"""whole_rows in torch."""

from __future__ import annotations

from torch import Tensor


def whole_rows_torch(
    num_tokens: Tensor, num_pages: Tensor, context_lens: Tensor, min_context: int = 0
) -> tuple[Tensor, Tensor]:
    """See `whole_rows`."""
    context = context_lens[:, None]
    is_whole = num_tokens >= context
    if min_context > 0:
        is_whole |= context < min_context
    return num_pages[:, None] * is_whole, num_tokens * ~is_whole
