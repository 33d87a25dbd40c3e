"""The load: every way of asking is judged, none is forgotten, and one that does not end is lost."""

from __future__ import annotations

import threading
import time

import pytest

from distributed_sparse.client.client import EngineError
from distributed_sparse.sampling_params import SamplingParams
from distributed_sparse.tools.chaos.outcome import ABORTED, COMPLETED, LOST, TIMED_OUT, Outcome
from distributed_sparse.tools.chaos.soak_load import Load
from distributed_sparse.tools.chaos.soak_workload import PooledRequest
from tests.support.patience import WAIT_S
from tests.support.soaked_engine import SoakedEngine, output

PARAMS = SamplingParams(max_tokens=60)
POOL = [PooledRequest([1], PARAMS, output(PARAMS).outputs)]


def outcomes_of(engine: SoakedEngine, count: int = 200) -> list[Outcome]:
    load = Load(engine, POOL, num_clients=3, seed=0)  # type: ignore[arg-type]
    load.start()
    deadline = time.monotonic() + WAIT_S
    while len(load.outcomes) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    load.finish(20.0)
    return load.outcomes


def test_requests_are_completed_aborted_left_and_time_out_and_none_is_lost() -> None:
    engine = SoakedEngine()
    outcomes = outcomes_of(engine)
    assert {outcome.how for outcome in outcomes} == {COMPLETED, ABORTED, TIMED_OUT}
    assert not any(outcome.differs for outcome in outcomes) and engine.left > 0
    assert {outcome.tokens for outcome in outcomes if outcome.how == TIMED_OUT} == {2}


def test_tokens_that_differ_are_seen_in_every_way_of_asking() -> None:
    engine = SoakedEngine(wrong=True)
    for _ in range(2):
        engine.generate([], [], use_tqdm=False)
    outcomes = outcomes_of(engine)
    assert len(outcomes) >= 200
    assert all(outcome.differs for outcome in outcomes if outcome.how != TIMED_OUT)
    assert {outcome.how for outcome in outcomes if outcome.differs} == {COMPLETED, ABORTED}


def test_an_engine_that_has_ended_loses_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise EngineError("gone")

    monkeypatch.setattr("distributed_sparse.tools.chaos.soak_load.LOST_PAUSE_S", 0.0)
    outcomes = outcomes_of(SoakedEngine(before=fail))
    assert {(outcome.how, outcome.detail) for outcome in outcomes} == {(LOST, "EngineError: gone")}


@pytest.mark.parametrize("forget", [False, True])
def test_a_request_that_does_not_end_is_lost_unless_it_is_forgotten(forget: bool) -> None:
    asked, go_on = threading.Semaphore(0), threading.Event()

    def hold() -> None:
        asked.release()
        go_on.wait(20)

    load = Load(SoakedEngine(before=hold), POOL, num_clients=2, seed=1)  # type: ignore[arg-type]
    load.start()
    assert asked.acquire(timeout=WAIT_S) and asked.acquire(timeout=WAIT_S)
    if forget:
        load.stop()
    else:
        load.finish(0.05)
    held = load.outcomes
    assert ([outcome.how for outcome in held[:2]] == [LOST, LOST]) is not forget and bool(held) is not forget
    go_on.set()
    time.sleep(0.2)
    assert load.outcomes == held, "what ends later is not counted again"
