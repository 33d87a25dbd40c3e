"""StepTimes: durations of the last steps, for the stats and for the timeout of the next step."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from dataclasses import dataclass

from distributed_sparse.protocol.step import StepPlan, StepResult

TIMEOUT_FLOOR_S = 5.0
TIMEOUT_FACTOR = 20.0
FIRST_STEPS_TIMEOUT_S = 120.0
"""Timeout of a step while fewer than `FIRST_STEPS` of its kind have run."""
EMPTY_STEP_TIMEOUT_S = 10.0
"""Timeout of a step without tokens: a barrier, and possibly a report."""
FIRST_STEPS = 8
KEPT = 256
"""Number of steps kept, per kind and for the medians."""


@dataclass(frozen=True)
class SentStep:
    """A step plan that has been sent to every rank."""

    plan: StepPlan
    sent: float
    """`time.monotonic` when the last rank had been sent it."""
    scheduling: float
    """Seconds spent on scheduling and sending it."""


@dataclass(frozen=True)
class StepClock:
    """Timestamps and durations of one step, in seconds on the Driver's monotonic clock."""

    sent: float
    received: float
    """When the last rank's result arrived."""
    received_before: float | None
    """When the previous step's last result arrived; None if the engine was idle in between."""
    driver: float
    """Spent on scheduling, sending and committing; overlaps with the ranks' work if plans are in flight."""
    cpu: float
    """CPU time of the Driver's thread in the call that committed the step, which also sent the next plan."""
    same_clock: bool
    """Whether the ranks and the Driver share a clock."""

    @property
    def step(self) -> float:
        """Seconds that the ranks took, from the later of the plan's sending and the previous result."""
        return self.received - max(self.sent, self.received_before or self.sent)

    @property
    def period(self) -> float:
        """Seconds from the previous step's result to this one's."""
        return self.received - self.received_before if self.received_before is not None else self.step + self.driver


class StepTimes:
    """Durations of the last steps. Two steps are of one kind if their work is equal to within a factor of two (`kind_of`).

    Args:
        step_timeout_s: the user's timeout for every step; None: max(5 s, 20 x p99 of the steps of that kind), 10 s if empty.
    """

    def __init__(self, step_timeout_s: float | None) -> None:
        self._step_timeout_s = step_timeout_s
        self._by_kind: dict[tuple[int, ...], deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))
        self._parts: dict[str, deque[float]] = {
            "step_p50": deque(maxlen=KEPT),  # see StepClock.step
            "driver_p50": deque(maxlen=KEPT),  # schedule, send and commit
            "shard_p50": deque(maxlen=KEPT),  # the slowest shard's own time
            "overhead_p50": deque(maxlen=KEPT),  # the period minus the slowest shard's own time
            "driver_cpu_p50": deque(maxlen=KEPT),  # CPU time of the Driver's thread
            # from a step's last result to the start of the next step on all shards; below 0 if they already had its plan
            "gap_p50": deque(maxlen=KEPT),
        }

    def timeout(self, plan: StepPlan) -> float:
        """Seconds within which all ranks must answer the plan."""
        if self._step_timeout_s is not None:
            return self._step_timeout_s
        if not plan.decode and not plan.prefill:
            return EMPTY_STEP_TIMEOUT_S
        seen = sorted(self._by_kind[kind_of(plan)])
        if len(seen) < FIRST_STEPS:
            return FIRST_STEPS_TIMEOUT_S
        return max(TIMEOUT_FLOOR_S, TIMEOUT_FACTOR * seen[int(0.99 * (len(seen) - 1))])

    def add(self, plan: StepPlan, results: list[StepResult], times: StepClock) -> None:
        """Record a step."""
        slowest = max(result.step_ms for result in results) / 1e3
        if not any(result.prefill_from_store for result in results):  # a step of this kind may have to compute its chunks
            self._by_kind[kind_of(plan)].append(times.step)
        self._parts["step_p50"].append(times.step)
        self._parts["driver_p50"].append(times.driver)
        self._parts["shard_p50"].append(slowest)
        self._parts["overhead_p50"].append(times.period - slowest)
        self._parts["driver_cpu_p50"].append(times.cpu)
        if times.received_before is not None and times.same_clock:
            self._parts["gap_p50"].append(max(result.started for result in results) - times.received_before)

    def medians_ms(self) -> dict[str, float]:
        """Medians over the last steps, in ms."""
        return {name: statistics.median(seconds) * 1e3 if seconds else 0.0 for name, seconds in self._parts.items()}


def kind_of(plan: StepPlan) -> tuple[int, ...]:
    """The quantities that a step's duration depends on, as powers of two: prompt tokens, decode rows, longest context of a
    prompt chunk, logprob rows, traced rows.

    Without the context of decode rows: it grows by one token per step, and TIMEOUT_FACTOR leaves room for that.
    """
    logprob_rows = sum(len(chunk.targets or ()) for chunk in plan.prefill)
    longest = max((chunk.end for chunk in plan.prefill), default=0)
    traced_rows = sum(row.trace for row in plan.decode)  # each reads its whole cache in every layer
    return tuple(size.bit_length() for size in (plan.num_prefill_tokens, len(plan.decode), longest, logprob_rows, traced_rows))
