"""int4_logits on a CPU with `int4_logits.cpp`: reads codes in place, once for all query heads of a group."""

from __future__ import annotations

import torch

from distributed_sparse.kernels import native


def int4_logits_native(q, key_codes, key_scales, pages, num_pages, last_page_len, scale):
    """See `int4_logits`; the bits do not depend on the number of threads."""
    assert key_codes.is_contiguous() and key_scales.is_contiguous()
    batch, num_q_heads, dim = q.shape
    _, heads, page_size, width = key_codes.shape
    most_pages = pages.shape[2]
    queries, last_page_len = q.float().contiguous(), last_page_len.int().contiguous()
    pages, num_pages = native.listed(pages), num_pages.int()
    logits = torch.empty(batch, num_q_heads, most_pages * page_size)
    native.run(
        "int4_logits_float32", queries, key_codes, key_scales, 8 * width // dim, pages, pages.stride(0), pages.stride(1),
        num_pages, num_pages.stride(0), num_pages.stride(1), last_page_len, float(scale), batch, heads, num_q_heads // heads,
        dim, page_size, most_pages, logits
    )  # fmt: skip
    return logits
