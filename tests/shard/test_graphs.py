"""Which shape a decode step takes: rows padded to the next bucket, contexts known to be dense apart from the others."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distributed_sparse.cache import Geometry
from distributed_sparse.config import EngineConfig
from distributed_sparse.protocol.step import DecodeRow, PrefillChunk, StepPlan
from distributed_sparse.selection import build_policies, resolve_sparse_config
from distributed_sparse.selection.base import Policy
from distributed_sparse.shard.attention import SparseAttention
from distributed_sparse.shard.batch import StepBatch
from distributed_sparse.shard.collectives.collectives import Collectives
from distributed_sparse.shard.graphs import DecodeGraphs, DecodeShape, DecodeShapes, buckets, dense_until, reserve, why_eager
from distributed_sparse.shard.memory import warm_up_plan
from distributed_sparse.shard.shard import Shard
from tests.support.checkpoints import tiny_checkpoint
from tests.support.hash_weights import random_hash_weights

GEOMETRY = Geometry(
    num_kv_heads=2, group_size=2, head_dim=16, page_size=16, dtype=torch.float32, device=torch.device("cpu"), first_kv_head=0
)
LONGEST = 4096


def policies(sparse: dict[str, Any], num_layers: int = 4) -> list[Policy]:
    return build_policies(sparse["method"], resolve_sparse_config(sparse), num_layers, GEOMETRY)


def plan(*contexts: int, **given: Any) -> StepPlan:
    """Decode rows that make contexts so long."""
    decode = [DecodeRow(slot=slot, position=length - 1, token=None, samples=[slot]) for slot, length in enumerate(contexts)]
    return StepPlan(step=1, generation=0, decode=decode, **given)


# ---- buckets


@pytest.mark.parametrize(
    ("max_num_seqs", "expected"),
    [
        (1, [1]),
        (2, [1, 2]),
        (3, [1, 2, 3]),
        (8, [1, 2, 4, 8]),
        (9, [1, 2, 4, 8, 9]),
        (64, [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]),
    ],
)
def test_buckets_end_with_the_largest_batch(max_num_seqs: int, expected: list[int]) -> None:
    assert buckets(max_num_seqs) == expected


@given(max_num_seqs=st.integers(1, 300), share=st.floats(0, 1))
def test_a_step_is_padded_by_less_than_eight_rows_and_never_beyond_the_largest_batch(max_num_seqs: int, share: float) -> None:
    rows = 1 + round(share * (max_num_seqs - 1))
    shape = DecodeShapes(max_num_seqs, 0, 100).of(plan(*[7] * rows))
    assert shape is not None and rows <= shape.num_rows <= max_num_seqs
    assert shape.num_rows - rows < min(8, rows + 1)


# ---- sets


@pytest.mark.parametrize(
    ("sparse", "expected"),
    [
        ({"method": "dense"}, LONGEST),
        ({"method": "quest", "token_budget": 2048}, 2048),
        ({"method": "quest", "token_budget": 100, "min_context": 1000}, 999),
        ({"method": "window", "token_budget": 100}, 112),  # whole pages
        ({"method": "random", "token_budget": 8192}, LONGEST),
        ({"method": "quest", "token_budget": 64, "layers": [{"range": "3", "token_budget": 256}]}, 64),
        ({"method": "quest", "token_budget": 64, "dense_layers": 3, "layers": [{"range": "3", "min_context": 501}]}, 500),
        ({"method": "twilight", "p": 0.9}, 0),
        ({"method": "twilight", "p": 0.9, "min_context": 300}, 299),
        ({"method": "vattention", "sink_tokens": 16, "window_tokens": 16}, 577),
    ],
)
def test_contexts_are_dense_up_to_where_the_first_layer_becomes_sparse(sparse: dict[str, Any], expected: int) -> None:
    found = dense_until(policies(sparse), 16, LONGEST)
    assert found == expected
    for context_len in {1, found // 2, found - 1, found, found + 1, found + 200, LONGEST}:
        if 1 <= context_len <= LONGEST:
            attended = {policy.config.attended_tokens(context_len, 16) for policy in policies(sparse)}
            assert (attended == {context_len}) == (context_len <= found), context_len


def test_a_method_from_outside_that_says_nothing_has_no_dense_set() -> None:
    found = dense_until(policies({"method": "tests.support.outside_policy:EveryOtherPolicy"}), 16, LONGEST)
    assert found == 0
    shapes = DecodeShapes(2, found, LONGEST)
    assert list(shapes) == [(2, LONGEST), (1, LONGEST)] and len(shapes) == 2


def test_a_step_takes_the_dense_set_only_if_all_its_contexts_are_dense() -> None:
    shapes = DecodeShapes(20, 999, LONGEST)
    assert shapes.of(plan(999, 5, 30)) == DecodeShape(4, 999)
    assert shapes.of(plan(999, 1000, 30)) == DecodeShape(4, LONGEST)
    assert shapes.of(plan(*[1] * 17)) == DecodeShape(20, 999)
    assert shapes.of(plan(LONGEST)) == DecodeShape(1, LONGEST)
    assert {shapes.of(plan(*[length] * rows)) for rows in range(1, 21) for length in (3, 3000)} == set(shapes)


def test_a_dense_method_has_one_set() -> None:
    shapes = DecodeShapes(4, LONGEST, LONGEST)
    assert [*shapes] == [(4, LONGEST), (2, LONGEST), (1, LONGEST)] and len(shapes) == 3


def test_shapes_come_largest_first() -> None:
    """So that the memory of the first holds those that follow."""
    assert [*DecodeShapes(3, 64, 500)] == [(3, 500), (3, 64), (2, 500), (2, 64), (1, 500), (1, 64)]


def test_prompt_tokens_traces_and_times_have_no_shape() -> None:
    shapes = DecodeShapes(4, 0, 100)
    chunk = PrefillChunk(slot=3, start=0, tokens=[1, 2], samples=[])
    traced = plan(5, 6)
    traced.decode[1].trace = True
    assert shapes.of(plan(5, 6, prefill=[chunk])) is shapes.of(plan(prefill=[chunk])) is shapes.of(plan()) is None
    assert shapes.of(traced) is shapes.of(plan(5, 6, profile=True)) is None
    assert shapes.of(plan(5, 6, report=True)) == (2, 100)


# ---- whether at all


def test_graphs_are_off_where_the_user_says_so_or_a_method_reads_the_device(tmp_path: Path) -> None:
    weights = random_hash_weights(tmp_path / "hash.safetensors", range(4), 4, 16)
    for sparse in (
        {"method": "dense"},
        {"method": "quest"},
        {"method": "twilight"},
        {"method": "vattention", "selector": "hash", "hash_weights": weights},
        {"method": "hash", "hash_weights": weights},
        {"method": "window"},
        {"method": "random"},
    ):
        assert why_eager(False, policies(sparse), sparse["method"]) is None
        assert why_eager(True, policies(sparse), sparse["method"]) == "enforce_eager is true"
    for sparse in (
        {"method": "oracle_topk"},
        {"method": "tova"},
        {"method": "twilight", "selector": "oracle"},
        {"method": "vattention", "selector": "oracle"},
    ):
        reason = why_eager(False, policies(sparse), sparse["method"])
        assert reason is not None and repr(sparse["method"]) in reason
    outside = "tests.support.outside_policy:EveryOtherPolicy"
    assert outside in str(why_eager(False, policies({"method": outside}), outside))


def test_a_cpu_captures_nothing(tmp_path: Path) -> None:
    config = EngineConfig(model=str(tiny_checkpoint(tmp_path)), device="cpu", max_model_len=64, max_num_seqs=2)
    shard = Shard(config, 0, 1, Collectives())
    shard.allocate(shard.load().max_pages)
    assert shard.graphs is None
    shard.close()


def test_a_later_allocation_runs_over_the_new_slots(tmp_path: Path) -> None:
    """What a step's shape reads is what it was made for: after a rebuild it is made anew, and closed with the shard."""
    config = EngineConfig(model=str(tiny_checkpoint(tmp_path)), device="cpu", max_model_len=64, max_num_seqs=2)
    shard = Shard(config, 0, 1, Collectives(), fixed_shapes=True)
    pages = shard.load().max_pages
    shard.allocate(pages)
    before, slots = shard.graphs, shard.slots
    shard.allocate(pages)
    assert isinstance(shard.graphs, DecodeGraphs) and shard.graphs is not before and shard.slots is not slots
    assert shard.attention.rows == (0, 0) and shard.attention.bytes_read == 0  # what was run to get ready counts for nothing
    shard.close()
    assert shard.graphs is None


