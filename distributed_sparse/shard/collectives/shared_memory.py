"""SharedMemory: exchanges small tensors between CPU ranks of one node through shared memory, without sockets."""

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
"""Bytes that a rank can pass in one exchange. Larger tensors go over gloo, whose latency is small beside their copying."""

MAX_RANKS = 62
_TOKEN_BYTES = 32
_TICKET_BYTES = 128
_LINE = 64  # bytes of a cache line: the first holds the token, then one per rank holds its exchange number
_HEADER = 4096
_POLL_S = 5e-3  # between two checks whether the missing rank is alive
_LOCK = struct.Struct("@hhqqi4x")  # struct flock: type, whence, start, length, pid


class SharedMemory:
    """A `Transport` made of exchanges: in each, every rank writes a tensor and reads all ranks' tensors.

    The memory has no name in a file system, so nothing is left behind when processes die. Each rank holds a lock on one byte of
    it, which the kernel releases when the rank's process ends: a waiting rank thus detects that another one has died.

    Args:
        file: descriptor of the memory; this object takes ownership.
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
        with torch.inference_mode(False):  # it is written to both in and outside inference mode
            self._bytes = torch.frombuffer(self._mapped, dtype=torch.uint8)
        library = native.library()
        assert library is not None
        numbers = ctypes.c_void_p(self._bytes.data_ptr() + _LINE)
        self._native_barrier = functools.partial(library.barrier, numbers, ctypes.c_int(rank), ctypes.c_int(world_size))

    def all_reduce(self, x: Tensor) -> None:
        """See `transports.Transport`. Adds in rank order, so all ranks get the same bits."""
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
        """Every rank's `x` in rank order, as read-only views of the memory, valid until the exchange after the next one.

        Args:
            x: contiguous, at most CAPACITY bytes; equal shapes and dtypes on all ranks.

        Raises:
            RuntimeError: a rank has left or died, or did not arrive in time.
        """
        # Double buffering: a rank that writes exchange n has seen all ranks arrive at n - 1, so all are done reading n - 2.
        self._number += 1
        views = [self._view(rank, x) for rank in range(self.world_size)]
        views[self.rank].copy_(x)
        deadline = time.monotonic() + self.timeout.total_seconds()
        while (missing := self._barrier_wait(_POLL_S)) >= 0:
            if self._has_left(missing) and self._barrier_wait(0.0) >= 0:
                raise RuntimeError(f"rank {missing} has left")
            if time.monotonic() > deadline:
                raise RuntimeError(f"rank {missing} did not arrive within {self.timeout.total_seconds():g} s")
        return views

    def close(self) -> None:
        """Leave. The other ranks notice when they next wait for this one."""
        if self._file >= 0:
            # Unlock explicitly: the mapping keeps the file open, and so the lock, while a view of it is alive.
            fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, _lock(fcntl.F_UNLCK, self.rank))
            os.close(self._file)
            self._file = -1

    def _view(self, rank: int, x: Tensor) -> Tensor:
        start = _HEADER + (2 * rank + self._number % 2) * CAPACITY
        return self._bytes[start : start + x.numel() * x.element_size()].view(x.dtype).view(x.shape)

    def _barrier_wait(self, seconds: float) -> int:
        """Announce this rank's arrival and wait for the others. Returns -1, or the first rank that has not arrived."""
        return self._native_barrier(ctypes.c_int64(self._number), ctypes.c_int64(int(seconds * 1e9)))

    def _has_left(self, rank: int) -> bool:
        found = fcntl.fcntl(self._file, fcntl.F_OFD_GETLK, _lock(fcntl.F_WRLCK, rank))
        return _LOCK.unpack(found)[0] == fcntl.F_UNLCK


def share(group: Transport, rank: int, world_size: int, timeout: timedelta) -> SharedMemory | None:
    """Memory shared by all ranks of a group; None on all ranks if they are on several machines, or if one cannot map it.

    Raises:
        RuntimeError: a rank has left the group.
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
    """Bytes of address space; the OS commits only pages that are written to."""
    return _HEADER + 2 * world_size * CAPACITY


def create(world_size: int) -> tuple[int, bytes] | None:
    """Create the memory: its descriptor, and the ticket for `attach` in another process; None if the system lacks support."""
    if (
        world_size > MAX_RANKS
        or native.library() is None
        or not hasattr(os, "memfd_create")
        or not hasattr(fcntl, "F_OFD_SETLK")
    ):
        return None
    try:
        file = os.memfd_create("distributed_sparse")
    except OSError:  # out of file descriptors
        return None
    os.ftruncate(file, memory_bytes(world_size))
    token = secrets.token_bytes(_TOKEN_BYTES)
    os.pwrite(file, token, 0)
    return file, token + f"/proc/{os.getpid()}/fd/{file}".encode()


def attach(ticket: bytes) -> int | None:
    """Open another process's memory by the ticket from `create`: its descriptor; None if out of reach (another machine)."""
    if native.library() is None:
        return None
    try:
        file = os.open(ticket[_TOKEN_BYTES:], os.O_RDWR | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
    try:
        if os.pread(file, _TOKEN_BYTES, 0) == ticket[:_TOKEN_BYTES]:  # not an unrelated file of that name
            return file
    except OSError:
        pass
    os.close(file)
    return None


def _lock(kind: int, rank: int) -> bytes:
    return _LOCK.pack(kind, os.SEEK_SET, _LINE * (rank + 1), 1, 0)
