"""The Driver behind an actor serves clients as the one in this process does, and goes when its client goes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from pathlib import Path

import pytest

from distributed_sparse.client.client import Client, EngineError
from distributed_sparse.config import EngineConfig
from distributed_sparse.protocol.client import ModelInfo, NewRequest
from distributed_sparse.ranks.base import ShardFailure
from distributed_sparse.sampling_params import SamplingParams
from tests.ray_backend.test_group import assert_gone, is_alive, placement_groups
from tests.support.checkpoints import tiny_checkpoint
from tests.support.patience import WAIT_S
from tests.support.process_group import open_ports
from tests.support.ray_processes import ray_processes

pytestmark = pytest.mark.ray

INFO = ModelInfo(vocab_size=331, num_layers=3, num_kv_heads=4, eos_token_ids=(2,), max_model_len=256)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    model = tiny_checkpoint(tmp_path_factory.mktemp("model"))
    return EngineConfig(
        model=model,
        tensor_parallel_size=2,
        device="cpu",
        max_model_len=256,
        max_num_seqs=8,
        kv_cache_memory_bytes=4 << 20,
    )


def new_requests(count: int, max_tokens: int = 8) -> list[NewRequest]:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return [NewRequest(uuid.uuid4().hex, [1, 5 + i, 9, 30 + i], params) for i in range(count)]


def tokens_of(client: Client, requests: list[NewRequest], timeout: float = WAIT_S) -> list[list[int]]:
    updates = client.submit(requests)
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    unfinished = set(tokens)
    while unfinished:
        update = updates.get(timeout=timeout)
        assert update.error is None, update.error
        for sample in update.samples:
            tokens[update.request_id] += sample.token_ids
        if update.finished:
            unfinished.remove(update.request_id)
    return list(tokens.values())


@pytest.fixture(scope="module")
def driver(local_ray, config):
    from distributed_sparse.ray_backend.driver_actor import connect_driver

    before = placement_groups()
    driver = connect_driver(config, INFO, None)
    yield driver
    pids = [rank["pid"] for rank in driver.stats()["ranks"]]
    driver.shutdown()
    driver.shutdown()
    assert_gone(pids)
    assert placement_groups() == before


def test_two_clients_get_the_tokens_that_one_rank_in_this_process_gives(driver, config):
    import dataclasses

    from distributed_sparse.driver.service import DriverService
    from distributed_sparse.ranks.in_process import InProcessGroup

    alone = dataclasses.replace(config, tensor_parallel_size=1)
    service = DriverService(alone, INFO, None, InProcessGroup(alone))
    service.start()
    local = Client(service)
    expected = tokens_of(local, new_requests(3))
    local.close()

    first, second = Client(driver), Client(driver)
    assert tokens_of(first, new_requests(3)) == expected
    assert tokens_of(second, new_requests(3)) == expected
    assert driver.health()
    stats = driver.stats()
    assert stats["requests"]["finished"] >= 6
    assert [rank["rank"] for rank in stats["ranks"]] == [0, 1]


def test_an_aborted_request_ends_with_its_client_still_served(driver):
    client = Client(driver)
    (request,) = new_requests(1, max_tokens=200)
    updates = client.submit([request])
    assert not updates.get(timeout=WAIT_S).finished
    client.abort([request.request_id])
    while not (update := updates.get(timeout=WAIT_S)).finished:
        pass
    assert [sample.finish_reason for sample in update.samples] == ["abort"]
    assert len(tokens_of(client, new_requests(1))[0]) == 8


def test_a_stream_that_nobody_reads_pauses_so_that_the_service_sees_the_silence(driver):
    """Were it to run on, a client that died would look alive for ever, and its requests would keep their pages."""
    from distributed_sparse.ray_backend.driver_actor import HEARTBEAT_S, UNREAD_ITEMS

    client_id = uuid.uuid4().hex
    assert driver.next_outputs(client_id, 0, 0.1) is not None  # the stream begins
    time.sleep((UNREAD_ITEMS + 2) * HEARTBEAT_S)
    waiting = 0
    while True:
        began = time.monotonic()
        driver.next_outputs(client_id, 0, 5.0)
        if time.monotonic() - began > HEARTBEAT_S / 2:
            break  # this one was not waiting for us
        waiting += 1
    assert waiting <= UNREAD_ITEMS + 1


@pytest.mark.slow  # tests/test_ray_engine.py has one of them
def test_wrong_settings_arrive_as_the_value_errors_that_they_are(local_ray, config):
    import dataclasses

    from distributed_sparse.ray_backend.driver_actor import connect_driver

    for change, message in (
        ({"tensor_parallel_size": 64}, "tensor_parallel_size=64 .*the Ray cluster has 6"),
        ({"kv_cache_memory_bytes": 20_000}, "max_model_len"),
    ):
        with pytest.raises(ValueError, match=message):
            connect_driver(dataclasses.replace(config, **change), INFO, None)


@pytest.fixture
def doomed(local_ray, config):
    """A Driver of its own with a client, to be killed: (driver, client, the Driver's pid, its shards' pids)."""
    from distributed_sparse.ray_backend.driver_actor import connect_driver

    others = processes_of("ray::DriverActor")
    driver = connect_driver(config, INFO, None)
    (pid,) = processes_of("ray::DriverActor") - others
    client = Client(driver)
    yield driver, client, pid, [rank["pid"] for rank in driver.stats()["ranks"]]
    client.close()


def processes_of(command: str) -> set[int]:
    return {pid for pid, found in ray_processes(os.environ["RAY_TMPDIR"]).items() if found.startswith(command)}


def ports_of(pids: list[int]) -> set[int]:
    """TCP ports of this machine on which these processes listen or are connected."""
    inodes = set()
    for pid in pids:
        links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()]
        inodes |= {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {int(row[1].rpartition(":")[2], 16) for row in rows if row[9] in inodes}


def wait_for(condition, timeout: float, what: str) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def assert_ended_with_its_driver(updates, killed: float) -> None:
    """The request's last update says, at once, that the Driver has died."""
    while not (update := updates.get(timeout=WAIT_S)).finished:
        pass
    assert time.monotonic() - killed < 2.0
    assert update.error_kind == "engine" and "the Driver has died: its process was killed" in update.error