# ---- memory


def test_no_batch_is_left_when_the_memory_of_graphs_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its page table would be freed between the two measurements, and hide as many bytes of the graphs'."""
    batches: list[weakref.ref[StepBatch]] = []
    left: list[int] = []
    begin = SparseAttention.begin

    def noted(self: SparseAttention, batch: StepBatch, *rest: Any) -> None:
        batches.append(weakref.ref(batch))
        begin(self, batch, *rest)

    def measured(device: Any = None) -> tuple[int, int]:
        left.append(sum(batch() is not None for batch in batches))
        return 1000, 2000

    monkeypatch.setattr(SparseAttention, "begin", noted)
    monkeypatch.setattr(torch.cuda, "mem_get_info", measured)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    config = EngineConfig(model=str(tiny_checkpoint(tmp_path)), device="cpu", max_model_len=64, max_num_seqs=2)
    shard = Shard(config, 0, 1, Collectives())
    shard.load()
    monkeypatch.setattr(DecodeGraphs, "prepare", lambda self, wanted: shard.run(warm_up_plan(2, 32, [])))
    shard._captures = True
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    with torch.inference_mode():
        assert shard._profile_memory() == 0
    assert len(batches) == 3, "the largest step, and twice those that stand for captured ones"
    assert left == [0, 1, 0, 1]  # before and after each of the two


def test_the_pool_is_reserved_once_and_what_a_graph_keeps_as_often_as_there_are_graphs() -> None:
    assert reserve(pool_bytes=1000, free_before=5000, free_after=3800, num_captured=2, num_graphs=22) == 1000 + 11 * 200
    assert reserve(pool_bytes=1000, free_before=5000, free_after=4000, num_captured=1, num_graphs=11) == 1000
    # another process gave memory back meanwhile
    assert reserve(pool_bytes=1000, free_before=5000, free_after=4500, num_captured=1, num_graphs=11) == 1000
