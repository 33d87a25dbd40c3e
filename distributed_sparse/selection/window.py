"""window: the first pages and the last ones, whatever they hold. The content-free control of every comparison.

The visible part is that of StreamingLLM (arXiv 2309.17453, section 3.2), with absolute positions and nothing evicted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from distributed_sparse.selection.base import (
    DecodeBatch,
    LayerCache,
    Policy,
    Selection,
    SparseConfig,
    covers,
    dense_selection,
    page_budget,
)


@dataclass(frozen=True, kw_only=True)
class WindowConfig(SparseConfig):
    """`token_budget` tokens per step in whole pages: `sink_pages` from the start, the rest the newest."""

    method: ClassVar[str] = "window"
    token_budget: int = 2048

    def check(self, page_size: int) -> None:
        self.check_budget(self.token_budget, page_size)


class WindowPolicy(Policy):
    """Sinks and recent pages; every KV head reads the same ones."""

    config_class = WindowConfig
    config: WindowConfig

    def select(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Selection:
        config, num_kv_heads = self.config, self.geometry.num_kv_heads
        if covers(config, config.token_budget, batch):
            return dense_selection(batch, num_kv_heads)
        k, capacity = page_budget(config, config.token_budget, batch)
        counts = torch.minimum(k, batch.num_pages)
        entry = torch.arange(capacity, dtype=torch.int32, device=q.device)
        logical = torch.where(entry < config.sink_pages, entry, (batch.num_pages - counts)[:, None] + entry)
        logical = logical.clamp_max(batch.page_table.shape[1] - 1)
        pages = batch.page_table.gather(1, logical.long())
        return Selection(pages[:, None].expand(-1, num_kv_heads, -1), counts[:, None].expand(-1, num_kv_heads))
