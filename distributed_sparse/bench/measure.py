"""measure: times of functions taken in turn within one run, and the memory bandwidths to hold them against."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

FLUSH_BYTES = 1 << 30
"""Read on a GPU before every timed call: it empties the L2, and takes longer than the host needs to queue the call."""


class Unavailable(Exception):
    """Something that cannot be measured here; says why. The benchmark prints the reason and goes on."""


@dataclass(frozen=True)
class Times:
    """Seconds of one function's calls."""

    samples: list[float]

    @property
    def median(self) -> float:
        return float(np.median(self.samples))

    @property
    def spread(self) -> tuple[float, float]:
        """10th and 90th percentile."""
        low, high = np.percentile(self.samples, [10, 90])
        return float(low), float(high)

    @property
    def ms(self) -> dict[str, float]:
        """ "ms", "p10_ms" and "p90_ms", as a row of a table has them."""
        low, high = self.spread
        return {"ms": self.median * 1e3, "p10_ms": low * 1e3, "p90_ms": high * 1e3}


def time_in_turn(
    functions: dict[str, Callable[[int], object]], repeats: int, device: torch.device, warm_up: int = 2
) -> dict[str, Times]:
    """Call every function once per round, so that a slow moment of the machine falls on all of them.

    On a GPU the device's own time of a call, by events, with an empty L2 cache: the host queues a call while the device is
    still busy with emptying it.

    Args:
        functions: name -> function of the round's number (to rotate its inputs, so that no cache holds them).
        repeats: rounds that are timed.
        warm_up: rounds before, not timed.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    seconds = _DeviceClock(device) if device.type == "cuda" else _host_seconds
    for number in range(warm_up + repeats):
        for name, function in functions.items():
            taken = seconds(function, number)
            if number >= warm_up:
                samples[name].append(taken)
    return {name: Times(values) for name, values in samples.items()}


def _host_seconds(function: Callable[[int], object], number: int) -> float:
    started = time.perf_counter()
    function(number)
    return time.perf_counter() - started


class _DeviceClock:
    """Seconds of a call on the device, its L2 emptied before."""

    def __init__(self, device: torch.device) -> None:
        self._flushed = torch.zeros(FLUSH_BYTES // 4, dtype=torch.float32, device=device)
        self._device = device

    def __call__(self, function: Callable[[int], object], number: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flushed.sum()  # read, not written: no dirty line is left for the call to write back
        begin.record()
        function(number)
        end.record()
        torch.cuda.synchronize(self._device)
        return begin.elapsed_time(end) / 1e3


def read_bandwidth(device: torch.device, num_bytes: int = 1 << 29, repeats: int = 7) -> float:
    """Bytes per second at which this process reads memory: the sum over a buffer far larger than any cache."""
    buffer = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    return num_bytes / time_in_turn({"read": lambda _: buffer.sum()}, repeats, device)["read"].median


def copy_bandwidth(device: torch.device, num_bytes: int = 1 << 29, repeats: int = 7) -> float:
    """Bytes per second, read and written together, at which this process copies such a buffer."""
    source = torch.ones(num_bytes // 8, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    return num_bytes / time_in_turn({"copy": lambda _: target.copy_(source)}, repeats, device)["copy"].median


@contextmanager
def torch_threads(count: int | None) -> Iterator[int]:
    """That many torch threads inside, the former number after; None changes nothing. Yields the number."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def available_bytes(device: torch.device) -> int:
    """Memory that can still be allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + _page_cache_bytes()


def check_memory(what: str, num_bytes: int, device: torch.device) -> None:
    """Refuse what would not fit: on a CPU the kernel would end the process instead of saying so.

    Raises:
        Unavailable: names both sizes.
    """
    free = available_bytes(device)
    if num_bytes > free:
        raise Unavailable(f"out of memory: {what} needs {num_bytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")


@contextmanager
def out_of_memory_is_unavailable() -> Iterator[None]:
    """An allocation that fails inside is `Unavailable`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise Unavailable(f"out of memory: {str(error).splitlines()[0]}") from error
    except MemoryError as error:
        raise Unavailable(f"out of memory: {error}") from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise Unavailable(f"out of memory: {str(error).splitlines()[0]}") from error


def _page_cache_bytes() -> int:
    """Memory that Linux would give back: files it has read."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in file)}
    except OSError:
        return 0
    return max(0, sizes.get("MemAvailable", 0) - sizes.get("MemFree", 0))
