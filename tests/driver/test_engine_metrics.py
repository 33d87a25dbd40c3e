"""What the Driver records for a monitoring system: only where somebody takes it, and only what it was."""

from __future__ import annotations

from distributed_sparse.driver.engine_metrics import AttendedDensity, EngineMetrics
from distributed_sparse.protocol.step import ShardReport


def report(attended: int, context: int) -> ShardReport:
    return ShardReport(
        rows_dense=0, rows_sparse=0, tokens_attended=[[attended, attended]], tokens_in_context=context,
        bytes_read=0, all_reduce_calls=0, all_reduce_bytes=0, time_ms={},
    )  # fmt: skip


def test_nothing_piles_up_where_nobody_exports() -> None:
    metrics = EngineMetrics()
    metrics.observe("step_time_seconds", 0.1)
    metrics.count("generation_tokens", 3)
    assert metrics.take().observed == {} and metrics.take().counted == {}
    metrics.observe("step_time_seconds", 0.1)
    metrics.observe("step_time_seconds", None)
    metrics.count("generation_tokens", 3)
    metrics.count("generation_tokens", 2)
    readings = metrics.take()
    assert readings.observed == {"step_time_seconds": [0.1]} and readings.counted == {("generation_tokens", ""): 5}
    assert metrics.take().observed == {}, "each value is given out once"


def test_density_is_of_the_time_between_two_reports_and_begins_anew_with_a_generation() -> None:
    density = AttendedDensity()
    density.add([report(50, 100), report(50, 100)])
    assert density.latest == 0.5
    density.add([report(60, 200), report(60, 200)])
    assert density.latest == 0.1
    density.begin()
    density.add([report(90, 300), report(90, 300)])  # more than before already
    assert density.latest == 0.3
