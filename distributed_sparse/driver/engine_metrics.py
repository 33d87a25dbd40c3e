"""EngineMetrics: what the Driver counts and times for a monitoring system. Recording is an append; exporting is another's."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Literal

from distributed_sparse.metrics import RequestMetrics
from distributed_sparse.protocol.step import ShardReport

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6)


@dataclass(frozen=True)
class Metric:
    """One metric, as Prometheus knows it. Counters get the suffix `_total` from whoever exports them."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    description: str
    boundaries: tuple[float, ...] = ()
    label: str = ""


METRICS = (
    Metric("num_requests_running", "gauge", "Requests that hold a slot."),
    Metric("num_requests_waiting", "gauge", "Requests that wait for one."),
    Metric("kv_cache_usage_perc", "gauge", "KV pages in use; 1 is all of them."),
    Metric("attended_density", "gauge", "Tokens attended over tokens in context, over all layers and KV heads, lately."),
    Metric("all_reduce_time_seconds", "gauge", "Time in all-reduces of a decode step, as profile steps find it."),
    Metric("recoveries", "counter", "Failures of shards that the engine has recovered from."),
    Metric("prompt_tokens", "counter", "Prompt tokens of requests that got their first token."),
    Metric("generation_tokens", "counter", "Tokens sampled."),
    Metric(
        "request_success",
        "counter",
        "Completions that ended: stop, length, abort, error.",
        label="finished_reason",
    ),
    Metric("step_time_seconds", "histogram", "A step, from its plan to the last rank's answer.", SECONDS),
    Metric("iteration_tokens_total", "histogram", "Tokens of a step, prompt and decode.", TOKENS),
    Metric("time_to_first_token_seconds", "histogram", "Arrival to first token.", SECONDS),
    Metric("inter_token_latency_seconds", "histogram", "One token of a sequence to its next.", SECONDS),
    Metric("request_time_per_output_token_seconds", "histogram", "Mean per request, after its first token.", SECONDS),
    Metric("e2e_request_latency_seconds", "histogram", "Arrival to end.", SECONDS),
    Metric("request_queue_time_seconds", "histogram", "Arrival to first scheduled.", SECONDS),
    Metric("request_prefill_time_seconds", "histogram", "First scheduled to first token.", SECONDS),
    Metric("request_decode_time_seconds", "histogram", "First token to end.", SECONDS),
    Metric("request_prompt_tokens", "histogram", "Prompt tokens of requests that ended.", TOKENS),
    Metric("request_generation_tokens", "histogram", "Output tokens of completions that ended.", TOKENS),
)
"""Names and definitions are vLLM's (without its prefix), as far as it has them."""


@dataclass(frozen=True)
class Readings:
    """What was recorded since the last time."""

    observed: dict[str, list[float]]
    """Histogram -> values."""
    counted: dict[tuple[str, str], int]
    """(counter, value of its label) -> increase."""


class EngineMetrics:
    """Records from the Driver's thread, from the first `take` on: where nobody exports, nothing piles up.

    `take` may be called from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted = False
        self._observed: dict[str, list[float]] = defaultdict(list)
        self._counted: Counter[tuple[str, str]] = Counter()

    def observe(self, name: str, value: float | None) -> None:
        """A value of a histogram; None is not one."""
        if value is not None and self._wanted:
            with self._lock:
                self._observed[name].append(value)

    def count(self, name: str, amount: int = 1, label: str = "") -> None:
        """Increase a counter."""
        if not self._wanted:
            return
        with self._lock:
            self._counted[name, label] += amount

    def request_ended(self, metrics: RequestMetrics) -> None:
        """A request came to its own end."""
        self.observe("e2e_request_latency_seconds", metrics.latency)
        self.observe("request_queue_time_seconds", metrics.queue_time)
        self.observe("request_prefill_time_seconds", metrics.prefill_time)
        self.observe("request_decode_time_seconds", metrics.decode_time)
        self.observe("request_time_per_output_token_seconds", metrics.tpot)
        self.observe("request_prompt_tokens", metrics.num_prompt_tokens)

    def take(self) -> Readings:
        """What was recorded since the last call."""
        with self._lock:
            self._wanted = True
            readings = Readings(dict(self._observed), dict(self._counted))
            self._observed, self._counted = defaultdict(list), Counter()
        return readings


class AttendedDensity:
    """Tokens attended over tokens in context, between the last two reports in which there were any."""

    def __init__(self) -> None:
        self.lately: float | None = None
        self._before = (0, 0)

    def begin(self) -> None:
        """The ranks count from zero again: another generation."""
        self._before = (0, 0)

    def add(self, reports: list[ShardReport | None]) -> None:
        """Take in what every rank has counted since its generation began."""
        told = [report for report in reports if report is not None]
        attended = sum(tokens for report in told for layer in report.tokens_attended for tokens in layer)
        context = sum(report.tokens_in_context * len(layer) for report in told for layer in report.tokens_attended)
        if context > self._before[1]:
            self.lately = (attended - self._before[0]) / (context - self._before[1])
        self._before = attended, context


def attention_stats(reports: list[ShardReport]) -> dict:
    """Counters of all ranks as one: density is [layer][global KV head], tokens attended over tokens in context."""
    density: list[list[float]] = []
    if reports and reports[0].tokens_in_context:
        context = reports[0].tokens_in_context
        for layer in range(len(reports[0].tokens_attended)):
            density.append([tokens / context for report in reports for tokens in report.tokens_attended[layer]])
    return {
        "rows_dense": sum(report.rows_dense for report in reports),
        "rows_sparse": sum(report.rows_sparse for report in reports),
        "density": density,
        "bytes_read": sum(report.bytes_read for report in reports),
        "bytes_read_of_ranks": [report.bytes_read for report in reports],
    }
