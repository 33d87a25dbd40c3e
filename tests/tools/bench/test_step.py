"""The step benchmark's model costs next to nothing, and runs wherever the engine does."""

from __future__ import annotations

import pytest

from distributed_sparse.shard.memory import HEAD_DIMS
from distributed_sparse.tools.bench.models import CONFIGS, NEGLIGIBLE
from distributed_sparse.tools.bench.step import StepSettings, bench_step

pytestmark = pytest.mark.usefixtures("one_thread")


def test_its_heads_are_of_a_size_that_kernels_on_a_gpu_have() -> None:
    assert CONFIGS[NEGLIGIBLE]["head_dim"] in HEAD_DIMS


def test_all_sequences_run_at_once_whatever_their_number_and_length() -> None:
    row = bench_step(StepSettings(tensor_parallel_size=1, batch=40, tokens=20))
    assert row["steps"] <= 20 + 2, "a sequence that waits for pages would add steps of its own"
    assert row["step_p50"] > 0 and row["bytes_ms"] > 0
