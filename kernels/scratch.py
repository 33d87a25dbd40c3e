"""scratch: CPU buffers that a thread keeps from call to call, so that no layer's pages are mapped and faulted in anew.

The rules: what a function takes here never leaves it, as a result or in one; and no two buffers of one name are in use at
a time, so a function names its buffers after its op and calls no other op that takes the same name.
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
    """This thread's buffer of a name, as an uninitialised contiguous CPU tensor of any shape.

    It grows to the largest shape that was asked for and lives as long as its thread. The next call with the same name and
    dtype gives the same memory again.
    """
    key, size = (name, dtype), prod(shape)
    held = _buffers.by_name.pop(key, None)
    if held is None or held.numel() < size:
        held = None  # the smaller one goes before the larger one is allocated
        with torch.inference_mode(False):  # a tensor born in inference mode could be written to in no other
            held = torch.empty(size, dtype=dtype)
    _buffers.by_name[key] = held
    return held[:size].view(tuple(shape))
