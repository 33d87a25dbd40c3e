"""StepTimes: how long steps took: what stats show of them, and how long the next one may take."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from dataclasses import dataclass

from distributed_sparse.protocol.step import StepPlan, StepResult

TIMEOUT_FLOOR_S = 5.0
TIMEOUT_FACTOR = 20.0
FIRST_STEPS_TIMEOUT_S = 120.0
"""The deadline of a kind of step of which fewer than `FIRST_STEPS` have been seen."""
EMPTY_STEP_TIMEOUT_S = 10.0
"""The deadline of a step without tokens: a barrier, and perhaps a report."""
FIRST_STEPS = 8
KEPT = 256
"""Steps remembered, of each kind and for the medians."""


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
    """When the things of one step happened, on the Driver's monotonic clock, in seconds."""

    sent: float
    received: float
    """The last rank's result was there."""
    received_before: float | None
    """The last result of the step before; None where there was a pause between."""
    driver: float
    """Spent on making and sending the plan, and on committing its result; beside the ranks' work, if plans are in flight."""
    cpu: float
    """Processor time of the Driver's thread in the call that took the result in: it also sent the plan behind."""
    same_clock: bool
    """Whether the ranks' clocks are the Driver's."""

    @property
    def step(self) -> float:
        """Seconds that the ranks took: since the plan was sent, and the result before it was there."""
        return self.received - max(self.sent, self.received_before or self.sent)

    @property
    def period(self) -> float:
        """Seconds from result to result."""
        return self.received - self.received_before if self.received_before is not None else self.step + self.driver


class StepTimes:
    """Seconds of the last steps. Steps are of one kind if their work is alike, to a factor of two.

    Args:
        step_timeout_s: the user's deadline for every step; None: max(5 s, 20 x p99 of the steps of that kind), 10 s if empty.
    """

    def __init__(self, step_timeout_s: float | None) -> None:
        self._step_timeout_s = step_timeout_s
        self._by_kind: dict[tuple[int, ...], deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))
        self._parts: dict[str, deque[float]] = {
            "step_p50": deque(maxlen=KEPT),  # see StepClock.step
            "driver_p50": deque(maxlen=KEPT),  # schedule, send and commit
            "shard_p50": deque(maxlen=KEPT),  # the slowest shard's own time
            "overhead_p50": deque(maxlen=KEPT),  # the whole period less the slowest shard's own time
            "driver_cpu_p50": deque(maxlen=KEPT),  # processor time of the Driver's thread
            # from the last result of a step received to the next step begun by all shards: below 0 where they had its plan
            "gap_p50": deque(maxlen=KEPT),
        }

    def timeout(self, plan: StepPlan) -> float:
        """Seconds that the ranks have for a plan."""
        if self._step_timeout_s is not None:
            return self._step_timeout_s
        if not plan.decode and not plan.prefill:
            return EMPTY_STEP_TIMEOUT_S
        seen = sorted(self._by_kind[kind_of(plan)])
        if len(seen) < FIRST_STEPS:
            return FIRST_STEPS_TIMEOUT_S
        return max(TIMEOUT_FLOOR_S, TIMEOUT_FACTOR * seen[int(0.99 * (len(seen) - 1))])

    def add(self, plan: StepPlan, results: list[StepResult], times: StepClock) -> None:
        """Remember a step."""
        slowest = max(result.step_ms for result in results) / 1e3
        if not any(result.prefill_from_store for result in results):  # a step of that kind may have to compute its chunks
            self._by_kind[kind_of(plan)].append(times.step)
        self._parts["step_p50"].append(times.step)
        self._parts["driver_p50"].append(times.driver)
        self._parts["shard_p50"].append(slowest)
        self._parts["overhead_p50"].append(times.period - slowest)
        self._parts["driver_cpu_p50"].append(times.cpu)
        if times.received_before is not None and times.same_clock:
            self._parts["gap_p50"].append(max(result.started for result in results) - times.received_before)

    def medians_ms(self) -> dict[str, float]:
        """The medians of the last steps, in ms."""
        return {name: statistics.median(seconds) * 1e3 if seconds else 0.0 for name, seconds in self._parts.items()}


def kind_of(plan: StepPlan) -> tuple[int, ...]:
    """What a step's time depends on, each to a factor of two: prompt tokens, decode rows, a prompt's context, logprob rows,
    traced rows.

    Not the context of decode rows: it grows by a token a step, and the deadline's own factor follows it.
    """
    logprob_rows = sum(len(chunk.targets or ()) for chunk in plan.prefill)
    longest = max((chunk.end for chunk in plan.prefill), default=0)
    traced_rows = sum(row.trace for row in plan.decode)  # each reads its whole cache in every layer
    return tuple(size.bit_length() for size in (plan.num_prefill_tokens, len(plan.decode), longest, logprob_rows, traced_rows))
