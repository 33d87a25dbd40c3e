"""Collectives: what ranks say to each other within a step: sum, gather, broadcast.

Over NCCL on GPUs. On CPUs over gloo; and through memory that the ranks share where all are on one machine and a tensor is
small, as in a decode step: a socket's wake-ups cost more there than the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from distributed_sparse.shard import shared_memory
from distributed_sparse.shard.shared_memory import SharedMemory

_TICKET_BYTES = 128


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
        self._group: dist.ProcessGroupGloo | dist.ProcessGroupNCCL | None = None
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
                self._group = nccl_group(prefixed, self.rank, self.world_size, self._timeout)
            else:
                self._group = gloo_group(prefixed, self.rank, self.world_size, self._node_ip, self._timeout)
                self._shared = self._share()
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
            self.all_reduce_bytes += x.numel() * x.element_size()
            with self.timer("all_reduce") if self.timer is not None else nullcontext():
                parts = self._exchange("all_reduce", x)
                if parts is None:
                    self._complete("all_reduce", lambda group: group.allreduce([x]))
                else:  # one by one, in rank order: the same bits on every rank
                    x.copy_(parts[0])
                    for part in parts[1:]:
                        x += part
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[L, V_local] on every rank -> [L, V_local * world_size], columns in rank order; all ranks pass equal shapes."""
        if self._group is None:
            return x
        x = x.contiguous()
        shared = self._exchange("all_gather", x)
        if shared is not None:
            return torch.cat(shared, dim=-1)
        parts = x.new_empty((self.world_size, *x.shape))
        if isinstance(self._group, dist.ProcessGroupGloo):
            self._complete("all_gather", lambda group: group.allgather([list(parts.unbind(0))], [x]))
        else:
            self._complete("all_gather", lambda group: group._allgather_base(parts, x))
        return parts.movedim(0, -2).reshape(*x.shape[:-1], self.world_size * x.shape[-1])

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's `x` on every rank, in place (any shape and dtype, contiguous)."""
        if self._group is None:
            return x
        shared = self._exchange("broadcast", x)
        if shared is not None:
            if self.rank > 0:
                x.copy_(shared[0])
        else:
            options = dist.BroadcastOptions()
            options.rootRank = 0
            options.rootTensor = 0
            self._complete("broadcast", lambda group: group.broadcast([x], options))
        return x

    def barrier(self) -> None:
        """Returns once every rank has called it."""
        if self._group is not None:
            # a sum of nothing much, read back: NCCL's own barrier would have to guess the device
            flag = torch.zeros(1, device=self._device)
            if self._exchange("barrier", flag) is None:
                self._complete("barrier", lambda group: group.allreduce([flag]))
            flag.item()

    def close(self) -> None:
        """Leave the group; only `meet` may be called after it. Harmless when called again."""
        group, self._group = self._group, None
        if group is not None:
            group.shutdown()
        shared, self._shared = self._shared, None
        if shared is not None:
            shared.close()

    def _share(self) -> SharedMemory | None:
        """Memory that all ranks share, or None: they are on several machines, or one of them cannot."""
        group: Any = self._group
        made = shared_memory.create(self.world_size) if self.rank == 0 else None
        ticket = torch.zeros(_TICKET_BYTES, dtype=torch.uint8)
        if made is not None:
            ticket[: len(made[1])] = torch.frombuffer(bytearray(made[1]), dtype=torch.uint8)
        group.broadcast([ticket], dist.BroadcastOptions()).wait()  # rank 0's
        file = made[0] if made is not None else shared_memory.attach(bytes(ticket.tolist()).rstrip(b"\0"))
        shared = SharedMemory(file, self.rank, self.world_size) if file is not None else None
        able = torch.tensor([shared is not None], dtype=torch.int32)
        group.allreduce([able]).wait()
        if shared is not None and able.item() < self.world_size:
            shared.close()
            return None
        return shared

    def _exchange(self, what: str, x: torch.Tensor) -> list[torch.Tensor] | None:
        """Every rank's `x` through shared memory; None where there is none, or `x` is too large for it."""
        if self._shared is None or x.numel() * x.element_size() > shared_memory.CAPACITY:
            return None
        try:
            return self._shared.exchange(x, self._timeout)
        except RuntimeError as error:
            raise self._incomplete(what, error) from error

    def _complete(self, what: str, begin: Callable[[Any], dist.Work]) -> None:
        try:
            begin(self._group).wait()
        except RuntimeError as error:
            raise self._incomplete(what, error) from error

    def _incomplete(self, what: str, error: RuntimeError) -> CollectiveError:
        return CollectiveError(f"{what} on rank {self.rank} of {self.world_size} did not complete: {error}")


def gloo_group(store: dist.Store, rank: int, world_size: int, node_ip: str, timeout: timedelta) -> dist.ProcessGroupGloo:
    """Gloo between CPU ranks, on the interface that has `node_ip`."""
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=node_ip)]
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, world_size, options)


def nccl_group(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.ProcessGroupNCCL:
    """NCCL between GPU ranks; each has made its GPU the current device."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    group = dist.ProcessGroupNCCL(store, rank, world_size, options)
    # connect now: a rank that is missing is found at the meeting, and not inside the first step or a graph capture
    group.eager_connect_single_device(torch.device("cuda", torch.cuda.current_device()))
    return group
