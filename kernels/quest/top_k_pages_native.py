"""top_k_pages on a CPU with `top_k_pages.cpp`: finds a row's k-th score by bisection, then lists pages in one pass."""

from __future__ import annotations

import torch

from distributed_sparse.kernels import native


def top_k_pages_native(scores, page_table, num_pages, k, *, sink_pages, recent_pages, capacity):
    """See `top_k_pages`."""
    batch, heads, most_pages = scores.shape
    scores = scores.contiguous()
    table, num_pages, k = page_table.int().contiguous(), num_pages.int().contiguous(), k.int().contiguous()
    pages = torch.empty(batch, heads, capacity, dtype=torch.int32)
    counts = torch.empty(batch, heads, dtype=torch.int32)
    native.run(
        f"top_k_pages_{'int32' if scores.dtype == torch.int32 else 'float32'}", scores, table, table.stride(0), num_pages, k,
        sink_pages, recent_pages, batch, heads, most_pages, capacity, pages, counts
    )  # fmt: skip
    return pages, counts
