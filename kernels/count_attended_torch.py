"""count_attended on torch: what runs where there is no GPU."""

from __future__ import annotations

from torch import Tensor


def count_attended_torch(
    tokens_attended: Tensor,
    sparse_rows: Tensor,
    tokens_read_apart: Tensor,
    num_pages: Tensor,
    last_page_len: Tensor,
    context_lens: Tensor,
    page_size: int,
    *,
    num_tokens: Tensor | None = None,
    partial_num_pages: Tensor | None = None,
    partial_num_tokens: Tensor | None = None,
    read_apart: Tensor | None = None,
) -> None:
    """See `distributed_sparse.kernels.count_attended.count_attended`."""
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
    if read_apart is not None:
        tokens_read_apart += (read_apart * is_row).sum(0)
