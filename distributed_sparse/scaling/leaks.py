"""leaks: what an engine has left behind after its shutdown: processes, placement groups, resources."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ACTORS = ("ray::DriverActor", "ray::ShardActor")
"""How Ray names the processes of an engine's actors."""
POLL_S = 0.1


class Surroundings:
    """What there was before an engine was made; afterwards there should be no more.

    Seen are this machine's processes of the former ranks, the actors' processes below this one, and, over the whole cluster,
    placement groups and free CPUs and GPUs.
    """

    def __init__(self) -> None:
        self._actors = actors_below(os.getpid())
        self._groups = placement_groups()
        self._free = free_resources()

    def left_behind(self, ranks: Sequence[dict[str, Any]], timeout: float = 15.0) -> list[str]:
        """What has not gone within `timeout` seconds; one line each.

        Args:
            ranks: `LLM.stats()["ranks"]` of the engine.
        """
        deadline = time.monotonic() + timeout
        while (left := self._left(ranks)) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return left

    def _left(self, ranks: Sequence[dict[str, Any]]) -> list[str]:
        here = socket.gethostname()
        pids = {rank["pid"] for rank in ranks if rank["hostname"] == here} - {os.getpid()}
        pids |= actors_below(os.getpid()) - self._actors
        left = [f"process {pid} ({name})" for pid in sorted(pids) if (name := command(pid))]
        left += [f"placement group {group}" for group in sorted(placement_groups() - self._groups)]
        free = free_resources()
        for name, amount in self._free.items():
            if free.get(name, 0.0) < amount - 1e-6:
                left.append(f"{name}: {free.get(name, 0.0):g} of {amount:g} are free again")
        return left


def actors_below(pid: int) -> set[int]:
    """Processes of an engine's actors that descend from `pid` (a Ray that it has started itself)."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])

    def descends(child: int) -> bool:
        while child in parents and child != pid:
            child = parents[child]
        return child == pid

    return {child for child in parents if command(child).startswith(ACTORS) and descends(child)}


def command(pid: int) -> str:
    """The command line of a process; empty where it has ended (also if nobody has waited for it yet)."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def placement_groups() -> set[str]:
    """Ids of the cluster's placement groups, those apart that have been removed."""
    ray = connected_ray()
    if ray is None:
        return set()
    return {group for group, row in ray.util.placement_group_table().items() if row["state"] != "REMOVED"}


def free_resources() -> dict[str, float]:
    """The cluster's free CPUs and GPUs."""
    ray = connected_ray()
    free = {} if ray is None else ray.available_resources()
    return {name: free[name] for name in ("CPU", "GPU") if name in free}


def connected_ray() -> Any | None:
    """Ray, where an engine of this process has connected to it: one rank needs none, and this file does not bring it in."""
    ray = sys.modules.get("ray")
    return ray if ray is not None and ray.is_initialized() else None