def test_a_killed_driver_fails_its_clients_at_once_and_leaves_nothing(doomed):
    """Nobody calls shutdown: a client in a service, say, that only reports the error."""
    driver, client, pid, shards = doomed
    groups = placement_groups()
    ports = ports_of([pid, *shards])
    assert len(ports) >= 4, "each shard's connection and the store's are looked at"
    updates = client.submit(new_requests(2, max_tokens=250))
    assert not updates.get(timeout=WAIT_S).finished
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    assert_ended_with_its_driver(updates, killed)
    assert_gone([pid, *shards])
    wait_for(lambda: len(placement_groups()) == len(groups) - 1, 5.0, "the placement group is left")
    wait_for(lambda: not open_ports() & ports, 5.0, "a socket is left open")
    assert time.monotonic() - killed < 6.0

    assert not driver.health()
    with pytest.raises(ShardFailure, match="Driver has died"):
        driver.stats()
    with pytest.raises(EngineError, match="Driver has died"):
        client.submit(new_requests(1))


@pytest.mark.slow
def test_a_driver_that_is_killed_in_the_middle_of_a_recovery_leaves_nothing(doomed):
    """Its replacement for a killed shard has been asked for, and must not come up without it."""
    _, client, pid, shards = doomed
    groups, others = placement_groups(), processes_of("ray::ShardActor") - set(shards)
    updates = client.submit(new_requests(2, max_tokens=250))
    assert not updates.get(timeout=WAIT_S).finished
    os.kill(shards[1], signal.SIGKILL)
    wait_for(lambda: processes_of("ray::ShardActor") - others - set(shards), 20.0, "the shard is not replaced")
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    assert_ended_with_its_driver(updates, killed)
    wait_for(lambda: not processes_of("ray::ShardActor") - others, 5.0, "a shard is left")
    wait_for(lambda: len(placement_groups()) == len(groups) - 1, 5.0, "the placement group is left")
    time.sleep(1.0)
    assert not processes_of("ray::ShardActor") - others, "a replacement came up after all"


