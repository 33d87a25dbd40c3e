"""quest: pages whose keys could have the largest product with the query (Quest, arXiv 2406.10774)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from distributed_sparse.cache import Geometry, LayerCache, PageMinMax
from distributed_sparse.kernels.quest.page_scores import page_scores
from distributed_sparse.selection.base import DecodeBatch, SparseConfig
from distributed_sparse.selection.top_k import Scorer, TopKConfig, TopKPolicy
from distributed_sparse.utils.validation import check_choice


class QuestScorer(Scorer):
    """Scores every page by an upper bound of q.k, computed from the min and max of its keys (section 3.2)."""

    selector = "quest"
    metadata = (PageMinMax(),)

    def __init__(self, geometry: Geometry, group_reduction: str = "max") -> None:
        super().__init__(geometry)
        self.group_reduction = group_reduction

    @classmethod
    def from_config(cls, config: SparseConfig, geometry: Geometry) -> QuestScorer:
        return cls(geometry, config.group_reduction) if isinstance(config, QuestConfig) else cls(geometry)

    def scores(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Tensor:
        return page_scores(q, cache.metadata["page_min_max"], batch.page_table, batch.num_pages, self.group_reduction)

    def bytes_scored(self, context_lens: list[int]) -> int:
        geometry = self.geometry
        pages = sum(-(-n // geometry.page_size) for n in context_lens)
        return pages * geometry.num_kv_heads * 2 * geometry.head_dim * geometry.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class QuestConfig(TopKConfig):
    """`token_budget` tokens per KV head and step, in whole pages, forced pages included.

    group_reduction: how the scores of a KV head's query heads are combined, "max" or "sum".
    """

    method: ClassVar[str] = "quest"
    group_reduction: str = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("sparse.group_reduction", self.group_reduction, ("max", "sum"))


class QuestPolicy(TopKPolicy):
    """Attends to the K pages of the highest bounds per KV head, K = ceil(token_budget / page_size), forced pages included.

    One list per KV head, shared by its query heads.
    """

    config_class = QuestConfig
    scorer_class = QuestScorer
    config: QuestConfig
