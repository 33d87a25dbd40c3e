"""EngineMetrics: records the Driver's counters and histograms for Prometheus. The export runs in another thread."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Literal

from distributed_sparse.protocol.step import ShardReport

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6)


@dataclass(frozen=True)
class Metric:
    """One Prometheus metric. The exporter appends `_total` to counters."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    description: str
    boundaries: tuple[float, ...] = ()
    label: str = ""


METRICS = (
    Metric("num_requests_running", "gauge", "Requests that hold a slot."),
    Metric("num_requests_waiting", "gauge", "Requests that wait for a slot."),
    Metric("kv_cache_usage_perc", "gauge", "KV pages in use; 1 is 100 %."),
    Metric("attended_density", "gauge", "Attended tokens / context tokens, over all layers and KV heads, between two reports."),
    Metric("all_reduce_time_seconds", "gauge", "All-reduce time per decode step, measured in profile steps."),
    Metric("recoveries", "counter", "Shard failures that the engine has recovered from."),
    Metric("prompt_tokens", "counter", "Prompt tokens of requests that have their first token."),
    Metric("generation_tokens", "counter", "Tokens sampled."),
    Metric(
        "request_success",
        "counter",
        "Completions that ended: stop, length, abort, error.",
        label="finished_reason",
    ),
    Metric("step_time_seconds", "histogram", "Step duration, from sending the plan to the last rank's result.", SECONDS),
    Metric("iteration_tokens_total", "histogram", "Tokens per step, prompt and decode.", TOKENS),
    Metric("time_to_first_token_seconds", "histogram", "Arrival to first token.", SECONDS),
    Metric("inter_token_latency_seconds", "histogram", "Time between consecutive tokens of a sequence.", SECONDS),
    Metric("request_time_per_output_token_seconds", "histogram", "Mean per request, without its first token.", SECONDS),
    Metric("e2e_request_latency_seconds", "histogram", "Arrival to end.", SECONDS),
    Metric("request_queue_time_seconds", "histogram", "Arrival to first scheduled.", SECONDS),
    Metric("request_prefill_time_seconds", "histogram", "First scheduled to first token.", SECONDS),
    Metric("request_decode_time_seconds", "histogram", "First token to end.", SECONDS),
    Metric("request_prompt_tokens", "histogram", "Prompt tokens of requests that ended.", TOKENS),
    Metric("request_generation_tokens", "histogram", "Output tokens of completions that ended.", TOKENS),
)
"""vLLM's names (without its prefix) and definitions, for the metrics that vLLM has, too."""


@dataclass(frozen=True)
class Readings:
    """Values recorded since the last `take`."""

    observed: dict[str, list[float]]
    """Histogram name -> values."""
    counted: dict[tuple[str, str], int]
    """(counter name, label value) -> increase."""


class EngineMetrics:
    """Recorded in the Driver's thread. Recording starts with the first `take`, so without an exporter no memory is used.

    `take` may be called from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted = False
        self._observed: dict[str, list[float]] = defaultdict(list)
        self._counted: Counter[tuple[str, str]] = Counter()

    def observe(self, name: str, value: float | None) -> None:
        """Record a value of a histogram; None is ignored."""
        if value is not None and self._wanted:
            with self._lock:
                self._observed[name].append(value)

    def count(self, name: str, amount: int = 1, label: str = "") -> None:
        """Increase a counter."""
        if not self._wanted:
            return
        with self._lock:
            self._counted[name, label] += amount

    def take(self) -> Readings:
        """Return and clear the values recorded since the last call."""
        with self._lock:
            self._wanted = True
            readings = Readings(dict(self._observed), dict(self._counted))
            self._observed, self._counted = defaultdict(list), Counter()
        return readings


class AttendedDensity:
    """Attended tokens / context tokens between the last two reports with any decode rows."""

    def __init__(self) -> None:
        self.latest: float | None = None
        self._before = (0, 0)

    def begin(self) -> None:
        """Start a generation: the ranks' counters restart from zero."""
        self._before = (0, 0)

    def add(self, reports: list[ShardReport | None]) -> None:
        """Update from every rank's counters, which cover its whole generation so far."""
        known = [report for report in reports if report is not None]
        attended = sum(tokens for report in known for layer in report.tokens_attended for tokens in layer)
        context = sum(report.tokens_in_context * len(layer) for report in known for layer in report.tokens_attended)
        if context > self._before[1]:
            self.latest = (attended - self._before[0]) / (context - self._before[1])
        self._before = attended, context


def attention_stats(reports: list[ShardReport]) -> dict:
    """Counters combined over ranks. `density` is attended / context tokens as [layer][global KV head]."""
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
