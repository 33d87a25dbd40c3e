"""window: the first and the last pages, regardless of content. The content-free control of every comparison.

The visible pages are those of StreamingLLM (arXiv 2309.17453, section 3.2), with absolute positions. With `evict`, other pages
are freed, as in the paper: memory stays bounded in decode of any length.
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
    all_rows_dense,
    dense_selection,
    page_budget,
    tokens_in_budget,
)


@dataclass(frozen=True, kw_only=True)
class WindowConfig(SparseConfig):
    """`token_budget` tokens per step in whole pages: `sink_pages` from the start, the rest are the newest pages.

    evict: the Driver frees a sequence's other pages after its prefill; prompt chunks attend to all of them. One page id serves
        all layers, so all layers must keep the same pages: no dense layers, no dense contexts beyond the budget, no overrides
        of what is kept. The generated tokens are those of `evict: false`, bit for bit.
    """

    method: ClassVar[str] = "window"
    token_budget: int = 2048
    evict: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        evicting = next((override for override in self.layers if override.get("evict")), None)
        if not self.evict:
            if evicting is not None:
                raise ValueError(
                    f"sparse.layers range {evicting.get('range')!r} sets evict=true, but a page is freed in all layers or in "
                    "none; set evict: true beside `layers`"
                )
            return
        if self.dense_layers > 0:
            raise ValueError(
                f"sparse.evict=true frees pages that the dense_layers={self.dense_layers} dense layers would read; "
                "set dense_layers: 0"
            )
        if self.min_context > self.token_budget:
            raise ValueError(
                f"sparse.evict=true frees pages that contexts below min_context={self.min_context} would read beyond "
                f"token_budget={self.token_budget}; set min_context to {self.token_budget} or less"
            )
        for override in self.layers:
            for name in ("evict", "token_budget", "sink_pages"):
                if override.get(name, getattr(self, name)) != getattr(self, name):
                    raise ValueError(
                        f"sparse.layers range {override.get('range')!r} sets {name}={override[name]}, but with evict=true all "
                        f"layers keep the same pages; leave it at {getattr(self, name)}"
                    )

    def check(self, page_size: int) -> None:
        self.check_budget(self.token_budget, page_size)

    def attended_tokens(self, context_len: int, page_size: int) -> int:
        return tokens_in_budget(self, self.token_budget, context_len, page_size)

    def evict_window(self, page_size: int) -> tuple[int, int] | None:
        return (self.sink_pages, -(-self.token_budget // page_size) - self.sink_pages) if self.evict else None


class WindowPolicy(Policy):
    """Attends to sink and recent pages, the same ones for every KV head.

    With `evict`, page tables hold stale ids between the two. No selection lists them, as long as `all_rows_dense` and
    `page_budget` treat no row as dense whose pages exceed the budget.
    """

    config_class = WindowConfig
    graph_safe = True
    config: WindowConfig

    def select(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Selection:
        config, num_kv_heads = self.config, self.geometry.num_kv_heads
        if all_rows_dense(config, config.token_budget, batch):
            return dense_selection(batch, num_kv_heads)
        settings = ("window", config.token_budget, config.sink_pages, config.min_context)
        pages, counts = batch.cached_per_step(settings, lambda: self._listed(batch))
        return Selection(pages[:, None].expand(-1, num_kv_heads, -1), counts[:, None].expand(-1, num_kv_heads))

    def _listed(self, batch: DecodeBatch) -> tuple[Tensor, Tensor]:
        """Physical pages int32 [B, capacity] and their number int32 [B], the same for every KV head and layer."""
        config = self.config
        k, capacity = page_budget(config, config.token_budget, batch)
        counts = torch.minimum(k, batch.num_pages)
        entry = torch.arange(capacity, dtype=torch.int32, device=counts.device)
        logical = torch.where(entry < config.sink_pages, entry, (batch.num_pages - counts)[:, None] + entry)
        logical = logical.clamp_max(batch.page_table.shape[1] - 1)
        return batch.page_table.gather(1, logical.long()), counts
