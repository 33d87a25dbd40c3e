"""dense: every row reads its whole context. The identity selection through the same kernels as every other method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from distributed_sparse.selection.base import DecodeBatch, LayerCache, Policy, Selection, SparseConfig, dense_selection


@dataclass(frozen=True, kw_only=True)
class DenseConfig(SparseConfig):
    """No settings of its own."""

    method: ClassVar[str] = "dense"

    def attended_tokens(self, context_len: int, page_size: int) -> int:
        return context_len


class DensePolicy(Policy):
    """Exact attention, and what every layer below `dense_layers` runs."""

    config_class = DenseConfig
    graph_safe = True

    def select(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Selection:
        return dense_selection(batch, self.geometry.num_kv_heads)
