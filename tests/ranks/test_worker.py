"""A shard answers one message at a time, from one generation to the next, and says meanwhile that it is alive."""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import Any

import pytest

from distributed_sparse.config import EngineConfig
from distributed_sparse.protocol.step import (
    Alive,
    AllocateCache,
    Failed,
    Hello,
    Join,
    Message,
    Regroup,
    StepPlan,
    StepResult,
    Stop,
)
from distributed_sparse.ranks import worker as serve
from distributed_sparse.ranks.channel import ChannelClosed
from distributed_sparse.ranks.worker import ShardArguments, Worker, heartbeat, next_message
from distributed_sparse.shard.collectives.collectives import CollectiveError
from distributed_sparse.shard.pending import PendingStep
from tests.support import stand_in_shard as stand_in
from tests.support.patience import WAIT_S
from tests.support.stand_in_shard import QUIET_STEP, StandInShard

BROKEN_STEP = 77


class Breaks(StandInShard):
    """Its collective breaks off in `BROKEN_STEP`, and the first time that it loads."""

    breaks_at_load = True

    def load(self):
        if self.breaks_at_load and not self.loads:
            self.loads += 1
            raise CollectiveError("barrier on rank 0 of 2 did not complete")
        return super().load()

    def step(self, plan: StepPlan) -> StepResult:
        if plan.step == BROKEN_STEP:
            raise CollectiveError("all_reduce on rank 0 of 2 did not complete")
        return super().step(plan)


@pytest.fixture
def arguments(tmp_path) -> ShardArguments:
    return ShardArguments(
        config=EngineConfig(model=str(stand_in.write_checkpoint(tmp_path)), device="cpu"),
        rank=0,
        world_size=1,
        generation=0,
        address=("127.0.0.1", 1),
        secret=b"",
        store_address=("127.0.0.1", 1),
        node_ip="127.0.0.1",
        node_id="n",
        num_threads=1,
        shard_factory=StandInShard,
    )


def answers(worker: Worker, *received: Any) -> list[str]:
    """The kinds of what it says."""
    return [type(worker.answer(message)).__name__ for message in received]


def result_of(worker: Worker, plan: StepPlan) -> Message:
    assert worker.answer(plan) is None
    return worker.finish_step()


def counts(worker: Worker) -> tuple[int, int]:
    result = result_of(worker, StepPlan(step=1, generation=0, report=True))
    assert isinstance(result, StepResult) and result.report is not None
    return result.report.rows_dense, result.report.rows_sparse


def test_it_says_hello_to_each_generation_and_loads_its_weights_once(arguments):
    worker = Worker(arguments)
    assert answers(worker, Join(), AllocateCache(9)) == ["Loaded", "Ready"]
    assert isinstance(result_of(worker, StepPlan(step=QUIET_STEP, generation=0)), StepResult)
    for generation in (1, 4):
        hello = worker.answer(Regroup(generation))
        assert isinstance(hello, Hello) and (hello.rank, hello.generation) == (0, generation)
        assert answers(worker, Join(), AllocateCache(9)) == ["Loaded", "Ready"]
    assert counts(worker) == (1, 3)
    worker.close()


def test_a_collective_that_breaks_off_leaves_it_waiting_with_its_weights(arguments):
    made: list[Breaks] = []

    class Once(Breaks):
        breaks_at_load = False

        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            made.append(self)

    worker = Worker(dataclasses.replace(arguments, shard_factory=Once))
    answers(worker, Join(), AllocateCache(9))
    failed = worker.answer(StepPlan(step=BROKEN_STEP, generation=0))
    assert isinstance(failed, Failed) and failed.waits
    assert "CollectiveError: all_reduce on rank 0 of 2 did not complete" in failed.error and "in step" in failed.traceback
    assert worker.answer(StepPlan(step=QUIET_STEP, generation=0)) is None
    assert not worker.pending, "what was sent before the Driver knew is not begun without the others"
    assert answers(worker, Regroup(1), Join(), AllocateCache(9)) == ["Hello", "Loaded", "Ready"]
    assert (len(made), counts(worker)) == (1, (1, 2))


def test_weights_whose_loading_broke_off_are_loaded_in_the_next_generation(arguments):
    worker = Worker(dataclasses.replace(arguments, shard_factory=Breaks))
    failed = worker.answer(Join())
    assert isinstance(failed, Failed) and failed.waits
    assert answers(worker, Regroup(1), Join(), AllocateCache(9)) == ["Hello", "Loaded", "Ready"]
    assert counts(worker) == (2, 1)


def test_any_other_error_ends_it(arguments):
    worker = Worker(arguments)
    answers(worker, Join(), AllocateCache(9))
    with pytest.raises(ArithmeticError, match="told to fail"):
        worker.answer(StepPlan(step=stand_in.FAIL_STEP, generation=0))


class Sent:
    """A channel that remembers what is sent, until its peer has gone."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.gone = threading.Event()

    def send(self, message: Message) -> None:
        if self.gone.is_set():
            raise ChannelClosed("the peer has gone")
        self.messages.append(message)


@pytest.mark.parametrize("gone", [False, True])
def test_it_says_that_it_is_alive_until_it_ends_or_nobody_listens(monkeypatch, gone):
    monkeypatch.setattr(serve, "HEARTBEAT_S", 0.01)
    channel = Sent()
    before = threading.active_count()
    with heartbeat(channel, 0):  # type: ignore[arg-type]
        deadline = time.monotonic() + WAIT_S
        while len(channel.messages) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        if gone:
            channel.gone.set()
            while threading.active_count() > before:
                assert time.monotonic() < deadline
                time.sleep(0.005)
    assert threading.active_count() == before
    assert all(isinstance(message, Alive) for message in channel.messages)


class Device:
    """Steps are queued on it, and end when a test says so."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.done: set[int] = set()

    def begin(self, plan: StepPlan) -> PendingStep:
        self.begun.append(plan.step)
        return PendingStep(lambda: self._finish(plan.step), lambda: plan.step in self.done)

    def _finish(self, step: int) -> StepResult:
        self.done.add(step)  # it has been waited for
        return StepResult(step=step, rank=0)


class Plans(Sent):
    """Plan 1 comes once the result of plan 0 has been sent, which the device ends after a few looks at it; others at once."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device
        self.looks = 0
        self.coming = [StepPlan(step=number, generation=0) for number in range(4)]

    def poll(self) -> bool:
        self.looks += 1
        if self.looks == 3:
            self.device.done.add(0)
        return not self.coming or self.coming[0].step != 1 or len(self.messages) > 0

    def receive(self) -> Any:
        return self.coming.pop(0) if self.coming else Stop()


def test_a_result_goes_out_as_soon_as_it_is_ready_and_no_more_than_two_steps_are_queued(arguments):
    device = Device()
    channel = Plans(device)
    worker = Worker(arguments)
    answers(worker, Join(), AllocateCache(9))
    worker._shard.begin = device.begin  # type: ignore[union-attr, method-assign]
    sent_before = []
    while not isinstance(message := next_message(channel, worker), Stop):  # type: ignore[arg-type]
        sent_before.append([result.step for result in channel.messages])  # type: ignore[attr-defined]
        assert worker.answer(message) is None
        assert len(worker.pending) <= serve.MAX_PENDING
    assert device.begun == [0, 1, 2, 3]
    assert sent_before[1] == [0], "it was ready while nothing else came"
    assert sent_before[2] == [0], "step 2 is queued behind step 1, which is not done"
    assert sent_before[3] == [0, 1], "step 1 is waited for before a third one is queued"
