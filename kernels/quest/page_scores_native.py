"""page_scores on a CPU with `page_scores.cpp`: reads a page's metadata in place, once for all query heads of a group."""

from __future__ import annotations

import torch
from torch import Tensor

from distributed_sparse.kernels import native
from distributed_sparse.kernels.quest.page_scores import sums_over_group


def page_scores_native(
    q: Tensor, page_min_max: Tensor, page_table: Tensor, num_pages: Tensor, group_reduction: str = "max"
) -> Tensor:
    """See `page_scores`."""
    assert page_min_max.is_contiguous()
    batch, num_q_heads, dim = q.shape
    heads = page_min_max.shape[1]
    wide = q.float()
    # [min(q, 0), relu(q)] . [m, M] is min(q, 0).m + relu(q).M: one product, as a page stores m and M side by side.
    split = torch.cat([wide.clamp(max=0), wide.clamp(min=0)], dim=-1)  # [B, H_q, 2 d]
    table, counts = page_table.int().contiguous(), num_pages.int().contiguous()
    scores = torch.empty(batch, heads, table.shape[1])
    native.run(
        f"page_scores_{native.DTYPES[page_min_max.dtype]}", split, page_min_max, page_min_max.stride(0),
        page_min_max.stride(1), table, table.stride(0), counts, int(sums_over_group(group_reduction)), batch, heads,
        num_q_heads // heads, 2 * dim, table.shape[1], scores
    )  # fmt: skip
    return scores
