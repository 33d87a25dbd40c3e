"""StepInputs: how all that one step tells the device gets there: one host buffer, one copy, typed views of the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 16
"""Bytes: where every array starts, so that a kernel is compiled for one alignment alone."""

DTYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.bool_): torch.bool,
}

Arrays = dict[str, NDArray[Any]]


class StepInputs:
    """Owns the buffer on the device that every step's inputs are copied to.

    An array lies where those before it end: equal shapes in equal order stand at equal addresses, step after step, as a
    captured step needs it. The stream orders a copy behind the work of the step before.

    Args:
        capacity: bytes of the buffer. Arrays that do not end in it are handed out from a buffer of the step's own.
        device: where to.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self._device = device
        self._buffer = torch.empty(capacity, dtype=torch.uint8, device=device)

    def upload(self, arrays: Mapping[str, NDArray[Any]]) -> Mapping[str, Tensor]:
        """Copy arrays of int64, int32, float32 or bool to the device, without waiting for it.

        Returns:
            Views of equal dtypes and shapes by name; valid until the copy of the next upload runs.
        """
        spans, end = {}, 0
        for name, array in arrays.items():
            start = -(-end // ALIGNMENT) * ALIGNMENT
            end = start + array.nbytes
            spans[name] = Span(start, end, DTYPES[array.dtype], array.shape)
        host = self._host_buffer(end)
        staged = host.numpy()
        for span, array in zip(spans.values(), arrays.values()):
            staged[span.start : span.end].view(array.dtype)[...] = array.reshape(-1)
        if end <= self.capacity:
            self._buffer[:end].copy_(host, non_blocking=True)
            return Uploaded(spans, self._buffer, self._buffer)
        own = torch.empty(end, dtype=torch.uint8, device=self._device)
        own.copy_(host, non_blocking=True)
        self._buffer.copy_(own[: self.capacity])  # what comes first stands at its address all the same
        return Uploaded(spans, self._buffer, own)

    def _host_buffer(self, num_bytes: int) -> Tensor:
        """On a GPU pinned memory, of one size as a rule.

        torch's allocator keeps such blocks, and gives one out again only after the copies from it have been done: so two
        steps may be in flight.
        """
        if self._device.type != "cuda":
            return torch.empty(num_bytes, dtype=torch.uint8)
        return torch.empty(max(num_bytes, self.capacity), dtype=torch.uint8, pin_memory=True)[:num_bytes]


class Span(NamedTuple):
    """Where an array lies, in bytes, and what it is."""

    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Uploaded(Mapping[str, Tensor]):
    """The arrays of one upload. Views are made as they are asked for: a captured step asks for few.

    Args:
        spans: where they lie.
        buffer: holds those that end in it; own: holds all.
    """

    def __init__(self, spans: dict[str, Span], buffer: Tensor, own: Tensor) -> None:
        self._spans = spans
        self._buffer = buffer
        self._own = own

    def __getitem__(self, name: str) -> Tensor:
        start, end, dtype, shape = self._spans[name]
        held = self._buffer if end <= len(self._buffer) else self._own
        return held[start:end].view(dtype).view(shape)

    def __contains__(self, name: object) -> bool:
        return name in self._spans

    def __iter__(self) -> Iterator[str]:
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)
