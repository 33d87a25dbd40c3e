"""The deadline of a step follows the steps of its own kind, so that a healthy rank is never taken for a hung one."""

from __future__ import annotations

import pytest

from distributed_sparse.driver.step_times import (
    EMPTY_STEP_TIMEOUT_S,
    FIRST_STEPS_TIMEOUT_S,
    TIMEOUT_FLOOR_S,
    StepClock,
    StepTimes,
)
from distributed_sparse.protocol.step import DecodeRow, PrefillChunk, StepPlan, StepResult


def prefill(num_tokens: int) -> StepPlan:
    return StepPlan(step=0, generation=0, prefill=[PrefillChunk(slot=0, start=0, tokens=[1] * num_tokens, samples=[])])


def decode(rows: int) -> StepPlan:
    return StepPlan(step=0, generation=0, decode=[DecodeRow(slot, 100, None, [slot]) for slot in range(rows)])


def after(plan: StepPlan, seconds: float, times: StepTimes, count: int = 20, from_store: int = 0) -> None:
    for _ in range(count):
        clock = StepClock(
            sent=0.001, received=0.001 + seconds, received_before=-0.001, driver=0.002, cpu=0.0005, same_clock=True
        )
        result = StepResult(step=0, rank=0, started=0.002, step_ms=seconds * 900, prefill_from_store=from_store)
        times.add(plan, [result], clock)


def test_short_prompts_do_not_set_the_deadline_of_long_ones() -> None:
    times = StepTimes(None)
    after(prefill(10), 0.3, times)
    assert times.timeout(prefill(10)) == pytest.approx(6.0)
    assert times.timeout(prefill(2048)) == FIRST_STEPS_TIMEOUT_S


def test_fast_steps_have_the_floor_and_slow_ones_twenty_times_their_p99() -> None:
    times = StepTimes(None)
    after(decode(4), 0.001, times)
    after(decode(64), 1.0, times)
    assert times.timeout(decode(4)) == TIMEOUT_FLOOR_S
    assert times.timeout(decode(64)) == pytest.approx(20.0)


def test_prompts_from_the_store_do_not_set_the_deadline_of_computed_ones() -> None:
    times = StepTimes(None)
    after(prefill(2048), 0.1, times, from_store=2048)
    assert times.timeout(prefill(2048)) == FIRST_STEPS_TIMEOUT_S
    after(prefill(2048), 30.0, times)
    assert times.timeout(prefill(2048)) == pytest.approx(600.0)


def test_a_traced_step_is_not_held_to_the_deadline_of_the_others() -> None:
    """It reads the whole cache of its rows in every layer: a hundred times what the step takes otherwise."""
    times = StepTimes(None)
    after(decode(4), 0.001, times)
    traced = decode(4)
    traced.decode[2].trace = True
    assert times.timeout(traced) == FIRST_STEPS_TIMEOUT_S


def test_the_users_deadline_holds_for_every_step() -> None:
    times = StepTimes(2.5)
    after(decode(4), 1.0, times)
    assert times.timeout(decode(4)) == times.timeout(prefill(9)) == 2.5


def test_the_medians_tell_the_shards_time_from_what_is_added_to_it() -> None:
    times = StepTimes(None)
    after(decode(1), 0.010, times)
    medians = {name: round(ms, 3) for name, ms in times.medians_ms().items()}
    assert medians == {
        "step_p50": 10.0, "driver_p50": 2.0, "shard_p50": 9.0, "overhead_p50": 3.0, "driver_cpu_p50": 0.5, "gap_p50": 3.0,
    }  # fmt: skip


def test_the_gap_is_what_the_slowest_shard_waits_between_two_steps() -> None:
    times = StepTimes(None)
    after(decode(4), 0.01, times)
    assert times.medians_ms()["gap_p50"] == pytest.approx(3.0)
    assert times.medians_ms()["driver_cpu_p50"] == pytest.approx(0.5)
    times.add(decode(4), [StepResult(step=0, rank=0, started=50.0)], StepClock(0.0, 0.0, None, 0.0, 0.0, True))
    assert times.medians_ms()["gap_p50"] == pytest.approx(3.0), "a pause is no gap"


def test_a_step_that_was_sent_before_the_last_one_ended_counts_from_that_end() -> None:
    times = StepTimes(None)
    clock = StepClock(sent=1.000, received=1.030, received_before=1.020, driver=0.001, cpu=0.0, same_clock=True)
    times.add(decode(4), [StepResult(step=0, rank=0, started=1.0195, step_ms=9.0)], clock)
    medians = {name: round(ms, 3) for name, ms in times.medians_ms().items()}
    assert (medians["step_p50"], medians["overhead_p50"]) == (10.0, 1.0)
    assert medians["gap_p50"] == -0.5, "the shards had the plan before the result was there"


def test_an_empty_step_is_not_waited_for_as_a_first_one_is() -> None:
    """The loop waits in it: a rank that lives and does not answer would hold up every call for two minutes."""
    assert StepTimes(None).timeout(StepPlan(step=0, generation=0, report=True)) == EMPTY_STEP_TIMEOUT_S
    assert StepTimes(60.0).timeout(StepPlan(step=0, generation=0)) == 60.0
