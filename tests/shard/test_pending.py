"""When a step is done, and who waits for it. The device is played by a stand-in whose clock the test moves."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from distributed_sparse.protocol.step import StepResult
from distributed_sparse.shard.pending import PendingStep, StepWork


class Stream:
    """A device's queue: events are done up to `done_ms`, or the device has failed."""

    def __init__(self) -> None:
        self.now_ms = 0.0
        self.done_ms = 0.0
        self.waits = 0
        self.error: RuntimeError | None = None


def events_of(stream: Stream) -> Any:
    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = stream.now_ms

        def query(self) -> bool:
            if stream.error is not None:
                raise stream.error
            return self.at <= stream.done_ms

        def synchronize(self) -> None:
            if stream.error is not None:
                raise stream.error
            stream.waits += self.at > stream.done_ms
            stream.done_ms = max(stream.done_ms, self.at)

        def elapsed_time(self, other: Event) -> float:
            assert other.at <= stream.done_ms
            return other.at - self.at

    return Event


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    stream, empty = Stream(), torch.empty
    monkeypatch.setattr(torch.cuda, "Event", events_of(stream))
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs))
    return stream


def queue(stream: Stream, ms: float, tokens: list[int] | None = None) -> Any:
    """One step whose work takes so long."""
    work = StepWork(torch.device("cuda"))
    stream.now_ms += ms
    return pending(work, StepResult(step=0, rank=0), {} if tokens is None else {"tokens": torch.tensor(tokens)})


def pending(work: StepWork, result: StepResult, on_device: dict[str, torch.Tensor]) -> PendingStep:
    def fill(fetched: Mapping[str, Any]) -> None:
        for name, array in fetched.items():
            setattr(result, name, array.tolist())

    return work.pending(result, on_device, fill)


def test_a_queued_step_is_waited_for_in_its_result_and_nowhere_else(stream: Stream) -> None:
    first, second = queue(stream, 3.0, [5, 6]), queue(stream, 4.0, [7])
    assert not first.ready and not second.ready and stream.waits == 0
    stream.done_ms = 3.0
    assert first.ready and not second.ready
    assert first.result().tokens == [5, 6] and stream.waits == 0
    assert second.result().tokens == [7] and stream.waits == 1


def test_steps_in_flight_do_not_count_each_others_time(stream: Stream) -> None:
    pending = [queue(stream, ms) for ms in (3.0, 4.0)]
    stream.now_ms += 10.0  # a pause
    pending.append(queue(stream, 2.0))
    assert [step.result().step_ms for step in pending] == [3.0, 4.0, 2.0]


def test_a_step_that_draws_nothing_is_answered_when_it_is_done(stream: Stream) -> None:
    step = queue(stream, 3.0)
    assert not step.ready
    assert step.result().tokens == [] and stream.waits == 1


def test_the_devices_error_comes_out_of_the_result(stream: Stream) -> None:
    step = queue(stream, 3.0, [1])
    stream.error = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert step.ready  # there is nothing to wait for
    with pytest.raises(RuntimeError, match="illegal memory access"):
        step.result()


def test_on_a_cpu_a_step_is_done_when_it_has_been_begun() -> None:
    before = time.monotonic()
    work = StepWork(torch.device("cpu"))
    time.sleep(0.01)
    step = pending(work, StepResult(step=3, rank=0), {"tokens": torch.tensor([4, 2])})
    assert step.ready
    result = step.result()
    assert result.tokens == [4, 2] and result.step_ms >= 10.0 and before <= result.started <= time.monotonic() - 0.01
