"""measure: times of functions taken in turn within one run, and the machine's read bandwidth to hold them against."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch


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


def time_in_turn(
    functions: dict[str, Callable[[int], object]], repeats: int, device: torch.device, warm_up: int = 2
) -> dict[str, Times]:
    """Call every function once per round, so that a slow moment of the machine falls on all of them.

    Args:
        functions: name -> function of the round's number (to rotate its inputs, so that no cache holds them).
        repeats: rounds that are timed.
        warm_up: rounds before, not timed.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(warm_up + repeats):
        for name, function in functions.items():
            synchronize(device)
            started = time.perf_counter()
            function(number)
            synchronize(device)
            if number >= warm_up:
                samples[name].append(time.perf_counter() - started)
    return {name: Times(values) for name, values in samples.items()}


def read_bandwidth(device: torch.device, num_bytes: int = 1 << 29, repeats: int = 7) -> float:
    """Bytes per second at which this process reads memory: the sum over a buffer far larger than any cache."""
    buffer = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    return num_bytes / time_in_turn({"read": lambda _: buffer.sum()}, repeats, device)["read"].median


def synchronize(device: torch.device) -> None:
    """Wait for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
