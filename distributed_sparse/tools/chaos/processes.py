"""processes: find and kill the processes that a soak started, by a mark in their environment."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

MARK = "DISTRIBUTED_SPARSE_SOAK"
"""Environment variable inherited by every process of a soak; its value is the mark."""
SHARD, DRIVER = "ray::ShardActor", "ray::DriverActor"
"""Ray's names of actor processes."""
POLL_S = 0.1


def marked_processes(mark: str, names: tuple[str, ...] = ("",)) -> dict[int, str]:
    """Pid -> command of the other processes with this mark whose command begins with one of `names`."""
    wanted, found = f"{MARK}={mark}".encode(), {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            # the process may end meanwhile, or belong to another user
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    if command.startswith(names):
                        found[int(entry.name)] = command
    return found


def left_after(mark: str, timeout: float, names: tuple[str, ...] = ("",), kill: bool = False) -> dict[int, str]:
    """Wait up to `timeout` seconds for the `marked_processes` to end, or kill them; return those that remain."""
    deadline = time.monotonic() + timeout
    while (left := marked_processes(mark, names)) and time.monotonic() < deadline:
        for pid in left if kill else ():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S)
    return left
