"""exact: dense attention weights of one (sequence, KV head) row, for controls and traces, which may read the whole cache."""

from __future__ import annotations

import torch
from torch import Tensor

from distributed_sparse.cache import LayerCache


def exact_head(
    q: Tensor,
    cache: LayerCache,
    head: int,
    pages: Tensor,
    context_len: int,
    scale: float,
    dtype: torch.dtype = torch.float32,
    with_values: bool = True,
) -> tuple[Tensor, Tensor]:
    """Dense attention weights of one (sequence, KV head) row, without padding: its bits do not depend on the batch.

    Args:
        q: [G, d] post-RoPE queries of the head's group.
        cache: the layer's cache.
        head: this rank's KV head.
        pages: int [P] the sequence's physical pages in logical order, without entries past its count.
        context_len: n, the sequence's tokens.
        scale: multiplies q.k.
        dtype: of the computation and the result.
        with_values: also return the values.

    Returns:
        weights [G, n], each row a softmax; values [n, d], or an empty tensor.
    """

    def of_tokens(kept: Tensor) -> Tensor:
        return kept[pages.long(), head].flatten(0, 1)[:context_len].to(dtype)

    weights = (q.to(dtype) @ of_tokens(cache.k_pages).mT * scale).softmax(-1)
    return weights, of_tokens(cache.v_pages) if with_values else weights.new_empty(0)
