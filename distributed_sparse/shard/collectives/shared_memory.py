"""SharedMemory: how CPU ranks of one node pass tensors to each other: by writing and reading, without a socket between them."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import mmap
import os
import secrets
import struct
import time
from contextlib import suppress
from datetime import timedelta

import torch
from torch import Tensor

from distributed_sparse.kernels import native
from distributed_sparse.shard.collectives.transports import Transport

CAPACITY = 1 << 20
"""Bytes that a rank can pass in one exchange. Larger tensors go over gloo, whose waiting is little beside their copying."""

MAX_RANKS = 62
_TOKEN_BYTES = 32
_TICKET_BYTES = 128
_LINE = 64  # bytes of a cache line: each rank's number has its own, behind the token's
_HEADER = 4096
_NAP_S = 5e-3  # between two looks at whether the rank that is waited for still lives
_LOCK = struct.Struct("@hhqqi4x")  # struct flock: type, whence, start, length, pid


class SharedMemory:
    """One exchange after the other, each of which every rank takes part in: each gives a tensor and sees everyone's.

    The memory has no name in any file system, so nothing is left behind however its users end. Each rank holds a lock on one
    byte of it, which the kernel gives up when the rank's process ends: so a rank that waits for another learns of its end.

    Args:
        file: descriptor of the memory; it is this object's from now on.
        rank: of `world_size`, 0 <= rank < MAX_RANKS.
        timeout: how long a rank waits for the others in one exchange.

    Raises:
        OSError: the memory cannot be mapped; the descriptor is closed.
    """

    def __init__(self, file: int, rank: int, world_size: int, timeout: timedelta) -> None:
        self._file = file
        self.rank = rank
        self.world_size = world_size
        self.timeout = timeout
        self._number = 0  # of the last exchange
        try:
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, _lock(fcntl.F_WRLCK, rank))
            self._mapped = mmap.mmap(file, memory_bytes(world_size))
        except OSError:
            os.close(file)
            raise
        with torch.inference_mode(False):  # written to in that mode and out of it
            self._bytes = torch.frombuffer(self._mapped, dtype=torch.uint8)
        library = native.library()
        assert library is not None
        numbers = ctypes.c_void_p(self._bytes.data_ptr() + _LINE)
        self._barrier_call = functools.partial(library.barrier, numbers, ctypes.c_int(rank), ctypes.c_int(world_size))

    def all_reduce(self, x: Tensor) -> None:
        """See `transports.Transport`. One by one, in rank order: the same bits on every rank."""
        first, *others = self.exchange(x)
        x.copy_(first)
        for part in others:
            x += part

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """See `transports.Transport`."""
        return self.exchange(x)

    def broadcast(self, x: Tensor) -> None:
        """See `transports.Transport`."""
        first = self.exchange(x)[0]
        if self.rank > 0:
            x.copy_(first)

    def exchange(self, x: Tensor) -> list[Tensor]:
        """Every rank's `x` in rank order, as views of the memory: until the exchange after the next, and not to be written.

        Args:
            x: contiguous, at most CAPACITY bytes; equal shapes and dtypes on all ranks.

        Raises:
            RuntimeError: a rank has left or died, or has not come in time.
        """
        # Two buffers by turns: who writes exchange n has seen all ranks come to n - 1, and so they are through with n - 2.
        self._number += 1
        views = [self._view(rank, x) for rank in range(self.world_size)]
        views[self.rank].copy_(x)
        deadline = time.monotonic() + self.timeout.total_seconds()
        while (missing := self._barrier_wait(_NAP_S)) >= 0:
            if self._has_left(missing) and self._barrier_wait(0.0) >= 0:
                raise RuntimeError(f"rank {missing} has left")
            if time.monotonic() > deadline:
                raise RuntimeError(f"rank {missing} did not come in {self.timeout.total_seconds():g} s")
        return views

    def close(self) -> None:
        """Leave: the others learn of it when they next wait for this rank."""
        if self._file >= 0:
            # the mapping keeps the file open, and so the lock, for as long as anything still holds one of its tensors
            fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, _lock(fcntl.F_UNLCK, self.rank))
            os.close(self._file)
            self._file = -1

    def _view(self, rank: int, x: Tensor) -> Tensor:
        start = _HEADER + (2 * rank + self._number % 2) * CAPACITY
        return self._bytes[start : start + x.numel() * x.element_size()].view(x.dtype).view(x.shape)

    def _barrier_wait(self, seconds: float) -> int:
        """Say that this rank has come; wait for the others. -1, or the first rank that has not come."""
        return self._barrier_call(ctypes.c_int64(self._number), ctypes.c_int64(int(seconds * 1e9)))

    def _has_left(self, rank: int) -> bool:
        found = fcntl.fcntl(self._file, fcntl.F_OFD_GETLK, _lock(fcntl.F_WRLCK, rank))
        return _LOCK.unpack(found)[0] == fcntl.F_UNLCK


def share(group: Transport, rank: int, world_size: int, timeout: timedelta) -> SharedMemory | None:
    """Memory that all ranks of a group share, or None on all of them: they are on several machines, or one of them cannot.

    Raises:
        RuntimeError: a rank has gone.
    """
    made = create(world_size) if rank == 0 else None
    ticket = torch.zeros(_TICKET_BYTES, dtype=torch.uint8)
    if made is not None:
        ticket[: len(made[1])] = torch.frombuffer(bytearray(made[1]), dtype=torch.uint8)
    group.broadcast(ticket)
    file = made[0] if made is not None else attach(bytes(ticket.tolist()).rstrip(b"\0"))
    shared = None
    if file is not None:
        with suppress(OSError):
            shared = SharedMemory(file, rank, world_size, timeout)
    able = torch.tensor([shared is not None], dtype=torch.int32)
    group.all_reduce(able)
    if shared is not None and able.item() < world_size:
        shared.close()
        return None
    return shared


def memory_bytes(world_size: int) -> int:
    """Bytes of address space; memory is taken for what is written to alone."""
    return _HEADER + 2 * world_size * CAPACITY


def create(world_size: int) -> tuple[int, bytes] | None:
    """New memory as a descriptor, and what `attach` in another process needs; None where the system has no such thing."""
    if (
        world_size > MAX_RANKS
        or native.library() is None
        or not hasattr(os, "memfd_create")
        or not hasattr(fcntl, "F_OFD_SETLK")
    ):
        return None
    try:
        file = os.memfd_create("distributed_sparse")
    except OSError:  # no descriptor is left
        return None
    os.ftruncate(file, memory_bytes(world_size))
    token = secrets.token_bytes(_TOKEN_BYTES)
    os.pwrite(file, token, 0)
    return file, token + f"/proc/{os.getpid()}/fd/{file}".encode()


def attach(ticket: bytes) -> int | None:
    """A descriptor of another process's memory by what `create` gave; None where it is out of reach (another machine)."""
    if native.library() is None:
        return None
    try:
        file = os.open(ticket[_TOKEN_BYTES:], os.O_RDWR | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
    try:
        if os.pread(file, _TOKEN_BYTES, 0) == ticket[:_TOKEN_BYTES]:  # and not some file of that name on this machine
            return file
    except OSError:
        pass
    os.close(file)
    return None


def _lock(kind: int, rank: int) -> bytes:
    return _LOCK.pack(kind, os.SEEK_SET, _LINE * (rank + 1), 1, 0)
