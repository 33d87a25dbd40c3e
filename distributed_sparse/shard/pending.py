"""pending: a step whose work is queued on the device, and whose result is still to be fetched."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from distributed_sparse.protocol.step import StepResult


class PendingStep:
    """What `Shard.begin` returns. Steps run in the order of `begin`, so the next one may begin before this one's `result`.

    Args:
        finish: waits for the device and returns the result; called once.
        is_ready: whether `finish` would return at once; must not wait. None: always.
    """

    def __init__(self, finish: Callable[[], StepResult], is_ready: Callable[[], bool] | None = None) -> None:
        self._finish = finish
        self._is_ready = is_ready

    @classmethod
    def done(cls, result: StepResult) -> PendingStep:
        """A step that is already computed, as on a CPU."""
        return cls(lambda: result)

    @property
    def ready(self) -> bool:
        """Whether `result` would not wait."""
        return self._is_ready is None or self._is_ready()

    def result(self) -> StepResult:
        """Wait for the step's work. Call once."""
        return self._finish()


class StepWork:
    """Times a step's work and fetches its results. Create it before the work is queued, call `pending` after.

    On a GPU nothing waits before `PendingStep.result`. A step's time starts with its own work, after the previous step's work
    has ended on the device, so that queued steps do not count each other's time.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_queued = device.type == "cuda"
        self._began = time.monotonic()
        self._started = time.perf_counter()
        if self._is_queued:
            self._start = torch.cuda.Event(enable_timing=True)
            self._start.record()

    def pending(
        self, result: StepResult, on_device: Mapping[str, Tensor], fill: Callable[[Mapping[str, NDArray[Any]]], None]
    ) -> PendingStep:
        """Queue the copies to the host behind the step's work.

        Args:
            on_device: tensors to copy to the host.
            fill: writes the copies into `result`; called once they have arrived.

        Raises:
            RuntimeError: the device's error, raised by `PendingStep.result`.
        """
        result.started = self._began
        if not self._is_queued:
            fill({name: tensor.numpy() for name, tensor in on_device.items()})
            result.step_ms = (time.perf_counter() - self._started) * 1e3
            return PendingStep.done(result)
        fetched = {}
        for name, tensor in on_device.items():
            fetched[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            fetched[name].copy_(tensor, non_blocking=True)
        end = torch.cuda.Event(enable_timing=True)
        end.record()

        def finish() -> StepResult:
            end.synchronize()
            fill({name: copied.numpy() for name, copied in fetched.items()})
            result.step_ms = self._start.elapsed_time(end)
            return result

        def is_ready() -> bool:
            try:
                return end.query()
            except RuntimeError:
                return True  # the device has failed: `finish` raises at once

        return PendingStep(finish, is_ready)
