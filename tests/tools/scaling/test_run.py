"""A scaling run through the real engine: a fresh one per point, kept at once, gone on with where it was stopped."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from distributed_sparse.config import EngineConfig
from distributed_sparse.driver.driver import Driver
from distributed_sparse.llm import LLM
from distributed_sparse.protocol.step import StepPlan
from distributed_sparse.tools.common.results import Results
from distributed_sparse.tools.scaling.grid import ScalingConfig
from distributed_sparse.tools.scaling.leaks import Surroundings
from distributed_sparse.tools.scaling.run_grid import Scaling
from tests.support.checkpoints import tiny_checkpoint
from tests.support.engine import make_llm
from tests.support.grids import corners

pytestmark = pytest.mark.usefixtures("one_thread")

QUEST = {"method": "quest", "token_budget": 32, "recent_pages": 1, "dense_layers": 1}


class Engines:
    """Opens engines, of several ranks in processes without Ray; remembers which, and refuses some."""

    def __init__(self) -> None:
        self.opened: list[tuple[int, str]] = []
        self.refused: int | None = None
        self.error: Exception = RuntimeError("no such ranks today")

    @contextmanager
    def __call__(self, config: EngineConfig) -> Iterator[LLM]:
        assert config.sparse is not None
        self.opened.append((config.tensor_parallel_size, config.sparse["method"]))
        if config.tensor_parallel_size == self.refused:
            raise self.error
        settings = asdict(config)
        with make_llm(settings.pop("model"), settings.pop("tensor_parallel_size"), **settings) as llm:
            yield llm


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_checkpoint(tmp_path_factory.mktemp("model")))


def configured(model: str, grid: dict[str, Any], checks: dict[str, Any] | None = None, **base: Any) -> ScalingConfig:
    given = {
        "base": {"model": model, "device": "cpu", "kv_cache_memory_bytes": 8 << 20, **base},
        "workload": {"input_len": 60, "output_len": 6, "batch": 2, "num_prompts": 3, "warm_up": 1},
        "grid": {"sparse": [QUEST], **grid},
        "checks": checks or {},
    }
    return ScalingConfig.from_dict(given, "a.yaml")


def run(directory: Path, config: ScalingConfig, engines: Engines) -> tuple[list[Any], dict[str, list[Any]]]:
    """The records in the order of the grid, and the failures of each check that was made."""
    with Results(directory, {"kind": "scaling"}) as results:
        scaling = Scaling(config, engines)
        scaling.run(results)
        found: dict[str, list[Any]] = {}
        for outcome in scaling.outcomes(results):
            found.setdefault(outcome.check, []).extend(outcome.failures or [])
        return [record for _, record in scaling.records(results)], found


@pytest.fixture(scope="module")
def measured(model: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory, engines = tmp_path_factory.mktemp("run"), Engines()
    config = configured(model, {"tensor_parallel_size": [2, 1]})
    return directory, config, engines, *run(directory, config, engines)


def test_every_point_passes_every_check(measured: Any) -> None:
    *_, records, failures = measured
    assert [record.get("error") for record in records] == [None, None]
    assert failures == {name: [] for name in ("weight_bytes", "cache_bytes", "all_reduce", "density", "leaks", "tokens")}


def test_the_fewest_ranks_come_first_and_give_the_tokens_that_the_others_are_held_against(measured: Any) -> None:
    _, _, engines, (two, one), _ = measured
    assert engines.opened == [(1, "quest"), (2, "quest")]
    assert "reference" in one and "reference" not in two
    assert one["token_ids"] == two["token_ids"] == one["reference"]["token_ids"]
    assert [len(tokens) for tokens in one["token_ids"]] == [6, 6, 6]


def test_counters_are_of_the_measured_requests_alone(measured: Any) -> None:
    _, _, _, (two, one), _ = measured
    tokens, layers, hidden = 3 * (60 + 5), 3, 64
    assert two["all_reduce"]["bytes"] == (2 * layers + 1) * tokens * hidden * 4
    assert one["all_reduce"] == {"calls": 0, "bytes": 0}
    # contexts 61..65 have 4 or 5 pages, of which 2 are kept
    expected = sum(n - (-(-n // 16) - 2) * 16 for n in range(61, 66)) / sum(range(61, 66))
    assert one["density"]["layers"][1] == pytest.approx([expected] * 4, rel=1e-5)
    assert two["density"]["ranks"] == pytest.approx([expected] * 2, rel=1e-5) and two["density"]["skew"] == pytest.approx(1)
    assert one["requests_per_s"] == pytest.approx(3 / one["duration_s"], rel=1e-4)
    assert one["tpot_ms"]["p99"] >= one["tpot_ms"]["median"] > 0


@pytest.mark.slow
def test_cache_bytes_are_those_that_each_rank_itself_has_read(model: str, tmp_path: Path) -> None:
    """Twilight's counts follow the data, so ranks read unequal shares: each shows its own, and none the mean."""
    twilight = {"method": "twilight", "p": 0.3, "selector": "full", "recent_pages": 1, "dense_layers": 1}
    config = configured(model, {"sparse": [twilight], "tensor_parallel_size": [2]})
    (record,), _ = run(tmp_path, config, Engines())
    read, density = record["cache_bytes_read_per_step"], record["density"]["layers"]
    contexts = [n for n in range(61, 66)]
    of_head = 2 * 16 * 4  # K and V of a token, head_dim 16
    keys = sum(contexts) * 2 * (16 // 2 + 4) * 2  # codes and scales: two KV heads of a rank, two layers
    for rank, heads in enumerate((slice(0, 2), slice(2, 4))):
        attended = sum(sum(layer[heads]) for layer in density) * sum(contexts)
        assert read[rank] == pytest.approx(2 * (attended * of_head + keys) / len(contexts), rel=1e-4)
    assert len(read) == 2 and read[0] != pytest.approx(read[1], rel=1e-3), "the case must tell a mean from each rank's own"


def test_no_step_whose_latency_is_measured_takes_the_times_of_its_parts(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those are taken afterwards, of a batch of their own, in steps that decode all of it."""
    sent: list[StepPlan] = []
    send = Driver._send

    def noted(self: Driver, plan: StepPlan, began: float) -> None:
        sent.append(plan)
        send(self, plan, began)

    monkeypatch.setattr(Driver, "_send", noted)
    given = {"workload.output_len": [40], "workload.num_prompts": [2], "workload.warm_up": [2]}
    config = configured(model, given, {"tokens": False}, max_num_batched_tokens=48)
    (record,), failures = run(tmp_path, config, Engines())
    assert not any(failures.values())
    profiled = [place for place, plan in enumerate(sent) if plan.profile]
    decoded = [place for place, plan in enumerate(sent) if plan.decode]
    measured = [place for place in decoded if place < profiled[0]]
    assert len(measured) >= 2 * 39, "all of warm-up and measurement comes first"
    assert len(profiled) == 8 and all(len(sent[place].decode) == 2 and not sent[place].prefill for place in profiled)
    longest = max(row.end for place in profiled for row in sent[place].decode)
    assert 60 + 10 < longest < 60 + 30, "in the middle of the contexts that are measured"
    parts = record["time_ms"]
    assert parts["shard"] > parts["select"] + parts["attend"] > 0


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_point_shows_the_parts_of_its_steps(measured: Any, num_ranks: int) -> None:
    record = measured[3][2 - num_ranks]
    assert record["time_ms"]["shard"] > 0 and ("all_reduce" in record["time_ms"]) == (num_ranks == 2)


def test_an_interval_of_profile_steps_is_refused_since_they_would_be_measured(model: str) -> None:
    with pytest.raises(ValueError, match="profile_interval=4 would time the parts of steps whose latencies are measured"):
        configured(model, {}, profile_interval=4)


@pytest.mark.slow
def test_what_is_finished_is_not_run_again_and_other_points_are_added(model: str, measured: Any, tmp_path: Path) -> None:
    directory, config, *_ = measured
    engines = Engines()
    run(directory, config, engines)
    assert engines.opened == []
    run(directory, configured(model, {"tensor_parallel_size": [1, 2], "batch": [1, 2]}), engines)
    assert engines.opened == [(1, "quest"), (2, "quest")]  # batch 1 alone


@pytest.mark.slow
def test_a_point_that_fails_is_kept_with_its_error_the_others_go_on_and_it_is_tried_again(model: str, tmp_path: Path) -> None:
    engines = Engines()
    engines.refused = 1
    config = configured(model, {"tensor_parallel_size": [1, 2]})
    (one, two), failures = run(tmp_path, config, engines)
    assert one["error"] == "RuntimeError: no such ranks today" and "error" not in two
    assert failures["tokens"] == ["its reference failed"]
    engines.refused = None
    engines.opened.clear()
    (one, two), failures = run(tmp_path, config, engines)
    assert engines.opened == [(1, "quest")] and failures["tokens"] == []


@pytest.mark.parametrize(
    "error", [KeyError("rank"), *(pytest.param(e, marks=pytest.mark.slow) for e in (TypeError(), MemoryError()))]
)
@pytest.mark.slow
def test_no_error_of_a_point_ends_the_run_and_its_traceback_is_logged(
    error: Exception, model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engines = Engines()
    engines.refused, engines.error = 1, error
    (one, two), _ = run(tmp_path, configured(model, {"tensor_parallel_size": [1, 2]}), engines)
    assert one["error"].startswith(type(error).__name__) and "error" not in two
    assert "in __call__" in caplog.text and "tensor_parallel_size=1 failed" in caplog.text


@pytest.mark.slow
def test_what_a_failed_point_leaves_behind_is_reported_with_it_and_not_taken_for_granted_afterwards(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end, opened = threading.Event(), Engines()
    left_behind = Surroundings.left_behind
    monkeypatch.setattr(Surroundings, "left_behind", lambda self: left_behind(self, timeout=0.5))

    @contextmanager
    def leaking(config: EngineConfig) -> Iterator[LLM]:
        with opened(config) as llm:
            if config.tensor_parallel_size == 1:
                threading.Thread(target=end.wait, name="driver", daemon=True).start()
                raise RuntimeError("and its thread stays")
            yield llm

    try:
        with Results(tmp_path, {"kind": "scaling"}) as results:
            scaling = Scaling(configured(model, {"tensor_parallel_size": [1, 2]}), leaking)
            scaling.run(results)
            (_, one), (_, two) = scaling.records(results)
            failures = [outcome.failures for outcome in scaling.outcomes(results) if outcome.check == "leaks"]
    finally:
        end.set()
    assert one["error"] == "RuntimeError: and its thread stays" and one["left_behind"] == ["thread driver"]
    assert two["left_behind"] == ["thread driver, since an earlier point"]
    assert all(failures) and len(failures) == 2


def test_a_leak_check_that_fails_itself_fails_the_check_and_not_the_run(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(self: Surroundings) -> list[str]:
        raise ConnectionError("the cluster does not answer")

    monkeypatch.setattr(Surroundings, "left_behind", lost)
    (record,), failures = run(tmp_path, configured(model, {}), Engines())
    assert failures["leaks"] == ["left behind: unknown: ConnectionError: the cluster does not answer"]
    assert "error" not in record


@pytest.mark.parametrize("dtype", corners(["float32", "bfloat16"], kept=("bfloat16",)))
@pytest.mark.slow
def test_fewer_compared_prompts_go_on_in_a_directory_of_more(dtype: str, model: str, tmp_path: Path) -> None:
    given = {"agreement": 0.8, "compared_prompts": 3}
    engines = Engines()
    run(tmp_path, configured(model, {"tensor_parallel_size": [1, 2]}, given, dtype=dtype), engines)
    for compared in (2, 1):
        lowered = configured(model, {"tensor_parallel_size": [1, 2, 4]}, given | {"compared_prompts": compared}, dtype=dtype)
        engines.opened.clear()
        (_, same, four), failures = run(tmp_path, lowered, engines)
        assert engines.opened == ([(4, "quest")] if compared == 2 else []) and failures["tokens"] == []
        assert len(same["token_ids"]) == 3 and len(four["token_ids"]) == 2


@pytest.mark.slow
def test_low_precision_is_held_against_the_tokens_of_the_fewest_ranks(model: str, tmp_path: Path) -> None:
    config = configured(model, {"tensor_parallel_size": [1, 2]}, {"compared_prompts": 2, "agreement": 0.8}, dtype="bfloat16")
    (one, two), failures = run(tmp_path, config, Engines())
    assert two["compared_with"] == one["key"] and len(one["reference"]["token_ids"]) == 2
    assert failures["tokens"] == [] and two["dtype"] == "bfloat16"


def test_ranks_on_other_nodes_than_asked_for_are_a_failed_point(model: str, tmp_path: Path) -> None:
    (record,), _ = run(tmp_path, configured(model, {"nodes": [2]}), Engines())
    assert "the ranks are on 1 nodes, not nodes=2" in record["error"]


def test_a_single_output_token_has_neither_tpot_nor_density(model: str, tmp_path: Path) -> None:
    config = configured(model, {"workload.output_len": [1]})
    (record,), failures = run(tmp_path, config, Engines())
    assert record["tpot_ms"] is None and record["density"]["layers"] is record["cache_bytes_read_per_step"] is None
    assert "shard" not in record["time_ms"]
    assert not any(failures.values())


def test_settings_that_do_not_hold_for_the_model_are_refused_before_any_engine_is_made(model: str) -> None:
    with pytest.raises(ValueError, match="tensor_parallel_size=3: tensor_parallel_size=3 does not divide"):
        Scaling(configured(model, {"tensor_parallel_size": [1, 3]}))
    with pytest.raises(ValueError, match=r"input_len \+ output_len = 66 tokens are over max_model_len=50"):
        Scaling(configured(model, {}, max_model_len=50))
