"""Ranks as Ray actors: placed or refused with numbers, ordered, watched, and gone after stop with all that they held."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distributed_sparse.config import EngineConfig
from distributed_sparse.protocol.step import StepPlan
from distributed_sparse.ranks.base import ShardFailure
from tests.support import stand_in_shard as stand_in
from tests.support.patience import WAIT_S
from tests.support.ray_processes import ray_processes
from tests.support.stand_in_shard import StandInShard

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


@pytest.fixture
def config(tmp_path):
    return EngineConfig(model=str(stand_in.write_checkpoint(tmp_path / "model")), tensor_parallel_size=2, device="cpu")


@pytest.fixture
def new_group():
    """Makes groups; all are stopped, and checked for what they leave behind."""
    from distributed_sparse.ray_backend.group import RayShardGroup

    groups: list[RayShardGroup] = []
    before = placement_groups()

    def make(config: EngineConfig, **arguments) -> RayShardGroup:
        arguments.setdefault("shard_factory", StandInShard)
        groups.append(RayShardGroup(config, **arguments))
        return groups[-1]

    yield make
    for group in groups:
        group.stop()
        assert_gone([hello.pid for hello in group._hellos.values()])
    assert placement_groups() == before, "a placement group is left"


def assert_gone(pids: list[int], timeout: float = WAIT_S) -> None:
    deadline = time.monotonic() + timeout
    while (alive := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)  # the parent has yet to collect it
    assert not alive, "a shard's process is left"


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def placement_groups() -> set[str]:
    """Names of the placement groups that hold, or wait for, resources."""
    from ray.util.placement_group import placement_group_table

    return {entry["name"] for entry in placement_group_table().values() if entry["state"] != "REMOVED"}


def step(group, number: int, timeout: float = WAIT_S):
    group.send(StepPlan(step=number, generation=group.generation))
    return group.collect(timeout)


def test_a_group_of_actors_starts_steps_and_stops(new_group, config):
    import ray

    group = new_group(config, name="a-name")
    infos = group.start()
    assert [info.rank for info in infos] == [0, 1]
    assert infos[0].pid != infos[1].pid
    assert infos[0].node_id == ray.get_runtime_context().get_node_id()
    assert group.host == ray.util.get_node_ip_address()
    assert ray.util.get_placement_group("a-name").bundle_count == 2
    for number in range(3):
        assert [result.tokens for result in step(group, number)] == [[3, number]] * 2
    began = time.monotonic()
    group.stop()
    assert time.monotonic() - began < 2.0
    assert_gone([info.pid for info in infos])
    assert "a-name" not in placement_groups()


def test_more_ranks_than_cpus_are_refused_at_once_with_both_numbers(new_group, config):
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"tensor_parallel_size=8 on device='cpu' asks for 8 CPUs, but the Ray cluster has 6"):
        new_group(dataclasses.replace(config, tensor_parallel_size=8)).start()
    assert time.monotonic() - began < 2.0


def test_gpus_that_are_not_there_are_refused_with_the_remedy(new_group, config):
    with pytest.raises(ValueError, match=r"asks for 2 GPUs, but the Ray cluster has 0 on 1 node.*device=cpu"):
        new_group(dataclasses.replace(config, device="cuda")).start()


def test_cpus_in_use_are_waited_for_and_then_named(new_group, config, monkeypatch):
    import ray

    from distributed_sparse.ray_backend import group as group_module

    monkeypatch.setattr(group_module, "PLACEMENT_TIMEOUT_S", 1.0)
    blocker = ray.util.placement_group([{"CPU": 5}])
    assert blocker.wait(5)
    try:
        with pytest.raises(ValueError, match=r"asks for 2 CPUs on one node, and none came free within 1 s.*1 of 6 unused"):
            new_group(config).start()
    finally:
        group_module.remove(blocker)


def test_a_shard_that_fails_while_loading_is_reported_with_its_own_error(new_group, config):
    group = new_group(config, shard_factory=stand_in.FailsToLoad)
    with pytest.raises(ShardFailure, match="MemoryError: no room for the weights of rank 1") as caught:
        group.start()
    assert caught.value.ranks == (1,)


def test_a_killed_actor_is_found_in_less_than_a_second(new_group, config):
    group = new_group(config)
    group.start()
    began = time.monotonic()
    with pytest.raises(ShardFailure, match=r"rank 1 \(node .* died") as caught:
        step(group, stand_in.KILL_STEP)
    assert time.monotonic() - began < 1.0
    assert caught.value.ranks == (1,)


@pytest.mark.slow
def test_a_stopped_actor_meets_the_step_deadline_and_leaves_no_process(new_group, config):
    group = new_group(config)
    pids = [info.pid for info in group.start()]
    step(group, 0)
    os.kill(pids[1], signal.SIGSTOP)
    with pytest.raises(ShardFailure, match="did not answer step 1"):
        step(group, 1, timeout=0.5)
    began = time.monotonic()
    group.stop()
    assert_gone(pids)
    assert time.monotonic() - began < 4.0


# ---- rebuilt after a failure


def fail(group, ranks: list[int], number: signal.Signals = signal.SIGKILL) -> ShardFailure:
    """Signal these ranks' processes in a step that needs all ranks; the failure that comes of it."""
    for rank in ranks:
        os.kill(group.ranks[rank].pid, number)
    with pytest.raises(ShardFailure) as caught:
        step(group, 1, timeout=1.0 if number == signal.SIGSTOP else WAIT_S)
    return caught.value


