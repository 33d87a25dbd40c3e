"""count_attended in torch, for CPUs."""

from __future__ import annotations


def count_attended_torch(
    tokens_attended, sparse_rows, total_extra_tokens, num_pages, last_page_len, context_lens, page_size, *, num_tokens=None,
    partial_num_pages=None, partial_num_tokens=None, extra_tokens_read=None
):  # fmt: skip
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
