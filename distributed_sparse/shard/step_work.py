"""StepWork: a step on its device, from first to last: when it began, what is fetched of it, and when it was done."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from distributed_sparse.protocol.step import StepResult
from distributed_sparse.shard.pending import PendingStep


class StepWork:
    """Made before a step's work is queued; `pending` after it. On a GPU nothing here waits before `PendingStep.result`.

    A step's time starts when its work does, which on a GPU is not before the last step's work has ended: steps that are
    queued one behind the other do not count each other's time.
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
        """The step's result, once the device has done the step.

        Args:
            on_device: what is copied to the host behind the step's work.
            fill: writes those copies into the result; called once they have arrived.

        Raises:
            RuntimeError: the device's error, from the result.
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
