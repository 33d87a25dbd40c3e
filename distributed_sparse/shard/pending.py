"""PendingStep: a step whose work has been queued on the device, and whose result is still to be fetched."""

from __future__ import annotations

from collections.abc import Callable

from distributed_sparse.protocol.step import StepResult


def _yes() -> bool:
    return True


class PendingStep:
    """What `Shard.begin` returns. Steps run in the order in which they were begun, so the next may be begun before `result`.

    Args:
        finish: waits for the device and makes the result; called once.
        is_ready: whether `finish` would return at once; must not wait.
    """

    def __init__(self, finish: Callable[[], StepResult], is_ready: Callable[[], bool] = _yes) -> None:
        self._finish = finish
        self._is_ready = is_ready

    @classmethod
    def done(cls, result: StepResult) -> PendingStep:
        """A step that has been computed already, as on a CPU."""
        return cls(lambda: result)

    @property
    def ready(self) -> bool:
        """Whether `result` would not wait."""
        return self._is_ready()

    def result(self) -> StepResult:
        """Wait for the step's work; to be called once."""
        return self._finish()
