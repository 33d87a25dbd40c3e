"""transports: a way by which ranks pass tensors to each other; and those that torch has: gloo for CPUs, NCCL for GPUs."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Transport(Protocol):
    """What `Collectives` calls. All ranks make the same calls, with contiguous tensors of equal shapes and dtypes.

    A call that cannot be completed, since a rank has gone or is late, raises RuntimeError.
    """

    def all_reduce(self, x: Tensor) -> None:
        """The sum over the ranks, in place; the same bits on every rank."""

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's `x`, in rank order, to be read before the next call."""

    def broadcast(self, x: Tensor) -> None:
        """Rank 0's `x`, in place."""

    def close(self) -> None:
        """Leave; the others may learn of it."""


class ProcessGroup:
    """A process group of torch that is nobody's default, so one process may hold several."""

    def __init__(self, group: dist.ProcessGroupGloo | dist.ProcessGroupNCCL) -> None:
        self._group: Any = group  # its methods are not in torch's stubs

    @staticmethod
    def gloo(store: dist.Store, rank: int, world_size: int, node_ip: str, timeout: timedelta) -> ProcessGroup:
        """Between CPU ranks, on the interface that has `node_ip`."""
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=node_ip)]
        options._timeout = timeout
        return ProcessGroup(dist.ProcessGroupGloo(store, rank, world_size, options))

    @staticmethod
    def nccl(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> ProcessGroup:
        """Between GPU ranks; each has made its GPU the current device."""
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        group = dist.ProcessGroupNCCL(store, rank, world_size, options)
        # connect now: a rank that is missing is found at the meeting, and not inside the first step or a graph capture
        group.eager_connect_single_device(torch.device("cuda", torch.cuda.current_device()))
        return ProcessGroup(group)

    def all_reduce(self, x: Tensor) -> None:
        self._group.allreduce([x]).wait()

    def all_gather(self, x: Tensor) -> list[Tensor]:
        parts = x.new_empty((self._group.size(), *x.shape))
        is_gloo = isinstance(self._group, dist.ProcessGroupGloo)
        if is_gloo:
            self._group.allgather([list(parts.unbind(0))], [x]).wait()
        else:
            self._group._allgather_base(parts, x).wait()
        return list(parts.unbind(0))

    def broadcast(self, x: Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        self._group.broadcast([x], options).wait()

    def close(self) -> None:
        self._group.shutdown()
