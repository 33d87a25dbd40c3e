"""soak: run a load, inject faults, wait for each recovery, and record lost and differing requests and leaked pages."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distributed_sparse.tools.chaos.faults import DURING_RECOVERY, KINDS, Fault, Injector, Nodes, in_turns
from distributed_sparse.tools.chaos.soak_load import Load
from distributed_sparse.tools.chaos.soak_report import SoakReport
from distributed_sparse.tools.chaos.soak_workload import make_pool, settle

if TYPE_CHECKING:
    from distributed_sparse.llm import LLM

CALM_S = (0.5, 4.0)
"""Pause from a recovery to the next fault."""
OVERLAPS = (True, False, False)
"""Whether a second fault follows before the engine has recovered; taken in turns."""
OVERLAP_S = (0.1, 4.0)
"""From the first of two such faults to the second."""
NEW_NODE_S = (0.0, 4.0)
"""From the removal of a node to the addition of another."""
NOTICE_S = 1.0
"""Time for the Driver to notice a second fault, which may come when the engine has already recovered from the first."""
RECOVERY_TIMEOUT_S = 180.0
DRAIN_TIMEOUT_S = 180.0
PAGES_TIMEOUT_S = 10.0
"""How long requests whose clients have left may hold pages."""
POLL_S = 0.2


@dataclass(frozen=True)
class SoakOptions:
    """Options of a soak."""

    minutes: float = 2.0
    seed: int = 0
    kinds: tuple[str, ...] = tuple(KINDS)
    clients: int = 6
    requests: int = 20
    """Number of different requests in the pool."""

    def __post_init__(self) -> None:
        for name in ("minutes", "clients", "requests"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} {getattr(self, name)} must be above 0")


class Soak:
    """One soak on a running engine. It fills `report` as it runs, so that an interrupted soak has a report too.

    Args:
        llm: the engine, on actors whose processes carry `mark`; used by this soak alone.
        nodes: the cluster of its shards; None if no node can be removed.
        mark: see `processes`.
        options: duration, faults and load.
        report: filled in place.
        say: called with a line about each event.
    """

    def __init__(
        self, llm: LLM, nodes: Nodes | None, mark: str, options: SoakOptions, report: SoakReport, say: Callable[[str], None]
    ) -> None:
        self._llm = llm
        self._nodes = nodes
        self._options = options
        self._report = report
        self._say_line = say
        self._rng = random.Random(options.seed)
        self._injector = Injector(llm, nodes, mark, self._rng)
        self._num_said = 0
        self._began = time.monotonic()

    def run(self) -> None:
        """Run the soak; ends early if the engine does not recover.

        Raises:
            RuntimeError: the engine failed before any fault.
        """
        options, report = self._options, self._report
        pool = make_pool(options.requests, options.seed, self._llm.max_model_len, self._llm.config.max_num_seqs)
        settled = settle(self._llm, pool)
        report.undisturbed, report.ties = len(settled), len(pool) - len(settled)
        if not settled:
            raise RuntimeError(f"all {len(pool)} requests gave other tokens when repeated without faults")
        self._say(f"undisturbed: {report.undisturbed} requests, {report.ties} left out as ties")
        load = Load(self._llm, settled, options.clients, options.seed)
        self._began = time.monotonic()
        load.start()
        try:
            self._inject_faults(self._began + 60 * options.minutes)
            load.finish(DRAIN_TIMEOUT_S)
            report.seconds = time.monotonic() - self._began
            self._check_pages()
        except RuntimeError as error:
            report.engine_error = str(error)
            load.finish(PAGES_TIMEOUT_S)
        finally:
            load.stop()
            report.seconds = report.seconds or time.monotonic() - self._began
            report.outcomes = load.outcomes

    # ---- faults

    def _inject_faults(self, deadline: float) -> None:
        """Inject faults until `deadline` (`time.monotonic()`). Raises RuntimeError if the engine does not recover."""
        kinds, overlaps = in_turns(self._options.kinds, self._rng), in_turns(OVERLAPS, self._rng)
        overlapping = [kind for kind in self._options.kinds if kind in DURING_RECOVERY]
        while (pause := self._rng.uniform(*CALM_S)) < deadline - time.monotonic():
            time.sleep(pause)
            fault = self._inject(next(kinds))
            if fault is None:
                raise RuntimeError("no shard is running")
            overlapped = next(overlaps) and bool(overlapping)
            if overlapped:
                time.sleep(self._rng.uniform(*OVERLAP_S))
                self._inject(self._rng.choice(overlapping), during_recovery=self._recovers(fault))
            if fault.kind == "node":
                assert self._nodes is not None
                time.sleep(self._rng.uniform(*NEW_NODE_S))
                self._nodes.add()
                self._say("a node was added")
            if overlapped:
                time.sleep(NOTICE_S)
            self._await_recovery(fault)

    def _inject(self, kind: str, during_recovery: bool = False) -> Fault | None:
        fault = self._injector.inject(kind, during_recovery)
        if fault is not None:
            self._report.faults.append(fault)
            self._say(f"{kind}{' during a recovery' if during_recovery else ''}: {fault.target}")
        return fault

    def _recovers(self, fault: Fault) -> bool:
        """Whether the engine has not yet finished recovering from a fault."""
        self._follow()
        later = [record for record in self._report.recoveries if record["noticed"] >= fault.at]
        return not later or later[-1]["replay_s"] is None

    def _await_recovery(self, fault: Fault) -> None:
        deadline = time.monotonic() + RECOVERY_TIMEOUT_S
        while self._recovers(fault) or not self._llm.health():
            if time.monotonic() >= deadline:
                raise RuntimeError(f"{fault.kind} ({fault.target}): no recovery within {RECOVERY_TIMEOUT_S:g} s")
            time.sleep(POLL_S)

    # ---- the engine's stats

    def _follow(self) -> dict[str, Any]:
        """Add the engine's new recovery records to the report; return its stats."""
        stats = self._llm.stats()
        records = {record["noticed"]: record for record in (*self._report.recoveries, *stats["recovery_log"])}
        self._report.recoveries = [records[noticed] for noticed in sorted(records)]
        finished = [r for r in self._report.recoveries if r["replay_s"] is not None]
        for record in finished[self._num_said :]:
            self._say(
                f"recovered from: {record['cause']}; rebuilt in {record['rebuild_s']:.2f} s ({record['attempts']} attempts), "
                f"{record['replayed_tokens']} tokens replayed in {record['replay_s']:.2f} s"
            )
        self._num_said = len(finished)
        return stats

    def _check_pages(self) -> None:
        """After the last request: wait for all pages to be freed, and record those that are not."""
        deadline = time.monotonic() + PAGES_TIMEOUT_S
        while True:
            stats = self._follow()
            pages = stats["pages"]
            self._report.leaked_pages = max(pages["used"], pages["reserved"])  # reserved ones include those in use
            self._report.attention = {name: stats["attention"][name] for name in ("rows_dense", "rows_sparse")}
            if self._report.leaked_pages == 0 or time.monotonic() >= deadline:
                return
            time.sleep(POLL_S)

    def _say(self, line: str) -> None:
        self._say_line(f"{time.monotonic() - self._began:6.1f} s  {line}")
