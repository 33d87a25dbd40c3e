"""random: pages drawn at random in every step and for every head, beside the forced ones. The uninformed control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from distributed_sparse.cache import LayerCache
from distributed_sparse.kernels.philox import RANDOM_PAGES, philox, uniform
from distributed_sparse.selection.base import DecodeBatch
from distributed_sparse.selection.top_k import Scorer, TopKConfig, TopKPolicy


class RandomScorer(Scorer):
    """Scores pages by Philox: key (request seed), counter (page, sample index, position, use | layer | global KV head)."""

    def scores(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Tensor:
        geometry, device = self.geometry, q.device
        seed_low, seed_high, sample, position = batch.random_key[:, :, None, None]
        head = torch.arange(geometry.num_kv_heads, device=device)[:, None] + geometry.first_kv_head
        page = torch.arange(batch.page_table.shape[1], device=device)
        words = philox((seed_low, seed_high), (page, sample, position, RANDOM_PAGES | cache.layer << 8 | head << 20))
        return uniform(words[0])


@dataclass(frozen=True, kw_only=True)
class RandomConfig(TopKConfig):
    """`token_budget` tokens per KV head and step, in whole pages, forced pages included."""

    method: ClassVar[str] = "random"


class RandomPolicy(TopKPolicy):
    """Attends to the forced pages and random others."""

    config_class = RandomConfig
    scorer_class = RandomScorer
