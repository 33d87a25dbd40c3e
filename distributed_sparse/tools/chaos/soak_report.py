"""soak_report: the record of a soak, as Markdown tables, as JSON, and as a verdict."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from distributed_sparse.tools.chaos.faults import Fault
from distributed_sparse.tools.chaos.outcome import ABORTED, COMPLETED, LOST, TIMED_OUT, Outcome
from distributed_sparse.tools.common.tables import number, table

ALL = "all"
SHOWN_DETAILS = 5


@dataclass
class SoakReport:
    """The record of a soak so far; None means not measured."""

    settings: dict[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = ()
    """The requested kinds of faults."""
    undisturbed: int = 0
    """Requests in the pool."""
    ties: int = 0
    """Requests left out of the pool, since two runs without faults differed."""
    seconds: float = 0.0
    """Duration of the load."""
    outcomes: list[Outcome] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    recoveries: list[dict[str, Any]] = field(default_factory=list)
    """All records of `LLM.stats()["recovery_log"]`, by time."""
    engine_error: str | None = None
    """Why the engine did not recover."""
    interrupted: bool = False
    attention: dict[str, int] = field(default_factory=dict)
    """`rows_dense` and `rows_sparse` since the last recovery."""
    leaked_pages: int | None = None
    """Pages used or reserved after the last request."""
    leaked_processes: list[str] | None = None
    """Processes and placement groups that remained after the engine and the cluster shut down."""


@dataclass(frozen=True)
class FaultTimes:
    """Times of one kind of fault in seconds; faults injected during a recovery are counted, but have no times.

    Attributes:
        detect: from the fault to its detection by the Driver.
        recover: from detection until every request has been replayed, including later faults in the same recovery.
    """

    kind: str
    injected: int
    during_recovery: int
    detect: list[float]
    recover: list[float]


def fault_times(faults: Sequence[Fault], recoveries: Sequence[dict[str, Any]], kinds: Sequence[str]) -> list[FaultTimes]:
    """One entry per kind, and one for all of them."""
    found = []
    for kind in (*kinds, ALL):
        own = [fault for fault in faults if kind in (fault.kind, ALL)]
        detect, recover = [], []
        for fault in own:
            if fault.during_recovery:
                continue
            later = [record for record in recoveries if record["noticed"] >= fault.at]
            if later:
                detect.append(later[0]["noticed"] - fault.at)
            # if another failure interrupts a replay, recovery ends with that failure's replay
            ended = next((record for record in later if record["replay_s"] is not None), None)
            if ended is not None:
                recover.append(ended["noticed"] + ended["rebuild_s"] + ended["replay_s"] - later[0]["noticed"])
        found.append(FaultTimes(kind, len(own), sum(fault.during_recovery for fault in own), detect, recover))
    return found


def verdict(report: SoakReport) -> list[str]:
    """Why the soak failed; empty if it passed. Something not measured is a failure, unless the soak was interrupted."""
    wrong = []
    lost = sum(outcome.how == LOST for outcome in report.outcomes)
    differing = sum(outcome.differs for outcome in report.outcomes)
    if lost:
        wrong.append(f"{lost} requests lost")
    if differing:
        wrong.append(f"{differing} requests differ from the undisturbed run")
    if report.engine_error is not None:
        wrong.append(f"the engine did not recover: {report.engine_error}")
    if report.leaked_pages:
        wrong.append(f"{report.leaked_pages} pages leaked")
    if report.leaked_processes:
        wrong.append(f"{len(report.leaked_processes)} processes leaked")
    if report.interrupted:
        return wrong
    if report.leaked_pages is None and report.engine_error is None:
        wrong.append("pages were not counted")
    if report.leaked_processes is None:
        wrong.append("processes were not counted")
    if not any(outcome.how == COMPLETED for outcome in report.outcomes):
        wrong.append("no request was completed")
    missing = [kind for kind in report.kinds if all(fault.kind != kind for fault in report.faults)]
    if missing:
        wrong.append(f"no fault of the kind {', '.join(missing)} was injected: give it more minutes")
    return wrong


def as_text(report: SoakReport) -> str:
    """Markdown tables, details of what was wrong, and the verdict."""
    times = fault_times(report.faults, report.recoveries, report.kinds)
    head = ["fault", "injected", "in a recovery", "detect p50 s", "max", "recover p50 s", "max"]
    rows = [
        [of.kind, str(of.injected), str(of.during_recovery), *_median_and_max(of.detect), *_median_and_max(of.recover)]
        for of in times
    ]
    parts = [table(head, rows), table(["", "count"], list(_counts(report).items()))]
    details = [
        f"{'differs' if outcome.differs else outcome.how}: {outcome.detail}"
        for outcome in report.outcomes
        if outcome.differs or outcome.how == LOST
    ]
    details += [f"left behind: {what}" for what in report.leaked_processes or ()]
    if len(details) > SHOWN_DETAILS:
        details[SHOWN_DETAILS:] = [f"and {len(details) - SHOWN_DETAILS} more"]
    if details:
        parts.append("\n".join(f"- {detail}" for detail in details))
    wrong = verdict(report)
    ending = "interrupted; " if report.interrupted else ""
    parts.append(ending + ("FAILED: " + "; ".join(wrong) if wrong else "nothing lost, nothing different, nothing left behind"))
    return "\n\n".join(parts)


def as_dict(report: SoakReport) -> dict[str, Any]:
    """The JSON record: counts, times by kind, every fault and recovery, and each wrong outcome."""
    return {
        "settings": report.settings,
        "counts": _counts(report),
        "times": [asdict(of) for of in fault_times(report.faults, report.recoveries, report.kinds)],
        "faults": [asdict(fault) for fault in report.faults],
        "recoveries": report.recoveries,
        "wrong": [asdict(outcome) for outcome in report.outcomes if outcome.differs or outcome.how == LOST],
        "leaked_processes": report.leaked_processes,
        "engine_error": report.engine_error,
        "interrupted": report.interrupted,
        "verdict": verdict(report),
    }


def _counts(report: SoakReport) -> dict[str, str]:
    ways = Counter(outcome.how for outcome in report.outcomes)
    processes = report.leaked_processes
    return {
        "minutes under load": number(report.seconds / 60, 1),
        "different requests": str(report.undisturbed),
        "left out: a tie when undisturbed": str(report.ties),
        "requests": str(len(report.outcomes)),
        **{f"of them {how}": str(ways[how]) for how in (COMPLETED, ABORTED, TIMED_OUT)},
        "tokens": str(sum(outcome.tokens for outcome in report.outcomes)),
        "rows dense, since the last recovery": _count(report.attention.get("rows_dense")),
        "rows sparse, since the last recovery": _count(report.attention.get("rows_sparse")),
        "recoveries": str(sum(record["rebuild_s"] is not None for record in report.recoveries)),
        "tokens replayed": str(sum(record["replayed_tokens"] for record in report.recoveries)),
        "lost": str(ways[LOST]),
        "differing": str(sum(outcome.differs for outcome in report.outcomes)),
        "leaked pages": _count(report.leaked_pages),
        "leaked processes": _count(None if processes is None else len(processes)),
    }


def _count(value: int | None) -> str:
    return "-" if value is None else str(value)


def _median_and_max(values: Sequence[float]) -> tuple[str, str]:
    return number(statistics.median(values) if values else math.nan, 2), number(max(values, default=math.nan), 2)
