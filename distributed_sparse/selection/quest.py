"""quest: the pages whose keys could have the largest product with the query (Quest, arXiv 2406.10774)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from distributed_sparse.kernels.page_scores import page_scores
from distributed_sparse.kernels.top_k_pages import top_k_pages
from distributed_sparse.selection.base import (
    DecodeBatch,
    LayerCache,
    PageMinMax,
    Policy,
    Selection,
    SparseConfig,
    covers,
    dense_selection,
    page_budget,
)


@dataclass(frozen=True, kw_only=True)
class QuestConfig(SparseConfig):
    """`token_budget` tokens per KV head and step, in whole pages, forced pages included."""

    method: ClassVar[str] = "quest"
    token_budget: int = 2048
    bound: str = "minmax"
    group_reduction: str = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bound != "minmax":
            raise ValueError(f"sparse.bound={self.bound!r} is unknown; use 'minmax'")
        if self.group_reduction not in ("max", "sum"):
            raise ValueError(f"sparse.group_reduction={self.group_reduction!r} is unknown; use 'max' or 'sum'")

    def check(self, page_size: int) -> None:
        self.check_budget(self.token_budget, page_size)


class QuestPolicy(Policy):
    """Score every page by an upper bound of q.k from its keys' min and max (section 3.2), keep the K best per KV head.

    K = ceil(token_budget / page_size), sink and recent pages included; one list per KV head, shared by its query heads.
    """

    config_class = QuestConfig
    config: QuestConfig
    metadata = (PageMinMax,)

    def select(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Selection:
        config = self.config
        if covers(config, config.token_budget, batch):
            return dense_selection(batch, self.geometry.num_kv_heads)
        assert cache.page_min_max is not None
        scores = page_scores(q, cache.page_min_max, batch.page_table, batch.num_pages, config.group_reduction)
        k, capacity = page_budget(config, config.token_budget, batch)
        pages, counts = top_k_pages(
            scores,
            batch.page_table,
            batch.num_pages,
            k,
            sink_pages=config.sink_pages,
            recent_pages=config.recent_pages,
            capacity=capacity,
        )
        return Selection(pages, counts)

    def bytes_scored(self, num_pages: int) -> int:
        return num_pages * PageMinMax.bytes_per_page(self.geometry)
