"""residual_statistics on a CPU with `residual_statistics.cpp`: reads K and V in their pages, once for all heads of a group."""

from __future__ import annotations

import torch

from distributed_sparse.kernels import native
from distributed_sparse.kernels.vattention.residual_statistics import ResidualStatistics


def residual_statistics_native(q, k_pages, v_pages, tokens, num_tokens, num_residual, partial, scale, *, centred):
    """See `residual_statistics`; the bits do not depend on the number of threads."""
    assert k_pages.stride() == v_pages.stride() and k_pages.stride()[1:] == (k_pages[0, 0].numel(), k_pages.shape[3], 1)
    batch, num_q_heads, dim = q.shape
    _, heads, page_size, _ = k_pages.shape
    queries = (q.float() * scale).contiguous()
    tokens = native.listed(tokens)
    num_tokens, num_residual = num_tokens.int().contiguous(), num_residual.int().contiguous()
    out, lse = (x.float().contiguous() for x in partial)
    result = torch.empty(len(ResidualStatistics._fields), batch, num_q_heads)
    native.run(
        f"residual_statistics_{native.DTYPES[k_pages.dtype]}", queries, k_pages, v_pages, k_pages.stride(0),
        k_pages.stride(1), tokens, *tokens.stride()[:2], num_tokens, num_residual, out, lse, int(centred), batch, heads,
        num_q_heads // heads, dim, page_size, result
    )  # fmt: skip
    return ResidualStatistics(*result.unbind(0))
