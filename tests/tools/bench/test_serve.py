"""Requests arrive whether or not the engine keeps up, and what is told of them is what `vllm bench serve` would tell."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from distributed_sparse.client.client import EngineError
from distributed_sparse.selection import base
from distributed_sparse.tools.bench import serve as serve_module
from distributed_sparse.tools.bench.serve import Served, ServeSettings, arrival_times, bench_serve, serve, summary
from distributed_sparse.tools.common.latency import RequestTimes
from tests.support.bench_models import tiny_shape

pytestmark = pytest.mark.usefixtures("one_thread")


def test_poisson_arrivals_have_their_rate_and_follow_from_the_seed() -> None:
    times = arrival_times(20_000, 50.0, 1.0, seed=3)
    gaps = np.diff([0.0, *times])
    assert times == arrival_times(20_000, 50.0, 1.0, seed=3) != arrival_times(20_000, 50.0, 1.0, seed=4)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.03) and (gaps > 0).all()


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0, math.inf])
def test_the_last_request_arrives_when_the_rate_says_whatever_was_drawn(burstiness: float) -> None:
    """As vLLM has it: gaps are stretched together, so that no draw of the seed changes the load."""
    for seed in range(3):
        times = arrival_times(7, 2.0, burstiness, seed)
        assert times[-1] == pytest.approx(7 / 2.0) and times[0] > 0 and times == sorted(times)


def test_burstiness_changes_the_spread_of_the_gaps() -> None:
    for burstiness in (0.25, 4.0):
        gaps = np.diff([0.0, *arrival_times(20_000, 50.0, burstiness, seed=0)])
        assert gaps.std() == pytest.approx(1 / 50 / math.sqrt(burstiness), rel=0.05)
    assert arrival_times(4, 2.0, math.inf, seed=0) == [0.5, 1.0, 1.5, 2.0]
    assert arrival_times(3, math.inf, 1.0, seed=0) == [0.0, 0.0, 0.0]


class SlowLLM:
    """Takes 50 ms to take a request in, and `answer_s` to answer; fails where the prompt says so."""

    def __init__(self, answer_s: float = 0.02) -> None:
        self.answer_s = answer_s
        self.sent: list[float] = []

    def stream(self, prompt: list[int], params: Any) -> AsyncIterator[Any]:
        self.sent.append(time.monotonic())
        time.sleep(0.05)
        return self._answer(prompt, params)

    async def _answer(self, prompt: list[int], params: Any) -> AsyncIterator[Any]:
        for count in range(1, params.max_tokens + 1):
            await asyncio.sleep(self.answer_s / params.max_tokens)
            if prompt[0] < 0:
                raise EngineError("the engine has stopped")
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7] * count)], error=None)


def test_a_slow_engine_does_not_slow_arrivals() -> None:
    llm = SlowLLM(answer_s=1.5)
    due = [0.02 * number for number in range(4)]
    served, duration = asyncio.run(serve(llm, [[1]] * 4, due, 5))  # type: ignore[arg-type]
    assert max(llm.sent) < min(one.times.arrivals[-1] for one in served), "the last was sent before the first was answered"
    for one, after in zip(served, due):
        assert one.due == pytest.approx(served[0].due + after) and one.times.sent >= one.due
        assert len(one.times.arrivals) == 5 and one.error is None
        assert one.times.ttft >= 0.05, "what the engine takes to take a request in is the engine's time"
    ends = [one.times.arrivals[-1] for one in served]
    assert duration >= max(ends) - served[0].due, "from the start, before the first gap, until the last has ended"


def test_failed_requests_are_counted_and_named() -> None:
    served, duration = asyncio.run(serve(SlowLLM(), [[1], [-1], [1]], [0.0] * 3, 2))  # type: ignore[arg-type]
    row = summary(served, duration)
    assert (row["completed"], row["failed"], row["errors"]) == (2, 1, ["the engine has stopped"])
    assert row["total_output_tokens"] == 4
    everything = summary([served[1]], duration)
    assert everything["failed"] == 1 and "no request was completed: the engine has stopped" in everything["wrong"]


def test_latencies_are_as_vllm_defines_them() -> None:
    first = RequestTimes(10.0, 100, [10.5, 10.6, 10.9], [1, 2, 3])
    second = RequestTimes(11.0, 50, [12.0], [1])
    row = summary([Served(first, 10.0), Served(second, 10.75)], 2.5)
    assert row["mean_ttft_ms"] == pytest.approx(750) and row["mean_tpot_ms"] == pytest.approx(200)
    assert row["mean_itl_ms"] == pytest.approx(200) and row["p99_itl_ms"] == pytest.approx(298)
    assert row["mean_e2el_ms"] == pytest.approx(950) and row["median_e2el_ms"] == pytest.approx(950)
    assert row["duration"] == 2.5 and row["request_throughput"] == pytest.approx(0.8)
    assert row["output_throughput"] == pytest.approx(1.6) and row["total_token_throughput"] == pytest.approx(61.6)
    assert row["max_send_delay_ms"] == pytest.approx(250)


@pytest.fixture
def settings(tmp_path: Path) -> ServeSettings:
    return ServeSettings(
        model=str(tiny_shape(tmp_path)),
        request_rate=(200.0, math.inf),
        num_prompts=5,
        random_input_len=120,
        random_output_len=6,
        num_warmups=2,
        rounds=2,
        set=("sparse.token_budget=48",),
    )


def test_each_method_serves_the_same_requests_at_each_rate(settings: ServeSettings) -> None:
    rows = bench_serve(settings)
    assert [(row["method"], row["request_rate"]) for row in rows] == [
        ("dense", 200.0), ("dense", "inf"), ("quest", 200.0), ("quest", "inf"),
    ]  # fmt: skip
    for row in rows:
        assert (row["completed"], row["failed"]) == (5, 0)
        assert (row["total_input_tokens"], row["total_output_tokens"]) == (600, 30)
        assert row["request_throughput"] * row["duration"] == pytest.approx(5)
        assert row["min_output_throughput"] == row["output_throughput"] <= row["max_output_throughput"]  # of two the slower
        assert row["mean_e2el_ms"] >= row["mean_ttft_ms"] > 0 and row["max_send_delay_ms"] >= 0
    assert rows[0]["greedy_agreement"] == rows[1]["greedy_agreement"] == 1.0
    assert rows[0]["duration"] > arrival_times(5, 200.0, 1.0, 0)[-1], "the last arrives in time, and ends later"


def test_of_several_rounds_the_median_one_is_reported_and_no_error_is_lost() -> None:
    rounds = [{"output_throughput": speed, "errors": errors} for speed, errors in ((3.0, []), (1.0, ["slow"]), (2.0, []))]
    row = serve_module.median_round(rounds)
    assert row == {"output_throughput": 2.0, "errors": ["slow"], "min_output_throughput": 1.0, "max_output_throughput": 3.0}
    assert serve_module.median_round([*rounds, {"wrong": "tokens differ"}]) == {"wrong": "tokens differ"}


def test_no_speed_of_a_dense_engine_that_decodes_otherwise_than_it_prefills(
    settings: ServeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = base.attend
    monkeypatch.setattr(base, "attend", lambda *arguments, **options: -2 * right(*arguments, **options))
    rows = bench_serve(settings)
    for row in rows[:2]:
        assert "is behind the best one of its prefill" in row["wrong"] and "duration" not in row


def test_an_engine_that_cannot_be_made_is_told_and_the_others_serve(
    settings: ServeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = serve_module._engine

    def engine(settings: ServeSettings, model: Any, sparse: Any, *rest: Any) -> Any:
        if sparse["method"] == "dense":
            raise EngineError("a shard did not come up")
        return right(settings, model, sparse, *rest)

    monkeypatch.setattr(serve_module, "_engine", engine)
    rows = bench_serve(settings)
    why = "dense failed: EngineError: a shard did not come up"
    assert rows[0] == {"method": "dense", "wrong": why, "tensor_parallel_size": 1}
    assert [row["completed"] for row in rows[1:]] == [5, 5]


def test_settings_that_cannot_be_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="--num-prompts 0 is below 1"):
        ServeSettings(num_prompts=0)
    with pytest.raises(ValueError, match=r"--burstiness \(0\.0,\) must be above 0"):
        ServeSettings(burstiness=0.0)
