"""scratch: per-thread CPU buffers reused across calls, so that their memory is not mapped and page-faulted again per layer.

Rules: a function never returns a scratch buffer or a view of one. Two buffers of one name are never in use at the same time: a
function names its buffers after its op and calls no other op that uses the same name.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


class _Buffers(threading.local):
    """One thread's flat buffers by name and dtype."""

    def __init__(self) -> None:
        self.by_name: dict[tuple[str, torch.dtype], Tensor] = {}


_buffers = _Buffers()


def scratch(name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """This thread's buffer `name` as an uninitialised contiguous CPU tensor.

    It grows to the largest shape requested so far and lives as long as its thread. The next call with the same name and dtype
    returns the same memory.
    """
    key, size = (name, dtype), prod(shape)
    held = _buffers.by_name.pop(key, None)
    if held is None or held.numel() < size:
        held = None  # free the smaller buffer before allocating the larger one
        with torch.inference_mode(False):  # an inference tensor could not be written outside inference mode
            held = torch.empty(size, dtype=dtype)
    _buffers.by_name[key] = held
    return held[:size].view(tuple(shape))
