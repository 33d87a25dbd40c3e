"""huge_pages: zero tensors in 2 MB pages for CPU memory that every step reads (weights and KV cache).

With 4 KB pages, reads of this much memory miss the TLB every few lines, and prefetchers stop at page ends. Linux grants huge
pages on request when `transparent_hugepage/enabled` is "madvise" (most machines); when it is "never", these are ordinary pages.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2 << 20


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """`torch.zeros`, in huge pages for a CPU tensor of at least one huge page. Memory is committed on first touch.

    Raises:
        RuntimeError: out of memory (raised by torch).
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if torch.device(device).type == "cpu" and num_bytes >= HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            return _mapped(num_bytes).view(dtype).view(*shape)
        except OSError:
            pass  # out of memory (torch reports it better below), or a kernel without huge pages
    return torch.zeros(tuple(shape), dtype=dtype, device=device)


def _mapped(num_bytes: int) -> Tensor:
    """uint8 [num_bytes], aligned to a huge page. The mapping is freed with the last tensor that views it."""
    # Private: huge pages of shared memory are a separate setting, usually off.
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return whole[-whole.data_ptr() % HUGE_PAGE_BYTES :][:num_bytes]
