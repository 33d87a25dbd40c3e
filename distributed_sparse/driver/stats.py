"""DriverStats: the counters and step times behind `LLM.stats()` and the gauges of the metrics exporter."""

from __future__ import annotations

import socket
from collections import Counter

from distributed_sparse.driver.engine_metrics import AttendedDensity, EngineMetrics, attention_stats
from distributed_sparse.driver.pages import PageAllocator
from distributed_sparse.driver.requests import Request
from distributed_sparse.driver.step_times import StepClock, StepTimes
from distributed_sparse.protocol.step import ShardReport, StepPlan, StepResult
from distributed_sparse.ranks.base import RankInfo


class DriverStats:
    """Fed by the Driver: `begin` once per generation, `add_step` after every step, `end_request` for every request that ends.

    Attributes:
        requests: number of requests that finished, were aborted, or failed, since the engine started.
        times: durations of the last steps, and the timeout of the next one.
        steps: steps with tokens, since the engine started.
        same_clock: whether all ranks run on the Driver's host, so their monotonic clocks equal the Driver's.
    """

    def __init__(self, metrics: EngineMetrics, step_timeout_s: float | None) -> None:
        self.metrics = metrics
        self.requests: Counter[str] = Counter(finished=0, aborted=0, failed=0)
        self.times = StepTimes(step_timeout_s)
        self.steps = 0
        self.same_clock = False
        self._prefill_tokens = Counter(computed=0, from_store=0)
        self._ranks: list[RankInfo] = []
        self._reports: list[ShardReport | None] = []
        self._density = AttendedDensity()

    def begin(self, ranks: list[RankInfo]) -> None:
        """Start a generation: the ranks count from zero again."""
        self._ranks = ranks
        self._reports = [None] * len(ranks)
        self._density.begin()
        self.same_clock = {rank.hostname for rank in ranks} == {socket.gethostname()}

    def add_step(self, plan: StepPlan, results: list[StepResult], clock: StepClock) -> None:
        """Count a committed step and its duration; keep the ranks' reports, if it has any."""
        self.times.add(plan, results, clock)
        from_store = results[0].prefill_from_store
        self._prefill_tokens.update(computed=plan.num_prefill_tokens - from_store, from_store=from_store)
        for result in results:
            if result.report is not None:
                self._reports[result.rank] = result.report
        if plan.report:
            self._density.add(self._reports)
        if plan.parts:
            self.steps += 1
            self.metrics.observe("step_time_seconds", clock.step)
            self.metrics.observe("iteration_tokens_total", sum(part.num_tokens for part in plan.parts))

    def end_request(self, request: Request) -> None:
        """Count a request whose sequences have all ended, and record its latencies and lengths unless it was cut short."""
        reasons = [sequence.finish_reason for sequence in request.sequences]
        outcome = "failed" if "error" in reasons else "aborted" if "abort" in reasons else "finished"
        self.requests[outcome] += 1
        for reason in reasons:
            self.metrics.count("request_success", label=reason or "")
        if outcome == "finished" and not request.score:
            for sequence in request.sequences:
                self.metrics.observe("request_generation_tokens", len(sequence.output_token_ids))
            times = request.metrics
            self.metrics.observe("e2e_request_latency_seconds", times.latency)
            self.metrics.observe("request_queue_time_seconds", times.queue_time)
            self.metrics.observe("request_prefill_time_seconds", times.prefill_time)
            self.metrics.observe("request_decode_time_seconds", times.decode_time)
            self.metrics.observe("request_time_per_output_token_seconds", times.tpot)
            self.metrics.observe("request_prompt_tokens", times.num_prompt_tokens)

    def as_dict(self, generation: int, allocator: PageAllocator, running: int, waiting: int) -> dict:
        """The engine's counters (keys in docs/architecture.md). Those of the ranks date from their last report.

        Args:
            running, waiting: unfinished requests with and without a slot.
        """
        reports = [report for report in self._reports if report is not None]
        return {
            "steps": self.steps,
            "generation": generation,
            "requests": {"running": running, "waiting": waiting, **self.requests},
            "pages": {"total": allocator.total, "used": allocator.used, "reserved": allocator.reserved},
            "prefill_tokens": dict(self._prefill_tokens),
            "ranks": [rank.as_dict() for rank in self._ranks],
            "attention": attention_stats(reports),
            "all_reduce": {
                "calls": reports[0].all_reduce_calls if reports else 0,
                "bytes": reports[0].all_reduce_bytes if reports else 0,
            },
            "time_ms": self.times.medians_ms() | (reports[0].time_ms if reports else {}),
        }

    def gauges(self) -> dict[str, float]:
        """Attended density and all-reduce time of the last reports. May be called from another thread during a step."""
        all_reduce_ms = next((report.time_ms.get("all_reduce") for report in self._reports if report is not None), None)
        found = {
            "attended_density": self._density.latest,
            "all_reduce_time_seconds": all_reduce_ms / 1e3 if all_reduce_ms is not None else None,
        }
        return {name: value for name, value in found.items() if value is not None}
