"""leaks: what remains of an engine after its shutdown: processes, threads, placement groups, resources, GPU memory."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ACTORS = ("ray::DriverActor", "ray::ShardActor")
"""Ray's names for the processes of an engine's actors."""
OTHERS = ("ray_",)
"""Threads that libraries keep until the process ends: Ray's after it has connected."""
LIBRARIES_BYTES = 96 << 20
"""GPU memory that libraries keep in this process after first use (cuBLAS workspaces); an engine's is far larger."""
POLL_S = 0.1


class Surroundings:
    """The state before the first engine; after each engine there should be no more.

    Covers processes of former ranks on this machine, actors' processes below this one, this process's threads and GPU memory (a
    single rank runs in it), and the whole cluster's placement groups and free CPUs and GPUs.
    """

    def __init__(self) -> None:
        self._actors = actors_below(os.getpid())
        self._threads = own_threads()
        self._gpu_bytes = gpu_bytes()
        self._groups = placement_groups()
        self._free = free_resources()
        self._watched: set[int] = set()
        self._reported: list[str] = []

    def watch(self, ranks: Sequence[dict[str, Any]]) -> None:
        """Watch the processes of a started engine, given `LLM.stats()["ranks"]`."""
        here = socket.gethostname()
        self._watched |= {rank["pid"] for rank in ranks if rank["hostname"] == here} - {os.getpid()}

    def left_behind(self, timeout: float = 15.0) -> list[str]:
        """What remains after at most `timeout` seconds, one line each, marked if an earlier call found it, too."""
        deadline = time.monotonic() + timeout
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        self._watched = {pid for pid in self._watched if command(pid)}
        before, self._reported = self._reported, left
        return [f"{line}, since an earlier point" if line in before else line for line in left]

    def _left(self) -> list[str]:
        gc.collect()  # garbage does not count
        pids = self._watched | actors_below(os.getpid()) - self._actors
        left = [f"process {pid} ({name})" for pid in sorted(pids) if (name := command(pid))]
        left += [f"thread {name}" for name in sorted(thread.name for thread in own_threads() - self._threads)]
        if (grown := gpu_bytes() - self._gpu_bytes) > LIBRARIES_BYTES:
            left.append(f"{grown} bytes of GPU memory in this process")
        left += [f"placement group {group}" for group in sorted(placement_groups() - self._groups)]
        free = free_resources()
        for name, amount in self._free.items():
            if free.get(name, 0.0) < amount - 1e-6:
                left.append(f"{name}: {free.get(name, 0.0):g} of {amount:g} are free again")
        return left


def actors_below(pid: int) -> set[int]:
    """Processes of an engine's actors that descend from `pid`, which started their Ray."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended in the meantime
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])

    def descends(child: int) -> bool:
        while child in parents and child != pid:
            child = parents[child]
        return child == pid

    return {child for child in parents if command(child).startswith(ACTORS) and descends(child)}


def own_threads() -> set[threading.Thread]:
    """This process's Python threads without those of libraries."""
    return {
        thread
        for thread in threading.enumerate()
        if not thread.name.startswith(OTHERS)
        and not isinstance(thread, threading._DummyThread)  # a library's thread that called Python
        and type(thread).__module__ != "tqdm._monitor"
    }


def gpu_bytes() -> int:
    """GPU memory of this process's tensors; 0 if it has not used a GPU. Does not initialize CUDA."""
    return torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0


def command(pid: int) -> str:
    """The command line of a process; empty if it has ended, even as a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def placement_groups() -> set[str]:
    """Ids of the cluster's placement groups that have not been removed."""
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
    """Ray, if an engine of this process has connected to it; a single rank does not, and this file does not import it."""
    ray = sys.modules.get("ray")
    return ray if ray is not None and ray.is_initialized() else None
