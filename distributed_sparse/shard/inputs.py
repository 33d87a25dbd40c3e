"""StepInputs: uploads all host arrays of a step with one copy, and returns typed views of them on the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 16
"""Bytes. Every array starts at a multiple, so that Triton compiles a kernel for one alignment only."""

DTYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.bool_): torch.bool,
}

Arrays = dict[str, NDArray[Any]]


class StepInputs:
    """Owns the device buffer that every step's inputs are copied to.

    Arrays lie one behind another, so equal shapes in equal order have equal addresses in every step, as CUDA graphs need. The
    copy runs on the step's stream, behind the previous step's work.

    Args:
        capacity: bytes of the buffer. Arrays that end beyond it are returned from a temporary buffer of the step.
        device: of the buffer.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self._device = device
        self._buffer = torch.empty(capacity, dtype=torch.uint8, device=device)

    def upload(self, arrays: Mapping[str, NDArray[Any]]) -> Mapping[str, Tensor]:
        """Copy arrays of int64, int32, float32 or bool to the device, without synchronising.

        Returns:
            Views with the arrays' dtypes and shapes, by name; valid until the next upload's copy runs on the stream.
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
        self._buffer.copy_(own[: self.capacity])  # the first arrays must be at their usual address
        return Uploaded(spans, self._buffer, own)

    def _host_buffer(self, num_bytes: int) -> Tensor:
        """A staging buffer; on a GPU pinned memory, usually of the same size.

        torch's allocator caches pinned blocks and reuses one only after the copies from it have finished, so two steps may be
        in flight.
        """
        if self._device.type != "cuda":
            return torch.empty(num_bytes, dtype=torch.uint8)
        return torch.empty(max(num_bytes, self.capacity), dtype=torch.uint8, pin_memory=True)[:num_bytes]


class Span(NamedTuple):
    """Position of an array in the buffer, in bytes, with its dtype and shape."""

    start: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Uploaded(Mapping[str, Tensor]):
    """The arrays of one upload. Views are created on access, as a captured step uses few of them.

    Args:
        spans: positions by name.
        buffer: the shared buffer, which holds the arrays that end within it; own: a buffer that holds all arrays.
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
