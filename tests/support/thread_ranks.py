"""run_ranks: tensor-parallel ranks as threads of one process, that really add and gather each other's tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
_TIMEOUT = 60.0


class _Meeting:
    """Where the threads exchange one tensor each."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size, timeout=_TIMEOUT)
        self.tensors: list[Tensor] = [torch.empty(0)] * world_size

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        self.tensors[rank] = x
        self.barrier.wait()
        tensors = list(self.tensors)
        # Nobody may bring the next tensor before all have seen these.
        self.barrier.wait()
        return tensors


class ThreadCollectives:
    """all_reduce and all_gather among the threads of `run_ranks`; counts its calls."""

    def __init__(self, rank: int, world_size: int, meeting: _Meeting) -> None:
        self.rank, self.world_size, self._meeting = rank, world_size, meeting
        self.num_all_reduces = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, added in the order of ranks, so all get the same bits."""
        self.num_all_reduces += 1
        first, *others = self._meeting.exchange(self.rank, x)
        total = first.clone()
        for other in others:
            total += other
        return total

    def all_gather(self, x: Tensor) -> Tensor:
        """Along the last dimension, in the order of ranks."""
        return torch.cat(self._meeting.exchange(self.rank, x), dim=-1)


def run_ranks(world_size: int, work: Callable[[ThreadCollectives], Result]) -> list[Result]:
    """Run ``work`` once per rank, in threads, and return the results in the order of ranks; a rank's error is raised."""
    meeting = _Meeting(world_size)

    def run(rank: int) -> Result:
        try:
            return work(ThreadCollectives(rank, world_size, meeting))
        except BaseException:
            meeting.barrier.abort()  # or the others would wait for this rank
            raise

    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(run, rank) for rank in range(world_size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]
