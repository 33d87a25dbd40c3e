"""Scorers and the policy that keeps the best: scores of any sign, and graphs only where the scorer allows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from distributed_sparse.cache import Geometry, LayerCache
from distributed_sparse.selection.base import DecodeBatch
from distributed_sparse.selection.quest import QuestScorer
from distributed_sparse.selection.top_k import Scorer, TopKConfig, TopKPolicy, scorer_class

GEOMETRY = Geometry(1, 2, 16, 16, torch.float32, torch.device("cpu"), first_kv_head=0)


class NegativeScorer(Scorer):
    """Token t scores t - 100; past the context any bits."""

    per_token = True
    graph_safe = False

    def scores(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Tensor:
        position = torch.arange(batch.page_table.shape[1] * batch.page_size)
        scores = (position - 100).to(torch.float32).expand(len(q), 1, -1)
        return torch.where(position < batch.context_lens[:, None, None], scores, 1e9)


@dataclass(frozen=True, kw_only=True)
class NegativeConfig(TopKConfig):
    method: ClassVar[str] = "negative"
    per_token: ClassVar[bool] = True


class NegativePolicy(TopKPolicy):
    config_class = NegativeConfig
    scorer_class = NegativeScorer


def batch_of(*context_lens: int) -> DecodeBatch:
    lengths = torch.tensor(context_lens, dtype=torch.int32)
    num_pages = -(-lengths // 16)
    table = 1 + torch.arange(len(lengths) * 4, dtype=torch.int32).view(-1, 4)
    last = lengths - (num_pages - 1) * 16
    return DecodeBatch(table, num_pages, lengths, last, torch.zeros(4, len(lengths), dtype=torch.int64), max(context_lens), 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_a_page_of_negative_token_scores_has_its_best_tokens_score(dtype: torch.dtype) -> None:
    batch, cache = batch_of(20, 64), LayerCache.allocate(0, 9, GEOMETRY, ())
    scorer = NegativeScorer(GEOMETRY)
    as_dtype = scorer.scores
    scorer.scores = lambda *arguments: as_dtype(*arguments).to(dtype)  # type: ignore[method-assign]
    found = scorer.page_scores(torch.zeros(2, 2, 16), cache, batch)
    assert found[0, 0, :2].tolist() == [-85, -81]  # its second page holds tokens 16 to 19
    assert found[1, 0].tolist() == [-85, -69, -53, -37]


def test_a_policy_is_graph_safe_where_its_scorer_is() -> None:
    assert not NegativePolicy(NegativeConfig(), GEOMETRY).graph_safe
    NegativeScorer.graph_safe = True
    assert NegativePolicy(NegativeConfig(), GEOMETRY).graph_safe
    NegativeScorer.graph_safe = False


def test_a_subclass_of_a_selector_does_not_take_its_name() -> None:
    class Own(QuestScorer):
        pass

    assert Own.selector == "quest" and scorer_class("quest") is QuestScorer
