"""process: checks for forked children, which cannot use the threads, sockets and actors of their parent."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Origin:
    """The process that made an object. A copy of the object in a forked child must neither work nor clean up.

    Compares process ids and takes no lock: a lock held by another thread during the fork is never released in the child.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()

    @property
    def is_here(self) -> bool:
        """Whether the current process made the object, not a forked child."""
        return os.getpid() == self.pid

    def check(self) -> None:
        """Raise RuntimeError in a forked child."""
        if not self.is_here:
            raise RuntimeError(
                f"this engine belongs to process {self.pid}, and process {os.getpid()} is a forked child, which does not "
                "inherit its threads and connections; make an LLM inside the child, or start the child with the 'spawn' method "
                "of multiprocessing (torch's DataLoader: multiprocessing_context='spawn')"
            )


class _Fork:
    """State of this process with respect to forks."""

    is_child = False
    ray_of: int | None = None
    """Id of the parent process if it was connected to Ray when it forked this process."""


def check_ray_is_own() -> None:
    """Raise RuntimeError in a forked child of a process that was connected to Ray: the child cannot connect."""
    if _Fork.ray_of is not None:
        raise RuntimeError(
            f"process {os.getpid()} is a forked child of process {_Fork.ray_of}, which was connected to Ray, and Ray does not "
            "work in a forked child; start it with the 'spawn' method of multiprocessing, or use one rank and "
            "distributed_executor_backend='uni'"
        )


def on_usable_thread(work: Callable[[], T]) -> T:
    """Run `work()`; in a forked child, on a new thread.

    GNU OpenMP hangs in a forked child on a thread that ran parallel code before the fork.
    """
    if not _Fork.is_child:
        return work()
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def _after_fork() -> None:
    _Fork.is_child = True
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        _Fork.ray_of = os.getppid()


os.register_at_fork(after_in_child=_after_fork)
