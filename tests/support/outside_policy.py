"""A method that is no part of the engine: every other page, and the newest. Named by its import path in the tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from distributed_sparse.selection.base import DecodeBatch, LayerCache, Policy, Selection, SparseConfig


@dataclass(frozen=True, kw_only=True)
class EveryOtherConfig(SparseConfig):
    method: ClassVar[str] = "every_other"
    stride: int = 2


class EveryOtherPolicy(Policy):
    """Logical pages 0, stride, 2 stride, ..., and the newest one."""

    config_class = EveryOtherConfig
    config: EveryOtherConfig
    graph_safe = False

    def select(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Selection:
        heads, (rows, width) = self.geometry.num_kv_heads, batch.page_table.shape
        pages = torch.zeros(rows, heads, width, dtype=torch.int32)
        counts = torch.zeros(rows, heads, dtype=torch.int32)
        for row, num_pages in enumerate(batch.num_pages.tolist()):
            chosen = sorted({*range(0, num_pages, self.config.stride), num_pages - 1})
            pages[row, :, : len(chosen)] = batch.page_table[row, chosen]
            counts[row] = len(chosen)
        return Selection(pages, counts)


class NotAPolicy:
    """Importable, and no method."""
