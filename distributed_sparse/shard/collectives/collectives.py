"""Collectives: what ranks say to each other within a step: sum, gather, broadcast.

Over NCCL on GPUs. On CPUs over gloo; and through memory that the ranks share where all are on one machine and a tensor is
small, as in a decode step: a socket's wake-ups cost more there than the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from distributed_sparse.shard.collectives.shared_memory import CAPACITY, SharedMemory, share
from distributed_sparse.shard.collectives.transports import ProcessGroup, Transport

Result = TypeVar("Result")


class CollectiveError(RuntimeError):
    """A collective did not complete: as a rule another rank has gone, and this one only noticed."""


class Collectives:
    """The calls between the ranks; one rank needs none and pays nothing. `meet` comes first.

    No global process group is made, so one process may hold several of these.

    Args:
        rank: of `world_size`.
        device: the tensors' device: gloo serves "cpu", NCCL serves "cuda".
        store: where the ranks meet.
        node_ip: the address that gloo listens on (a hostname may resolve to 127.0.0.1).
        timeout: seconds that one call, the meeting included, may wait for the other ranks.

    Attributes:
        all_reduce_calls, all_reduce_bytes: calls of `all_reduce`, and their payload in bytes on this rank; one rank sends
            nothing and counts nothing.
        timer: where given, a context manager's maker that is told "all_reduce" around each of them (profile steps).
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        store: dist.Store | None = None,
        node_ip: str = "127.0.0.1",
        timeout: float = 1800.0,
    ) -> None:
        assert store is not None or world_size == 1, "more than one rank meets at a store"
        self.rank = rank
        self.world_size = world_size
        self._device = torch.device(device)
        self._store = store
        self._node_ip = node_ip
        self._timeout = timedelta(seconds=timeout)
        self.reset_counts()
        self.timer: Callable[[str], AbstractContextManager[None]] | None = None
        self._group: ProcessGroup | None = None
        self._shared: SharedMemory | None = None

    def meet(self, generation: int = 0) -> None:
        """Leave the group of before, if there was one, and meet the other ranks under `gen{generation}`.

        So a rebuilt group never sees the old one's keys. A broken gloo group can be left; a broken NCCL group need not let go.

        Raises:
            CollectiveError: they did not all come.
        """
        self.close()
        if self._store is None:
            return
        prefixed = dist.PrefixStore(f"gen{generation}", self._store)
        try:
            if self._device.type == "cuda":
                self._group = ProcessGroup.nccl(prefixed, self.rank, self.world_size, self._timeout)
            else:
                self._group = ProcessGroup.gloo(prefixed, self.rank, self.world_size, self._node_ip, self._timeout)
                self._shared = share(self._group, self.rank, self.world_size, self._timeout)
        except RuntimeError as error:
            raise self._incomplete("rendezvous", error) from error

    def reset_counts(self) -> None:
        """Forget what was counted so far (warm-up)."""
        self.all_reduce_calls = 0
        self.all_reduce_bytes = 0

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place and in the dtype of `x` (any shape, contiguous); every rank gets the same bits."""
        if self._group is not None:
            self.all_reduce_calls += 1
            self.all_reduce_bytes += x.nbytes
            with self.timer("all_reduce") if self.timer is not None else nullcontext():
                self._pass("all_reduce", x, lambda way: way.all_reduce(x))
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[L, V_local] on every rank -> [L, V_local * world_size], columns in rank order; all ranks pass equal shapes."""
        if self._group is None:
            return x
        x = x.contiguous()
        return self._pass("all_gather", x, lambda way: torch.cat(way.all_gather(x), dim=-1))

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's `x` on every rank, in place (any shape and dtype, contiguous)."""
        if self._group is not None:
            self._pass("broadcast", x, lambda way: way.broadcast(x))
        return x

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """Which flags hold on every rank; all ranks pass equally many. Waits for the device."""
        if self._group is None:
            return list(flags)
        held = torch.tensor(flags, dtype=torch.float32, device=self._device)
        self._pass("agree", held, lambda way: way.all_reduce(held))
        return (held == self.world_size).tolist()

    def barrier(self) -> None:
        """Returns once every rank has called it."""
        if self._group is not None:
            # a sum of nothing much, read back: NCCL's own barrier would have to guess the device
            flag = torch.zeros(1, device=self._device)
            self._pass("barrier", flag, lambda way: way.all_reduce(flag))
            flag.item()

    def close(self) -> None:
        """Leave the group; only `meet` may be called after it. Harmless when called again."""
        for way in (self._group, self._shared):
            if way is not None:
                way.close()
        self._group = self._shared = None

    def _pass(self, what: str, x: torch.Tensor, call: Callable[[Transport], Result]) -> Result:
        """`call` with the way that `x` takes: memory that the ranks share, if it fits into it."""
        assert self._group is not None
        way: Transport = self._shared if self._shared is not None and x.nbytes <= CAPACITY else self._group
        try:
            return call(way)
        except RuntimeError as error:
            raise self._incomplete(what, error) from error

    def _incomplete(self, what: str, error: RuntimeError) -> CollectiveError:
        return CollectiveError(f"{what} on rank {self.rank} of {self.world_size} did not complete: {error}")