CLIENT = """
    import os, sys
    import ray
    from distributed_sparse.config import EngineConfig
    from distributed_sparse.ray_backend.driver_actor import connect_driver
    from tests.ray_backend.test_driver_actor import INFO

    if __name__ == "__main__":
        ADDRESS
        config = EngineConfig(model=sys.argv[1], tensor_parallel_size=2, device="cpu", max_model_len=256, max_num_seqs=8,
                              kv_cache_memory_bytes=4 << 20)
        drivers = [connect_driver(config, INFO, None) for _ in range(int(sys.argv[2]))]
        pids = [rank["pid"] for driver in drivers for rank in driver.stats()["ranks"]]
        print("pids", *pids, flush=True)
        sys.stdin.readline()
        for driver in drivers:
            assert ray.is_initialized()
            driver.shutdown()
        print("initialized", ray.is_initialized(), flush=True)
"""


def run_client(tmp_path: Path, config: EngineConfig, count: int, address: str | None) -> tuple[subprocess.Popen, list[int]]:
    """A client in a process of its own, up to the point where its Drivers have started; and its shards' pids."""
    script = tmp_path / "client/client.py"
    connect = f"ray.init(address={address!r}, logging_level='WARNING')" if address else "pass"
    script.write_text(textwrap.dedent(CLIENT).replace("ADDRESS", connect))
    root = str(Path(__file__).parents[2])
    client = subprocess.Popen(
        [sys.executable, str(script), str(config.model), str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": root},
    )
    lines = []
    for line in client.stdout:
        lines.append(line)
        if line.startswith("pids"):
            return client, [int(pid) for pid in line.split()[1:]]
    client.wait()
    raise AssertionError("the client did not start: " + "".join(lines))


@pytest.mark.slow  # tests/test_ray_engine.py has the like for a whole process
def test_nothing_outlives_a_client_that_is_killed(local_ray, config, tmp_path):
    import ray

    before = placement_groups()
    client, pids = run_client(tmp_path, config, 1, ray.get_runtime_context().gcs_address)
    assert len(pids) == 2 and all(map(is_alive, pids))
    os.kill(client.pid, signal.SIGKILL)
    client.wait()
    assert_gone(pids)
    deadline = time.monotonic() + WAIT_S
    while placement_groups() != before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert placement_groups() == before


@pytest.mark.slow  # two engines start
def test_two_engines_share_a_ray_of_their_own_and_the_last_one_ends_it(ray_environment, config, tmp_path, monkeypatch):
    """Two of two ranks each on any number of cores; `ray start` was never called."""
    monkeypatch.setenv("RAY_TMPDIR", str(ray_environment / "own"))
    (ray_environment / "own").mkdir()
    client, pids = run_client(tmp_path, config, 2, None)
    assert len(set(pids)) == 4 and all(map(is_alive, pids))
    out, _ = client.communicate("\n", timeout=WAIT_S)
    assert "initialized False" in out
    assert client.returncode == 0
    assert_gone(pids)


def test_a_request_that_raises_in_the_driver_is_refused_alone_among_those_of_its_call(driver):
    client_id = uuid.uuid4().hex
    first, wrong, last = new_requests(3)
    wrong.request_id = ["no", "text"]  # a Client would refuse it; nothing can be looked up by it
    driver.submit(client_id, [first, wrong, last])
    cursor, finished = 0, {}
    while len(finished) < 3:
        cursor, updates = driver.next_outputs(client_id, cursor, 30.0)
        finished |= {str(update.request_id): update.error for update in updates if update.finished}
    assert "TypeError: unhashable type: 'list'" in finished.pop(str(wrong.request_id))
    assert finished == {first.request_id: None, last.request_id: None}
    assert driver.stats()["requests"]["running"] == 0
