"""Captured decode steps, replayed: all of a step that changes reaches the device as data, and nothing stays as it was captured.

Graphs are emulated on a CPU, over the Triton kernels in the interpreter, in a process of its own:
`TRITON_INTERPRET=1 pytest tests/shard/test_emulated_graphs.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distributed_sparse.shard import graphs
from distributed_sparse.shard.graphs import DecodeGraphs
from distributed_sparse.shard.shard import Shard
from tests.support.checkpoints import tiny_checkpoint
from tests.support.emulated_graphs import EmulatedGraph, emulated_graphs
from tests.support.grids import corners
from tests.support.hash_weights import random_hash_weights
from tests.support.interpreter import INTERPRETED
from tests.support.methods import METHODS, sparse_settings
from tests.support.stepped_shard import SteppedShard
from tests.support.triton_path import triton_path

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")

CAPTURED: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    **{method: (method, {}) for method, case in METHODS.items() if case.captured},
    "quest below min_context": ("quest", {"min_context": 60}),
}
TWO_SETS = ("quest below min_context", "vattention")
"""The last steps' contexts are known to be dense to these."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    random_hash_weights(folder / "hash.safetensors", range(2), 4, 64)
    sizes: dict[str, Any] = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 64,
        "head_dim": 64,
    }
    return tiny_checkpoint(folder / "model", max_position_embeddings=1024, **sizes)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Actions of every replay."""
    seen: list[int] = []
    replay = EmulatedGraph.replay

    def spy(self: EmulatedGraph) -> None:
        seen.append(len(self.actions))
        replay(self)

    monkeypatch.setattr(EmulatedGraph, "replay", spy)
    yield seen


def stepped(path: Path, variant: str, longest: int) -> SteppedShard:
    method, changes = CAPTURED[variant]
    sparse = sparse_settings(method, str(path.parent / "hash.safetensors"), **changes)
    return SteppedShard(path, 130, sparse=sparse, max_model_len=longest + 40, max_num_seqs=4, max_num_batched_tokens=2048)


def decoded(engine: SteppedShard, monkeypatch: pytest.MonkeyPatch, longest: int) -> tuple[list[list[int]], Any]:
    """A life in few steps: contexts outgrow a page, sequences end, slots are given on, batches shrink and grow."""

    def steps(count: int) -> list[list[int]]:
        with triton_path(monkeypatch):
            return [engine.decode() for _ in range(count)]

    found = [engine.start([longest, 31, 7]).tokens]  # prompts are read by torch: the interpreter would take long
    found += steps(2)
    engine.end(1)
    found += steps(1)
    found.append(engine.start([50, 20], first_slot=1, temperature=0.8).tokens)
    engine.end(0)
    found += steps(1)
    report = engine.shard._report()
    return found, (report.rows_dense, report.rows_sparse, report.tokens_attended, report.bytes_read)


@pytest.mark.parametrize("method", corners(CAPTURED, kept=("quest below min_context",)))
def test_replayed_steps_give_the_tokens_and_counts_of_steps_that_were_never_captured(
    path: Path, method: str, replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = 980 if method == "vattention" else 130
    monkeypatch.setattr(graphs, "buckets", lambda most: [2, most])  # each takes its time in the interpreter
    plain = stepped(path, method, longest)
    expected, counts = decoded(plain, monkeypatch, longest)
    assert not replays
    monkeypatch.setattr(Shard, "_captures_graphs", lambda self, method: True)
    with emulated_graphs(monkeypatch):
        with triton_path(monkeypatch):
            captured = stepped(path, method, longest)
        found, counted = decoded(captured, monkeypatch, longest)
    assert isinstance(captured.shard.graphs, DecodeGraphs)
    assert len(replays) == 4 and len(set(replays)) == (2 if method in TWO_SETS else 1)
    assert found == expected
    assert counted == counts
    assert counts[1] > 0 or method == "dense"


@pytest.mark.slow
def test_candidates_that_a_captured_step_scores_are_counted_though_they_are_all_kept(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contexts below `min_candidates`: the host, which would score nothing for them, is asked before they are known."""
    from triton.runtime.interpreter import GridExecutor

    launch, launched = GridExecutor.__call__, []

    def noted(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        launched.append(self.fn.__name__)
        launch(self, *args, **kwargs)

    monkeypatch.setattr(graphs, "buckets", lambda most: [most])
    monkeypatch.setitem(CAPTURED, "twilight", ("twilight", {"min_candidates": 64}))
    scored = {}
    for captures in (False, True):
        monkeypatch.setattr(Shard, "_captures_graphs", lambda self, method, captures=captures: captures)
        with monkeypatch.context() as patch:
            patch.setattr(GridExecutor, "__call__", noted)
            with emulated_graphs(patch), triton_path(patch):
                engine = stepped(path, "twilight", 130)
                engine.start([30, 20])
                launched.clear()
                engine.decode()
        report, geometry = engine.shard._report(), engine.shard.geometry
        attended = sum(map(sum, report.tokens_attended)) * 2 * geometry.head_dim * 4
        estimated = (31 + 21) * geometry.num_kv_heads * (geometry.head_dim // 2 + 4)
        scored[captures] = report.bytes_read - attended - estimated
        assert ("_page_scores_kernel" in launched) == captures, "the case must be what its name says"
    bounds = (2 + 2) * geometry.num_kv_heads * 2 * geometry.head_dim * 4  # pages of 16
    assert scored == {False: 0, True: bounds}
