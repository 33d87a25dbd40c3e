"""A shard answers one message at a time, from one generation to the next, and says meanwhile that it is alive."""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import Any

import pytest

from distributed_sparse.config import EngineConfig
from distributed_sparse.driver.channel import ChannelClosed
from distributed_sparse.driver.messages import Alive, AllocateCache, Failed, Hello, Join, Message, Regroup, StepPlan, StepResult
from distributed_sparse.shard import serve
from distributed_sparse.shard.collectives import CollectiveError
from distributed_sparse.shard.serve import Serving, ShardArguments, heartbeat
from tests.support import stand_in_shard as stand_in
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


def answers(serving: Serving, *received: Any) -> list[str]:
    """The kinds of what it says."""
    return [type(serving.answer(message)).__name__ for message in received]


def counts(serving: Serving) -> tuple[int, int]:
    result = serving.answer(StepPlan(step=1, generation=0, report=True))
    assert isinstance(result, StepResult) and result.report is not None
    return result.report.rows_dense, result.report.rows_sparse


def test_it_says_hello_to_each_generation_and_loads_its_weights_once(arguments):
    serving = Serving(arguments)
    first_step = StepPlan(step=QUIET_STEP, generation=0)
    assert answers(serving, Join(), AllocateCache(9), first_step) == ["Loaded", "Ready", "StepResult"]
    for generation in (1, 4):
        hello = serving.answer(Regroup(generation))
        assert isinstance(hello, Hello) and (hello.rank, hello.generation) == (0, generation)
        assert answers(serving, Join(), AllocateCache(9)) == ["Loaded", "Ready"]
    assert counts(serving) == (1, 3)
    serving.close()


def test_a_collective_that_breaks_off_leaves_it_waiting_with_its_weights(arguments):
    made: list[Breaks] = []

    class Once(Breaks):
        breaks_at_load = False

        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            made.append(self)

    serving = Serving(dataclasses.replace(arguments, shard_factory=Once))
    answers(serving, Join(), AllocateCache(9))
    failed = serving.answer(StepPlan(step=BROKEN_STEP, generation=0))
    assert isinstance(failed, Failed) and failed.waits
    assert "CollectiveError: all_reduce on rank 0 of 2 did not complete" in failed.error and "in step" in failed.traceback
    assert answers(serving, Regroup(1), Join(), AllocateCache(9)) == ["Hello", "Loaded", "Ready"]
    assert (len(made), counts(serving)) == (1, (1, 2))


def test_weights_whose_loading_broke_off_are_loaded_in_the_next_generation(arguments):
    serving = Serving(dataclasses.replace(arguments, shard_factory=Breaks))
    failed = serving.answer(Join())
    assert isinstance(failed, Failed) and failed.waits
    assert answers(serving, Regroup(1), Join(), AllocateCache(9)) == ["Hello", "Loaded", "Ready"]
    assert counts(serving) == (2, 1)


def test_any_other_error_ends_it(arguments):
    serving = Serving(arguments)
    answers(serving, Join(), AllocateCache(9))
    with pytest.raises(ArithmeticError, match="told to fail"):
        serving.answer(StepPlan(step=stand_in.FAIL_STEP, generation=0))


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
        deadline = time.monotonic() + 10.0
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
