"""oracle_topk: the tokens with the largest exact attention weights, as a perfect scorer would select. A control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from distributed_sparse.cache import LayerCache
from distributed_sparse.selection.base import DecodeBatch
from distributed_sparse.selection.exact import exact_head
from distributed_sparse.selection.top_k import Scorer, TopKConfig, TopKPolicy


class OracleScorer(Scorer):
    """Scores every token by its largest exact softmax probability among the query heads of the group."""

    selector = "oracle"
    per_token = True
    graph_safe = False

    def scores(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Tensor:
        rows, width = batch.page_table.shape
        heads, scale = self.geometry.num_kv_heads, self.geometry.scale
        scores = torch.zeros(rows, heads, width * batch.page_size, device=q.device)
        groups = q.unflatten(1, (heads, -1))
        for b, (n, num_pages) in enumerate(zip(batch.context_lens.tolist(), batch.num_pages.tolist())):
            pages = batch.page_table[b, :num_pages]
            for head in range(heads):
                weights, _ = exact_head(groups[b, head], cache, head, pages, n, scale, with_values=False)
                scores[b, head, :n] = weights.amax(0)
        return scores

    def bytes_scored(self, context_lens: list[int]) -> int:
        geometry = self.geometry
        return sum(context_lens) * geometry.num_kv_heads * geometry.head_dim * geometry.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class OracleConfig(TopKConfig):
    """`token_budget` tokens per KV head and step, rounded up to whole pages' worth, sink and recent tokens included."""

    method: ClassVar[str] = "oracle_topk"
    per_token: ClassVar[bool] = OracleScorer.per_token


class OraclePolicy(TopKPolicy):
    """Attends to the tokens with the largest exact attention weights."""

    config_class = OracleConfig
    scorer_class = OracleScorer
