"""The oracle reads the tokens of the largest exact weights: what a perfect scorer would, for as many tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distributed_sparse.selection import resolve_sparse_config
from distributed_sparse.selection.base import Policy, Selection
from distributed_sparse.selection.oracle import OracleConfig, OraclePolicy
from distributed_sparse.selection.quest import QuestConfig, QuestPolicy
from distributed_sparse.selection.random import RandomConfig, RandomPolicy
from tests.support.decode_rows import DecodeRows, decode_rows, positions_read
from tests.support.eager_methods import EagerTopK
from tests.support.promise_a import assert_rows_depend_on_themselves

pytestmark = pytest.mark.usefixtures("one_thread")  # on CPU, equal bits are promised at one thread

CONTEXTS = [333, 5, 64, 65, 17, 200, 1, 700]


def oracle(rows: DecodeRows, **settings: Any) -> Policy:
    return rows.policy(OraclePolicy, OracleConfig(**settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"token_budget": 64},
        {"token_budget": 50},
        {"token_budget": 160, "sink_pages": 0},
        {"token_budget": 160, "sink_pages": 3, "recent_pages": 4},
        {"token_budget": 64, "min_context": 66},
    ],
)
@pytest.mark.parametrize("group", [1, 4])
def test_tokens_are_those_of_the_definition_in_float64(settings: dict[str, Any], group: int) -> None:
    rows = decode_rows(CONTEXTS, group=group)
    selection = rows.select(oracle(rows, **settings))
    own, sparse = EagerTopK(dense_layers=0, selector="oracle", **settings), 0
    for row, n in enumerate(CONTEXTS):
        expected = own.log_weights(0, rows.q[row], rows.keys[row], rows.values[row])[::group]
        for head in range(4):
            found = positions_read(rows, selection, row, head)
            assert found == expected[head].isfinite().nonzero()[:, 0].tolist()
            sparse += len(found) < n
    own.margins.assert_clear(probability=1e-6)
    assert sparse >= 12


def test_no_method_of_as_many_tokens_captures_more_mass() -> None:
    """One query head per KV head; of 320 tokens per head, quest and random read whole pages."""
    rows = decode_rows([1008], group=1)  # no partial page: all read the same number
    masses = []
    for policy in (
        oracle(rows, token_budget=320),
        rows.policy(QuestPolicy, QuestConfig(token_budget=320)),
        rows.policy(RandomPolicy, RandomConfig(token_budget=320)),
    ):
        selection = rows.select(policy)
        assert selection.attended(rows.batch.last_page_len, 16).tolist() == [[320] * 4]
        masses.append(captured(rows, selection))
    assert (masses[0] > masses[1] + 0.02).all() and (masses[1] > masses[2]).all()


def captured(rows: DecodeRows, selection: Selection) -> torch.Tensor:
    """float64 [H_kv]: the softmax mass of what the one sequence reads."""
    heads = range(rows.geometry.num_kv_heads)
    weights = [(rows.keys[0][head].double() @ rows.q[0, head].double() / 8).softmax(0) for head in heads]
    return torch.stack([weights[head][positions_read(rows, selection, 0, head)].sum() for head in heads])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_depends_on_itself_alone(dtype: torch.dtype) -> None:
    rows = decode_rows(CONTEXTS, dtype=dtype)
    assert_rows_depend_on_themselves(rows, lambda some: oracle(some, token_budget=64, min_context=65))


def test_the_oracle_reads_every_key_and_turns_graphs_off() -> None:
    rows = decode_rows(CONTEXTS)
    policy = oracle(rows)
    assert not policy.graph_safe
    assert policy.bytes_scored([100, 33]) == 133 * 4 * 64 * 4
    with pytest.raises(ValueError, match="token_budget=16 is below the 3 forced pages"):
        OracleConfig(token_budget=16).check(16)
    with pytest.raises(ValueError, match="unknown key 'hash_weights'"):
        resolve_sparse_config({"method": "oracle_topk", "hash_weights": "x"})
