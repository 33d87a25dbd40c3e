"""Collectives: all-reduce, all-gather and broadcast between the ranks of a step.

NCCL on GPUs, gloo on CPUs. CPU ranks on one machine pass small tensors, as in decode steps, through shared memory instead:
a socket's wake-ups would cost more than the sum.
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
    """A collective did not complete, usually since another rank has failed."""


class Collectives:
    """Collective operations between the ranks. Call `rendezvous` first. With one rank, every operation is a no-op.

    Creates no global process group, so one process may hold several of these.

    Args:
        rank: of `world_size`.
        device: the tensors' device: gloo serves "cpu", NCCL serves "cuda".
        store: rendezvous store of the ranks; required for more than one rank.
        node_ip: the address that gloo listens on (a hostname may resolve to 127.0.0.1).
        timeout: seconds that one call, `rendezvous` included, waits for the other ranks.

    Attributes:
        all_reduce_calls, all_reduce_bytes: calls of `all_reduce`, and their payload in bytes on this rank; 0 with one rank.
        timer: returns a context manager for the name "all_reduce", which wraps each of them in profile steps; or None.
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

    def rendezvous(self, generation: int = 0) -> None:
        """Leave the previous group, if any, and form a new one with the other ranks.

        Store keys are prefixed with `gen{generation}`, so that a rebuilt group never sees an old group's keys. Leaving a broken
        gloo group works; leaving a broken NCCL group may hang.

        Raises:
            CollectiveError: not all ranks joined in time.
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
        """Zero the counters, after the warm-up."""
        self.all_reduce_calls = 0
        self.all_reduce_bytes = 0

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place and in x's dtype (any shape, contiguous); all ranks get the same bits."""
        if self._group is not None:
            self.all_reduce_calls += 1
            self.all_reduce_bytes += x.nbytes
            with self.timer("all_reduce") if self.timer is not None else nullcontext():
                self._call("all_reduce", x, lambda transport: transport.all_reduce(x))
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[L, V_local] on every rank -> [L, V_local * world_size], columns in rank order; all ranks pass equal shapes."""
        if self._group is None:
            return x
        x = x.contiguous()
        return self._call("all_gather", x, lambda transport: torch.cat(transport.all_gather(x), dim=-1))

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's `x` on every rank, in place (any shape and dtype, contiguous)."""
        if self._group is not None:
            self._call("broadcast", x, lambda transport: transport.broadcast(x))
        return x

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """Logical and of each flag over the ranks, which pass equally many. Synchronises with the device."""
        if self._group is None:
            return list(flags)
        held = torch.tensor(flags, dtype=torch.float32, device=self._device)
        self._call("agree", held, lambda transport: transport.all_reduce(held))
        return (held == self.world_size).tolist()

    def barrier(self) -> None:
        """Wait until every rank has called it."""
        if self._group is not None:
            # an all-reduce of one element, read back: NCCL's own barrier would have to guess the device
            flag = torch.zeros(1, device=self._device)
            self._call("barrier", flag, lambda transport: transport.all_reduce(flag))
            flag.item()

    def close(self) -> None:
        """Leave the group; only `rendezvous` may be called afterwards. May be called more than once."""
        for transport in (self._group, self._shared):
            if transport is not None:
                transport.close()
        self._group = self._shared = None

    def _call(self, what: str, x: torch.Tensor, call: Callable[[Transport], Result]) -> Result:
        """Run `call` with the transport for `x`: shared memory if there is one and `x` fits, else the process group."""
        assert self._group is not None
        transport: Transport = self._shared if self._shared is not None and x.nbytes <= CAPACITY else self._group
        try:
            return call(transport)
        except RuntimeError as error:
            raise self._incomplete(what, error) from error

    def _incomplete(self, what: str, error: RuntimeError) -> CollectiveError:
        return CollectiveError(f"{what} on rank {self.rank} of {self.world_size} did not complete: {error}")
