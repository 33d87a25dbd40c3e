"""What an engine leaves behind is found: a process or a thread that did not end, a placement group, CPUs that stay taken."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading

import pytest
import torch

from distributed_sparse.tools.scaling import leaks
from distributed_sparse.tools.scaling.leaks import Surroundings


def rank_of(pid: int, hostname: str | None = None) -> dict[str, object]:
    return {"pid": pid, "hostname": hostname or socket.gethostname()}


def test_a_rank_that_still_runs_is_named_until_it_has_ended() -> None:
    before = Surroundings()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        before.watch([rank_of(process.pid)])
        (line,) = before.left_behind(timeout=0.2)
        assert line.startswith(f"process {process.pid} (") and line.endswith("input())")
        assert before.left_behind(timeout=0.0) == [f"{line}, since an earlier point"]
        process.communicate(b"\n")
    assert before.left_behind(timeout=0.2) == []


def test_this_process_and_another_machine_s_are_no_leak() -> None:
    before = Surroundings()
    before.watch([rank_of(os.getpid()), rank_of(1, "elsewhere")])
    assert before.left_behind(timeout=0.0) == []


def test_a_thread_that_an_engine_has_left_in_this_process_is_named_and_a_library_s_is_not() -> None:
    end = threading.Event()
    threads = [threading.Thread(target=end.wait, name=name, daemon=True) for name in ("before", "driver", "ray_print_logs")]
    threads[0].start()
    before = Surroundings()
    for thread in threads[1:]:
        thread.start()
    assert before.left_behind(timeout=0.2) == ["thread driver"]
    end.set()
    assert before.left_behind() == []
    for thread in threads:
        thread.join()


def test_gpu_memory_that_stays_in_this_process_is_a_leak_but_for_what_libraries_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated = 1 << 30
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: allocated)
    before = Surroundings()
    allocated += leaks.LIBRARIES_BYTES
    assert before.left_behind(timeout=0.0) == []
    allocated += 1
    assert before.left_behind(timeout=0.0) == [f"{leaks.LIBRARIES_BYTES + 1} bytes of GPU memory in this process"]


def test_an_actor_s_process_below_this_one_is_found_by_its_name() -> None:
    before = Surroundings()
    with subprocess.Popen(["bash", "-c", "exec -a ray::DriverActor.stats cat"], stdin=subprocess.PIPE) as process:
        (line,) = before.left_behind(timeout=1.0)
        assert line == f"process {process.pid} (ray::DriverActor.stats)"
        assert Surroundings().left_behind(timeout=0.0) == []  # it was there before
        process.communicate()


def test_placement_groups_and_resources_must_be_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    groups, free = {"a"}, {"CPU": 4.0, "GPU": 2.0}
    monkeypatch.setattr(leaks, "placement_groups", lambda: set(groups))
    monkeypatch.setattr(leaks, "free_resources", lambda: dict(free))
    before = Surroundings()
    assert before.left_behind(timeout=0.0) == []
    groups.add("b")
    free["GPU"] = 1.0
    assert before.left_behind(timeout=0.0) == ["placement group b", "GPU: 1 of 2 are free again"]
