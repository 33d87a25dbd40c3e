"""timing: times of functions that run in turns, and the memory bandwidths to compare them with."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distributed_sparse.kernels.huge_pages import zeros

FLUSH_BYTES = 1 << 30
"""Buffer read on a GPU before every timed call: it evicts the L2 and takes longer than the host needs to queue the call."""


HOST_BOUND = 0.5
"""A call may be host-bound if the host takes more than this share of the device's time to queue it."""


class Unavailable(Exception):
    """Something cannot be measured here. The benchmark prints the reason and continues."""


def one_line(error: Exception) -> str:
    """An error's type and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@dataclass(frozen=True)
class Times:
    """Seconds of one function's calls."""

    samples: list[float]
    launched: str | None = None
    """On a GPU: "graph" (replayed CUDA graph), "eager", or "eager, host-bound?" (see `HOST_BOUND`)."""

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
        """ "ms", "p10_ms" and "p90_ms" of a benchmark's row."""
        low, high = self.spread
        return {"ms": self.median * 1e3, "p10_ms": low * 1e3, "p90_ms": high * 1e3}


def time_in_turn(
    functions: Mapping[str, Callable[[int], object]],
    repeats: int,
    device: torch.device,
    warm_up: int = 2,
    rotation: int | None = None,
) -> dict[str, Times]:
    """Call every function once per round, so that a slow moment of the machine affects all of them.

    On a GPU, times are the device's own, by events, with an empty L2 cache. The host queues a call while the device is
    still evicting the cache.

    Args:
        functions: name -> function of the round's number, by which it rotates its inputs so that no cache holds them.
        repeats: timed rounds.
        warm_up: untimed rounds before them.
        rotation: rounds after which inputs repeat. On a GPU, the calls of so many rounds are captured as CUDA graphs, so that
            the host does not limit many small launches; a function that cannot be captured runs eagerly. None: no capture.
    """
    if device.type == "cuda":
        flushed = torch.zeros(FLUSH_BYTES // 4, dtype=torch.float32, device=device)
        clocks: dict[str, _HostClock] = {name: _DeviceClock(of, flushed, rotation) for name, of in functions.items()}
    else:
        clocks = {name: _HostClock(function) for name, function in functions.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(warm_up + repeats):
        for name, clock in clocks.items():
            samples[name].append(clock.seconds(number))
    return {name: Times(values[warm_up:], clocks[name].launched(warm_up)) for name, values in samples.items()}


class _HostClock:
    """Times a function's calls on the host."""

    def __init__(self, function: Callable[[int], object]) -> None:
        self._function = function

    def seconds(self, number: int) -> float:
        started = time.perf_counter()
        self._function(number)
        return time.perf_counter() - started

    def launched(self, warm_up: int) -> str | None:
        """`Times.launched` of the calls after the first `warm_up`."""
        return None


class _DeviceClock(_HostClock):
    """Times calls on the device with an empty L2, by replaying CUDA graphs where the function can be captured.

    Args:
        flushed: read before every call.
        rotation: see `time_in_turn`.
    """

    def __init__(self, function: Callable[[int], object], flushed: Tensor, rotation: int | None) -> None:
        super().__init__(function)
        self._flushed = flushed
        self._graphs = [] if rotation is None else _captured(function, rotation, flushed.device)
        self._host_shares: list[float] = []

    def seconds(self, number: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flushed.sum()  # read, not written: leaves no dirty lines for the call to write back
        begin.record()
        started = time.perf_counter()
        if self._graphs:
            self._graphs[number % len(self._graphs)].replay()
        else:
            self._function(number)
        queued = time.perf_counter() - started
        end.record()
        torch.cuda.synchronize(self._flushed.device)
        taken = begin.elapsed_time(end) / 1e3
        self._host_shares.append(queued / taken)
        return taken

    def launched(self, warm_up: int) -> str | None:
        if self._graphs:
            return "graph"
        return "eager, host-bound?" if np.median(self._host_shares[warm_up:]) > HOST_BOUND else "eager"


def _captured(function: Callable[[int], object], rotation: int, device: torch.device) -> list[torch.cuda.CUDAGraph]:
    """A graph of each of `rotation` calls; empty if the function cannot be captured because it synchronizes."""
    stream, before = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(before)
    graphs: list[torch.cuda.CUDAGraph] = []
    pool = torch.cuda.graph_pool_handle()
    with torch.cuda.stream(stream):  # restores the stream after a failed capture, too
        for number in range(rotation):  # compile and allocate before the capture
            function(number)
        try:
            for number in range(rotation):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    function(number)
                graphs.append(graph)
        except Exception:  # each call has just succeeded outside a capture
            graphs = []
    before.wait_stream(stream)
    return graphs


def read_bandwidth(device: torch.device, num_bytes: int = 1 << 29, repeats: int = 7) -> float:
    """Bytes per second at which this process reads memory, from a sum over a buffer far larger than any cache."""
    buffer = zeros((num_bytes // 4,), torch.float32, device).fill_(1)  # in huge pages, like weights and cache
    return num_bytes / time_in_turn({"read": lambda _: buffer.sum()}, repeats, device)["read"].median


def copy_bandwidth(device: torch.device, num_bytes: int = 1 << 29, repeats: int = 7) -> float:
    """Bytes per second, read and written together, at which this process copies such a buffer."""
    source, target = (zeros((num_bytes // 8,), torch.float32, device).fill_(1) for _ in range(2))
    return num_bytes / time_in_turn({"copy": lambda _: target.copy_(source)}, repeats, device)["copy"].median


@contextmanager
def torch_threads(count: int | None) -> Iterator[int]:
    """Set the torch threads inside; None changes nothing. Yields the number."""
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
        torch.cuda.empty_cache()  # memory that torch's allocator keeps
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + _page_cache_bytes()


def check_memory(what: str, num_bytes: int, device: torch.device) -> None:
    """Refuse a load that does not fit: on a CPU the kernel would kill the process instead.

    Raises:
        Unavailable: names both sizes.
    """
    free = available_bytes(device)
    if num_bytes > free:
        raise Unavailable(f"out of memory: {what} needs {num_bytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")


def _page_cache_bytes() -> int:
    """Memory of cached files that Linux would free."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in file)}
    except OSError:
        return 0
    return max(0, sizes.get("MemAvailable", 0) - sizes.get("MemFree", 0))
