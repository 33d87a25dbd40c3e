"""huge_pages: zeros for what is read again in every step, weights and cache, in pages of 2 MB where a CPU has them.

Read in pages of 4 KB, memory of this size costs a miss of the TLB per few lines, and prefetchers stop at each page's end.
Linux gives such pages to who asks for them (`transparent_hugepage/enabled` is "madvise" on most machines, and "never" on some;
then these are ordinary pages).
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2 << 20


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """`torch.zeros`, in huge pages if it lies on a CPU and fills one. Memory is taken as it is first touched.

    Raises:
        RuntimeError: the memory is not there; torch's own.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if torch.device(device).type == "cpu" and num_bytes >= HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            return _mapped(num_bytes).view(dtype).view(*shape)
        except OSError:
            pass  # no memory, which torch says better, or a kernel without huge pages
    return torch.zeros(tuple(shape), dtype=dtype, device=device)


def _mapped(num_bytes: int) -> Tensor:
    """uint8 [num_bytes] from the start of a huge page on; their mapping ends with the last tensor that lies in it."""
    # Private: huge pages of shared memory are another setting, mostly off.
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return whole[-whole.data_ptr() % HUGE_PAGE_BYTES :][:num_bytes]
