"""timer: Timer, which measures the parts of a step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Timer:
    """Accumulates the times of the parts of profiled steps. While enabled, it synchronizes the device around each part."""

    def __init__(self, device: torch.device, enabled: bool = False) -> None:
        self.enabled = enabled
        self._device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self.steps = 0

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        if not self.enabled:
            yield
            return
        started = self._now()
        yield
        self._seconds[part] += self._now() - started

    @property
    def ms_per_step(self) -> dict[str, float]:
        return {part: seconds * 1e3 / max(self.steps, 1) for part, seconds in self._seconds.items()}

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
