"""Faults: each kind that is asked for comes early, and hits processes of the soak alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest

from distributed_sparse.tools.chaos.faults import KINDS, Injector, in_turns, parse_kinds
from distributed_sparse.tools.chaos.processes import SHARD, left_after, marked_processes
from tests.support.patience import WAIT_S
from tests.support.soaked_engine import Processes

OWN, OTHER = f"own-{os.getpid()}", f"other-{os.getpid()}"


@pytest.fixture
def processes() -> Iterator[Processes]:
    started = Processes()
    yield started
    started.end()


class StandInNodes:
    def __init__(self) -> None:
        self.removed: list[str] = []

    def remove(self, node_id: str) -> None:
        self.removed.append(node_id)

    def add(self) -> None:
        raise AssertionError("the injector adds no node")


class StandInEngine:
    """Says on which node each of its ranks is."""

    def __init__(self, *ranks: tuple[str, int]) -> None:
        self._ranks = [{"node_id": node_id, "pid": pid} for node_id, pid in ranks]

    def stats(self) -> dict[str, Any]:
        return {"ranks": self._ranks}


def injector(engine: StandInEngine | None = None, nodes: StandInNodes | None = None) -> Injector:
    return Injector(engine or StandInEngine(), nodes, OWN, random.Random(0))  # type: ignore[arg-type]


def state_of(process: subprocess.Popen[bytes]) -> str:
    with open(f"/proc/{process.pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0]


def test_every_kind_comes_once_before_any_comes_again() -> None:
    kinds = tuple(KINDS)
    for seed in range(20):
        found = list(islice(in_turns(kinds, random.Random(seed)), 3 * len(kinds)))
        for start in range(0, len(found), len(kinds)):
            assert sorted(found[start : start + len(kinds)]) == sorted(kinds)
    assert len({tuple(islice(in_turns(kinds, random.Random(seed)), len(kinds))) for seed in range(20)}) > 1


def test_kinds_are_parsed_and_an_unknown_one_is_refused_by_name() -> None:
    assert parse_kinds(" kill,stop,kill") == ("kill", "stop")
    with pytest.raises(ValueError, match=r"names kil; choose from kill,kill_all,stop,node"):
        parse_kinds("stop,kil")
    with pytest.raises(ValueError, match="no fault"):
        parse_kinds(",")


def test_a_kill_ends_one_shard_of_the_soak_and_nothing_else(processes: Processes) -> None:
    own = [processes.start(OWN), processes.start(OWN)]
    others = [processes.start(OTHER), processes.start(OWN, name="ray::DriverActor")]
    fault = injector().inject("kill", during_recovery=True)
    assert fault is not None and fault.kind == "kill" and fault.during_recovery
    assert time.time() - 5 < fault.at <= time.time()
    killed = [process for process in own if fault.target == f"pid {process.pid}"]
    assert [process.wait(5) for process in killed] == [-signal.SIGKILL]
    assert [process.poll() for process in (*own, *others)].count(None) == 3


def test_kill_all_ends_every_shard_and_with_none_there_is_no_fault(processes: Processes) -> None:
    own = [processes.start(OWN), processes.start(OWN)]
    other = processes.start(OTHER)
    assert injector().inject("kill_all") is not None
    assert [process.wait(5) for process in own] == [-signal.SIGKILL] * 2
    assert other.poll() is None
    assert injector().inject("kill_all") is None and injector().inject("stop") is None


def test_a_stopped_shard_is_there_and_does_nothing(processes: Processes) -> None:
    own = processes.start(OWN)
    assert injector().inject("stop") is not None
    deadline = time.monotonic() + WAIT_S
    while state_of(own) != "T":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_removed_node_takes_the_ranks_on_it_along(processes: Processes) -> None:
    first, second = processes.start(OWN), processes.start(OWN)
    nodes = StandInNodes()
    fault = injector(StandInEngine(("n0", first.pid), ("n1", second.pid)), nodes).inject("node")
    assert fault is not None and nodes.removed in (["n0"], ["n1"]) and fault.target == f"node {nodes.removed[0]}"
    lost, left = (first, second) if nodes.removed == ["n0"] else (second, first)
    assert lost.wait(5) == -signal.SIGKILL and left.poll() is None


def test_processes_are_found_by_their_mark_and_can_be_ended(processes: Processes) -> None:
    own, driver, other = processes.start(OWN), processes.start(OWN, name="raylet"), processes.start(OTHER)
    assert marked_processes(OWN) == {own.pid: f"{SHARD} 60", driver.pid: "raylet 60"}
    assert left_after(OWN, 0.0, (SHARD,)) == {own.pid: f"{SHARD} 60"}
    left_after(OWN, WAIT_S, kill=True)
    assert own.wait(5) == driver.wait(5) == -signal.SIGKILL
    assert left_after(OWN, 0.0) == {} and other.poll() is None
