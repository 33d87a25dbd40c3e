"""Rays of a test's own: where each lives, which processes belong to it, and their end even when the test fails."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.patience import WAIT_S

FAST_HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_failure_threshold": "5",
}
"""Ray counts a node as dead after 3 s of silence; by default after 14 to 16."""


@contextlib.contextmanager
def own_ray(ray_environment: Path) -> Iterator[dict[str, str]]:
    """The environment in which a process starts, and finds, a Ray that no other test sees; all that is left of it is killed.

    Args:
        ray_environment: the fixture's folder; Ray's own folder is made in it.
    """
    folder = tempfile.mkdtemp(prefix="own-", dir=ray_environment)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    try:
        yield environment | {"RAY_TMPDIR": folder}
    finally:
        kill_processes(folder)


def ray_processes(folder: str) -> dict[int, str]:
    """Pid and command of every process of the Ray that lives in `folder`, and of all that it has started."""
    mark = f"RAY_TMPDIR={folder}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            # it may end while it is looked at; another user's may not be looked at
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found[int(entry.name)] = command.strip()
    return found


def assert_no_processes(folder: str, timeout: float = WAIT_S, but: tuple[str, ...] = ()) -> None:
    """Within `timeout` seconds all processes of that Ray end, `but` for those whose commands begin so."""
    deadline = time.monotonic() + timeout
    while left := [command for command in ray_processes(folder).values() if not command.startswith(but)]:
        assert time.monotonic() < deadline, f"{len(left)} processes of Ray are left: {left}"
        time.sleep(0.1)


def kill_processes(folder: str, timeout: float = WAIT_S) -> None:
    deadline = time.monotonic() + timeout
    while (left := ray_processes(folder)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
