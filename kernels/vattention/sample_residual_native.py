"""sample_residual on a CPU with `sample_residual.cpp`: computes 16 samples at a time."""

from __future__ import annotations

import torch

from distributed_sparse.kernels import native


def sample_residual_native(
    chosen, num_chosen, page_table, context_lens, num_samples, random_key, *, block_tokens, page_size, layer, first_kv_head,
    draw, capacity
):  # fmt: skip
    """See `sample_residual`."""
    batch, heads, _ = chosen.shape
    chosen, page_table = native.listed(chosen), native.listed(page_table)
    num_chosen, context_lens, num_samples = (x.int().contiguous() for x in (num_chosen, context_lens, num_samples))
    random_key = random_key.long().contiguous()
    slots = torch.empty(batch, heads, capacity, dtype=torch.int32)
    native.run(
        "sample_residual", chosen, *chosen.stride()[:2], num_chosen, page_table, page_table.stride(0), context_lens,
        num_samples, random_key, block_tokens, page_size, layer, first_kv_head, draw, batch, heads, capacity, slots
    )  # fmt: skip
    return slots
