"""What a point must hold and attend to is counted apart from the engine's slices, so a wrong cut does not agree with itself."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest

from distributed_sparse.model import sharding
from distributed_sparse.model.config import ModelConfig
from distributed_sparse.model.sharding import ShardSpec, TensorSlice, tensor_slices
from distributed_sparse.selection import resolve_sparse_config
from distributed_sparse.tools.common.latency import RequestTimes
from distributed_sparse.tools.scaling.checks import Checks, check_points
from distributed_sparse.tools.scaling.expectations import expectations
from distributed_sparse.tools.scaling.grid import Point, ScalingConfig
from tests.support.checkpoints import tiny_checkpoint
from tests.support.scaling_records import scaling_record

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "intermediate_size": 97}),
    ("qwen2", {}),
    ("qwen3", {}),
]


def point(num_ranks: int, **base: Any) -> Point:
    given = {
        "base": {"model": "m", "tensor_parallel_size": num_ranks, "dtype": "float32", **base},
        "workload": {"input_len": 60, "output_len": 6},
    }
    return ScalingConfig.from_dict(given, "a.yaml").points[0]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_all_ranks_weights_are_those_of_their_slices_padding_and_replicas_included(
    family: str, changes: dict[str, Any], num_ranks: int, tmp_path: Any
) -> None:
    model = ModelConfig.from_pretrained(tiny_checkpoint(tmp_path, family, **changes))
    held = sum(
        4 * prod(part.local_shape)
        for rank in range(num_ranks)
        for part in tensor_slices(model, ShardSpec(rank, num_ranks)).values()
    )
    assert expectations(point(num_ranks), model, [])["weight_bytes_of_all_ranks"] == held


def test_slices_that_split_nothing_fail_the_check_of_the_weights(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelConfig.from_pretrained(tiny_checkpoint(tmp_path))

    def replicated(name: str, shape: tuple[int, ...], axis: int | None, shard: ShardSpec) -> TensorSlice:
        return TensorSlice(name, shape, None, 0, shape[0], shape)

    monkeypatch.setattr(sharding, "slice_tensor", replicated)
    expected = expectations(point(2), model, [])
    record = scaling_record(2)
    for rank in record["ranks"]:
        rank["weight_bytes"] = expected["weight_bytes"]  # what such an engine would hold
    record["expected"] |= {name: expected[name] for name in ("weight_bytes", "weight_bytes_of_all_ranks")}
    (outcome,) = (one for one in check_points([("a", "g", record)], Checks()) if one.check == "weight_bytes")
    assert outcome.failures and "2 ranks together hold" in outcome.failures[0]


@pytest.mark.parametrize(
    ("settings", "context", "most"),
    [
        ({"min_candidates": 64}, 1000, 256 - 8),  # a quarter is 15.6 pages, the newest one holds 8 of 16 tokens
        ({"min_candidates": 64}, 1024, 256),
        ({"min_candidates": 512}, 1000, 512 - 8),
        ({"min_candidates": 1024}, 1000, 1000),
        ({"min_candidates": 64, "min_context": 1001}, 1000, 1000),  # dense below it
        ({"selector": "full"}, 1000, 1000),
    ],
)
def test_twilight_attends_no_more_than_its_candidates(settings: dict[str, Any], context: int, most: int) -> None:
    config = resolve_sparse_config({"method": "twilight", **settings})
    assert config.most_attended_tokens(context, 16) == most


def test_where_rows_may_go_dense_there_is_no_bound_and_where_the_budget_decides_it_is_the_budget() -> None:
    assert resolve_sparse_config({"method": "vattention"}).most_attended_tokens(8192, 16) == 8192
    assert resolve_sparse_config({"method": "quest", "token_budget": 64}).most_attended_tokens(1000, 16) == 64 - 8


def test_the_bound_on_density_is_over_the_decode_steps_of_all_requests(tmp_path: Any) -> None:
    model = ModelConfig.from_pretrained(tiny_checkpoint(tmp_path))
    sparse = {"method": "twilight", "p": 0.9, "min_candidates": 32, "recent_pages": 1, "dense_layers": 1}
    times = [RequestTimes(0.0, 126, [], [0] * 3), RequestTimes(0.0, 127, [], [0] * 2)]  # contexts 127, 128; 128
    found = expectations(point(2, sparse=sparse), model, times)
    assert found["density"] == [1.0, None, None]
    assert found["density_at_most"] == [1.0, (31 + 32 + 32) / 383, (31 + 32 + 32) / 383]