def assert_steps(group, first: int) -> None:
    assert [[result.tokens for result in step(group, number)] for number in (first, first + 1)] == [
        [[3, first]] * 2,
        [[3, first + 1]] * 2,
    ]


def placement_id(name: str) -> str:
    import ray

    return ray.util.get_placement_group(name).id.hex()


@pytest.mark.slow
def test_a_rank_that_is_killed_twice_is_replaced_in_its_own_bundle_and_the_other_stays(new_group, config):
    group = new_group(config, name="kept")
    before, placement, bundles = group.start(), placement_id("kept"), list(group._bundles)
    pids = {before[1].pid}
    for generation in (1, 2):
        failure = fail(group, [1])
        assert failure.ranks == (1,) and failure.detect_s < 1.0
        assert "its process was killed" in failure.cause
        survivor, replaced = group.rebuild()
        assert (group.generation, survivor.pid) == (generation, before[0].pid)
        pids.add(replaced.pid)
        assert_steps(group, 5)
    assert len(pids) == 3
    assert placement_id("kept") == placement, "the resources were never given back"
    assert group._bundles == bundles
    group.check()


@pytest.mark.slow
def test_ranks_that_are_killed_together_are_both_replaced(new_group, config):
    group = new_group(config, name="kept")
    before, placement = group.start(), placement_id("kept")
    assert fail(group, [0, 1]).ranks == (0, 1)
    after = group.rebuild()
    assert not {info.pid for info in before} & {info.pid for info in after}
    assert placement_id("kept") == placement
    assert_steps(group, 5)


@pytest.mark.slow
def test_a_stopped_rank_is_out_of_the_way_at_once(new_group, config):
    """Ray itself would take 5 s to end it, in which its GPU would not be free."""
    group = new_group(config)
    pids = [info.pid for info in group.start()]
    failure = fail(group, [1], signal.SIGSTOP)
    assert "did not answer step 1" in failure.cause
    with ThreadPoolExecutor(1) as threads:
        rebuilt = threads.submit(group.rebuild)
        assert_gone([pids[1]])
        after = rebuilt.result()
    assert after[1].pid != pids[1]
    assert_steps(group, 2)


@pytest.mark.slow
def test_a_rank_that_dies_on_its_way_up_is_replaced_by_the_next_rebuild(new_group, config):
    group = new_group(config)
    survivor, first = (info.pid for info in group.start())
    fail(group, [1])
    with ThreadPoolExecutor(1) as threads:
        rebuilt = threads.submit(group.rebuild)
        second = pid_of_replacement(group, 1, first)
        os.kill(second, signal.SIGKILL)
        with pytest.raises(ShardFailure, match=r"rank 1.* its process was killed"):
            rebuilt.result(timeout=WAIT_S)
    after = group.rebuild()
    assert (group.generation, after[0].pid) == (2, survivor)
    assert after[1].pid != second
    assert_steps(group, 5)


@pytest.mark.slow
def test_a_cancelled_rebuild_ends_at_once_and_leaves_no_process(new_group, config):
    others = shard_actors()
    group = new_group(config)
    group.start()
    fail(group, [1])
    with ThreadPoolExecutor(1) as threads:
        rebuilt = threads.submit(group.rebuild)
        time.sleep(0.2)  # the replacement has been asked for, and takes longer than that
        assert not rebuilt.done()
        began = time.monotonic()
        group.cancel()
        with pytest.raises(ShardFailure, match="stopped"):
            rebuilt.result(timeout=WAIT_S)
    assert time.monotonic() - began < 1.0
    group.stop()
    deadline = time.monotonic() + WAIT_S
    while (left := shard_actors() - others) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left, "a replacement came up after the group had been stopped"


def pid_of_replacement(group, rank: int, former: int, timeout: float = WAIT_S) -> int:
    deadline = time.monotonic() + timeout
    while ((place := group._places.get(rank)) is None or place.pid == former) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert place is not None
    return place.pid


def shard_actors() -> set[int]:
    """Pids of all shards on the tests' Ray."""
    return {pid for pid, command in ray_processes(os.environ["RAY_TMPDIR"]).items() if "ray::ShardActor" in command}
