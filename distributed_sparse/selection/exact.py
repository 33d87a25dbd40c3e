"""exact: one row's dense attention, written out. For controls and traces, which may read the whole cache."""

from __future__ import annotations

import torch
from torch import Tensor

from distributed_sparse.selection.metadata import LayerCache


def exact_row(
    q: Tensor, cache: LayerCache, pages: Tensor, context_len: int, scale: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Dense attention's own weights for one sequence, computed at its own length: its bits do not depend on a batch.

    Args:
        q: [H_q, d] post-RoPE queries.
        cache: the layer's cache.
        pages: int [P] the sequence's physical pages in logical order, no more than it has.
        context_len: its tokens.
        scale: multiplies q.k.
        dtype: to compute in.

    Returns:
        weights [H_kv, G, n], each row a softmax; values [H_kv, n, d].
    """
    keys, values = (
        kept[pages.long()].transpose(0, 1).flatten(1, 2)[:, :context_len].to(dtype) for kept in (cache.k_pages, cache.v_pages)
    )
    logits = q.to(dtype).unflatten(0, (keys.shape[0], -1)) @ keys.mT * scale
    return logits.softmax(-1), values
