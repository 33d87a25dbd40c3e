"""transports: the interface by which ranks exchange tensors, and torch's process groups: gloo for CPUs, NCCL for GPUs."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Transport(Protocol):
    """Interface used by `Collectives`. All ranks make the same calls, with contiguous tensors of equal shapes and dtypes.

    A call raises RuntimeError if a rank has left or does not call in time.
    """

    def all_reduce(self, x: Tensor) -> None:
        """Sum over the ranks, in place; the same bits on every rank."""

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's `x`, in rank order; valid until the next call."""

    def broadcast(self, x: Tensor) -> None:
        """Copy rank 0's `x` to every rank, in place."""

    def close(self) -> None:
        """Leave the group. The other ranks may notice."""


class ProcessGroup:
    """A process group of torch that is not registered as the default group, so one process may hold several."""

    def __init__(self, group: dist.ProcessGroupGloo | dist.ProcessGroupNCCL) -> None:
        self._group: Any = group  # its methods are not in torch's stubs

    @staticmethod
    def gloo(store: dist.Store, rank: int, world_size: int, node_ip: str, timeout: timedelta) -> ProcessGroup:
        """A group of CPU ranks, on the network interface with the address `node_ip`."""
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=node_ip)]
        options._timeout = timeout
        return ProcessGroup(dist.ProcessGroupGloo(store, rank, world_size, options))

    @staticmethod
    def nccl(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> ProcessGroup:
        """A group of GPU ranks, each on its current CUDA device."""
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        group = dist.ProcessGroupNCCL(store, rank, world_size, options)
        # Connect now, so that a missing rank is reported here and not inside the first step or a graph capture.
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
