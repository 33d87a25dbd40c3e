"""count_attended in torch, for CPUs."""

from __future__ import annotations

from torch import Tensor


def count_attended_torch(
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
    """See `count_attended`."""
    missing, context = (page_size - last_page_len)[:, None], context_lens[:, None]
    attended = num_pages * page_size - missing * (num_pages > 0)
    if partial_num_pages is not None:
        attended += partial_num_pages * page_size - missing * (partial_num_pages > 0)
    for listed in (num_tokens, partial_num_tokens):
        if listed is not None:
            attended += listed
    is_row = context > 0
    tokens_attended += (attended * is_row).sum(0)
    sparse_rows += ((attended < context) & is_row).sum(0)
    if extra_tokens_read is not None:
        total_extra_tokens += (extra_tokens_read * is_row).sum(0)
