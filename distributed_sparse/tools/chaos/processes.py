"""processes: which processes a soak has started, found by a mark in their environment."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

MARK = "DISTRIBUTED_SPARSE_SOAK"
"""The environment variable that every process of a soak inherits."""
SHARD, DRIVER = "ray::ShardActor", "ray::DriverActor"
"""How Ray names the processes of actors."""
POLL_S = 0.1


def marked_processes(mark: str, names: tuple[str, ...] = ("",)) -> dict[int, str]:
    """Pid and command of the other processes that carry the mark, with a command that begins with one of `names`."""
    wanted, found = f"{MARK}={mark}".encode(), {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            # it may end while it is looked at; another user's may not be looked at
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    if command.startswith(names):
                        found[int(entry.name)] = command
    return found


def left_after(mark: str, timeout: float, names: tuple[str, ...] = ("",)) -> dict[int, str]:
    """Those of `marked_processes` that have not ended within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while (left := marked_processes(mark, names)) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return left


def kill_marked(mark: str, timeout: float = 10.0) -> None:
    """End all of them."""
    deadline = time.monotonic() + timeout
    while (left := marked_processes(mark)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S)
