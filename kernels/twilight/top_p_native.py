"""top_p on a CPU with `top_p.cpp`: a histogram of a head's mass finds its threshold; one pass lists the union."""

from __future__ import annotations

import torch

from distributed_sparse.kernels import native


def top_p_native(logits, pages, num_pages, last_page_len, p, *, page_size, sink_pages, recent_pages):
    """See `top_p`; the bits do not depend on the number of threads."""
    batch, num_q_heads, width = logits.shape
    heads = num_pages.shape[1]
    logits, last_page_len = logits.contiguous(), last_page_len.int().contiguous()
    pages, num_pages = native.listed(pages), num_pages.int()
    tokens = torch.empty(batch, heads, width, dtype=torch.int32)
    num_tokens = torch.empty(batch, heads, dtype=torch.int32)
    threshold = torch.empty(batch, num_q_heads)
    native.run(
        "top_p_float32",
        logits,
        pages,
        pages.stride(0),
        pages.stride(1),
        num_pages,
        num_pages.stride(0),
        num_pages.stride(1),
        last_page_len,
        torch.tensor(p, dtype=torch.float64),  # float32 would select other sets
        sink_pages,
        recent_pages,
        batch,
        heads,
        num_q_heads // heads,
        page_size,
        width // page_size,
        tokens,
        num_tokens,
        threshold,
    )
    return tokens, num_tokens, threshold
