"""One rank in the Driver's own process keeps the same promises as a group of processes, but for the deadline."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from typing import ClassVar

import pytest

from distributed_sparse.config import EngineConfig
from distributed_sparse.protocol.step import StepPlan
from distributed_sparse.ranks.base import ShardFailure
from distributed_sparse.ranks.in_process import InProcessGroup
from tests.support import stand_in_shard as stand_in
from tests.support.stand_in_shard import StandInShard


@pytest.fixture
def config(tmp_path):
    return EngineConfig(model=stand_in.write_checkpoint(tmp_path), device="cpu")


def test_it_starts_steps_in_order_and_stops(config):
    group = InProcessGroup(config, StandInShard)
    (info,) = group.start()
    assert (info.rank, group.num_pages, info.page_bytes, info.cache_bytes) == (0, 50, 64, 50 * 60)
    group.send(StepPlan(step=1, generation=0))
    group.send(StepPlan(step=2, generation=0))
    assert [group.collect()[0].tokens for _ in range(2)] == [[1, 1], [1, 2]]
    group.check()
    group.stop()
    group.stop()
    with pytest.raises(ShardFailure, match="stopped"):
        group.send(StepPlan(step=3, generation=0))


def test_an_exception_in_a_step_is_a_failure_with_its_traceback_and_stays_one(config):
    group = InProcessGroup(config, StandInShard)
    group.start()
    group.send(StepPlan(step=stand_in.FAIL_STEP, generation=0))
    with pytest.raises(ShardFailure, match="failed in step 1001: ArithmeticError: the stand-in was told to fail") as caught:
        group.collect()
    assert caught.value.ranks == (0,) and "stand_in_shard.py" in caught.value.traceback
    for call in (group.check, group.collect, lambda: group.send(StepPlan(step=2, generation=0))):
        with pytest.raises(ShardFailure, match="told to fail"):
            call()
    group.stop()


def test_a_refused_checkpoint_is_the_users_value_error(config):
    with pytest.raises(ValueError, match="convert it again"):
        InProcessGroup(config, stand_in.RefusesToLoad).start()


class RunsOutOfMemory(StandInShard):
    def load(self):
        raise MemoryError("no room")


def test_any_other_error_at_the_start_is_a_failure(config):
    with pytest.raises(ShardFailure, match="could not start: MemoryError: no room"):
        InProcessGroup(config, RunsOutOfMemory).start()


class Watched(StandInShard):
    """Remembers its kind, without keeping them alive; fails to load as often as it is told."""

    made: ClassVar[list[weakref.ref[Watched]]] = []
    failures = 0

    def __init__(self, *arguments):
        super().__init__(*arguments)
        gc.collect()
        assert not [shard for shard in self.made if shard() is not None], "there may not be memory for two"
        self.made.append(weakref.ref(self))

    def load(self):
        if Watched.failures:
            Watched.failures -= 1
            raise MemoryError("no room")
        return super().load()


@pytest.fixture
def watched():
    Watched.made.clear()
    return Watched


def test_after_a_failure_it_is_rebuilt_once_the_old_shard_has_gone(config, watched):
    group = InProcessGroup(config, watched)
    group.start()
    for generation in (1, 2):
        group.send(StepPlan(step=stand_in.FAIL_STEP, generation=generation - 1))
        group.send(StepPlan(step=5, generation=generation - 1))
        with pytest.raises(ShardFailure, match="told to fail"):
            group.collect()
        (info,) = group.rebuild()
        assert (group.generation, info.rank, group.num_pages) == (generation, 0, 50)
        group.check()
        group.send(StepPlan(step=6, generation=generation))
        assert group.collect()[0].tokens == [1, 6], "plans of the last generation are forgotten"
    assert len(watched.made) == 3
    group.stop()


def test_a_start_and_a_rebuild_that_failed_can_be_tried_again(config, watched):
    group = InProcessGroup(config, watched)
    watched.failures = 2
    for verb in (group.start, group.rebuild):
        with pytest.raises(ShardFailure, match="could not start: MemoryError: no room"):
            verb()
        with pytest.raises(ShardFailure, match="no room"):
            group.check()
    group.rebuild()
    group.check()
    group.cancel()
    group.stop()


def test_more_than_one_rank_is_refused_with_the_remedy(tmp_path):
    config = EngineConfig(model=stand_in.write_checkpoint(tmp_path), tensor_parallel_size=2)
    with pytest.raises(ValueError, match="tensor_parallel_size=2 needs one process per rank"):
        InProcessGroup(config)


def test_the_driver_side_imports_neither_ray_nor_torch():
    """A Driver that has no shard of its own stays light; and one rank must run where Ray is not installed."""
    code = """
import sys
sys.modules["ray"] = None
from distributed_sparse.protocol import step
from distributed_sparse.ranks import base, channel, in_process, remote, worker
assert "torch" not in sys.modules, "torch was imported"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
