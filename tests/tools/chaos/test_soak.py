"""A soak from its first request to its report, on a stand-in for the engine whose shards are processes that do nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

from distributed_sparse.client.client import EngineError
from distributed_sparse.tools.chaos import soak
from distributed_sparse.tools.chaos.outcome import LOST
from distributed_sparse.tools.chaos.soak import Soak, SoakOptions
from distributed_sparse.tools.chaos.soak_report import SoakReport, verdict
from tests.support.soaked_engine import Processes, SoakedEngine

MARK = f"soak-{os.getpid()}"
OPTIONS = SoakOptions(minutes=1.0 / 60, kinds=("kill", "kill_all", "node"), clients=2, requests=6)


class CountedNodes:
    """As many as before, once a lost one has been replaced."""

    def __init__(self) -> None:
        self.removed: list[str] = []
        self.added = 0

    def remove(self, node_id: str) -> None:
        self.removed.append(node_id)

    def add(self) -> None:
        self.added += 1


@pytest.fixture
def shards(monkeypatch: pytest.MonkeyPatch) -> Iterator[Processes]:
    for name, value in (("CALM_S", (0.0, 0.1)), ("OVERLAP_S", (0.0, 0.1)), ("NEW_NODE_S", (0.0, 0.1)), ("POLL_S", 0.01)):
        monkeypatch.setattr(soak, name, value)
    monkeypatch.setattr(soak, "NOTICE_S", 0.05)
    started = Processes()
    yield started
    started.end()


def run(engine: SoakedEngine, options: SoakOptions = OPTIONS) -> tuple[SoakReport, CountedNodes, list[str]]:
    report, nodes, said = SoakReport(kinds=options.kinds), CountedNodes(), []
    Soak(engine, nodes, MARK, options, report, said.append).run()  # type: ignore[arg-type]
    report.leaked_processes = []
    return report, nodes, said


def test_a_soak_injects_every_kind_and_sees_each_recovery(shards: Processes) -> None:
    report, nodes, said = run(SoakedEngine(shards, MARK), replace(OPTIONS, minutes=4.0 / 60))
    assert verdict(report) == []
    assert {fault.kind for fault in report.faults} == {"kill", "kill_all", "node"}
    assert any(fault.during_recovery for fault in report.faults)
    assert len(report.recoveries) >= 3 and nodes.added == len(nodes.removed) > 0
    assert (report.undisturbed, report.ties, report.leaked_pages) == (6, 0, 0)
    assert report.attention == {"rows_dense": 1, "rows_sparse": 2}
    assert report.outcomes and report.seconds >= 1.0
    assert any("recovered from: ranks [" in line for line in said)


def test_an_engine_that_does_not_recover_ends_the_soak(shards: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "RECOVERY_TIMEOUT_S", 0.3)
    report, _, _ = run(SoakedEngine(shards, MARK, mends=False), SoakOptions(minutes=1.0, kinds=("kill",), requests=3))
    assert report.engine_error is not None and "no recovery within 0.3 s" in report.engine_error
    assert verdict(report) == [f"the engine did not recover: {report.engine_error}"]
    assert len(report.faults) <= 2 and report.seconds < 20


def test_an_engine_that_has_ended_ends_the_soak(shards: Processes) -> None:
    engine = SoakedEngine(shards, MARK)

    def stats() -> None:
        raise EngineError("the engine has stopped")

    engine.stats = stats  # type: ignore[assignment, method-assign]
    report, _, _ = run(engine)
    assert report.engine_error == "the engine has stopped" and verdict(report)


def test_pages_that_stay_and_tokens_that_differ_fail_it(shards: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "PAGES_TIMEOUT_S", 0.1)
    engine = SoakedEngine(shards, MARK, wrong=True)
    engine.pages = {"used": 1, "reserved": 4}
    report, _, _ = run(engine, replace(OPTIONS, kinds=("kill",)))
    assert any(outcome.differs for outcome in report.outcomes) and report.leaked_pages == 4
    assert [reason.split()[-2:] for reason in verdict(report)] == [["undisturbed", "run"], ["pages", "leaked"]]


def test_an_interrupted_soak_keeps_what_it_has_seen(shards: Processes) -> None:
    engine, report, said = SoakedEngine(shards, MARK), SoakReport(kinds=("kill",)), 0

    def interrupt(line: str) -> None:
        nonlocal said
        said += 1
        if "recovered from" in line:
            raise KeyboardInterrupt

    options = SoakOptions(minutes=1.0, kinds=("kill",), requests=3)
    with pytest.raises(KeyboardInterrupt):
        Soak(engine, None, MARK, options, report, interrupt).run()  # type: ignore[arg-type]
    assert said > 2 and report.faults and report.recoveries and report.seconds > 0
    assert not [outcome for outcome in report.outcomes if outcome.how == LOST]


@pytest.mark.parametrize("given", [{"minutes": 0.0}, {"clients": 0}, {"requests": -1}])
def test_options_that_make_no_soak_are_refused(given: dict[str, float]) -> None:
    (name,) = given
    with pytest.raises(ValueError, match=f"--{name} .* must be above 0"):
        SoakOptions(**given)  # type: ignore[arg-type]
