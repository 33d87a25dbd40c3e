"""dense: every row attends to its whole context, with the same kernels as every other method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from distributed_sparse.selection.base import DecodeBatch, LayerCache, Policy, Selection, SparseConfig, dense_selection


@dataclass(frozen=True, kw_only=True)
class DenseConfig(SparseConfig):
    """No further settings."""

    method: ClassVar[str] = "dense"

    def attended_tokens(self, context_len: int, page_size: int) -> int:
        return context_len


class DensePolicy(Policy):
    """Exact attention. Every layer below `dense_layers` runs it, with any method."""

    config_class = DenseConfig
    graph_safe = True

    def select(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Selection:
        return dense_selection(batch, self.geometry.num_kv_heads)
