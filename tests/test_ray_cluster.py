"""Ranks on several nodes: they find each other over the nodes' addresses, and move to other nodes when theirs goes."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from distributed_sparse import LLM, SamplingParams
from tests.support.checkpoints import tiny_checkpoint
from tests.support.patience import WAIT_S
from tests.support.prompts import random_tokens
from tests.support.ray_processes import FAST_HEALTH_CHECKS, assert_no_processes, own_ray
from tests.support.stand_in_shard import write_checkpoint

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = [random_tokens(length, seed=length) for length in (150, 1, 97, 64)]
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0, "max_tokens": 30, "ignore_eos": True},
    {"temperature": 0.9, "top_p": 0.95, "seed": 7, "max_tokens": 30, "ignore_eos": True},
]
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "max_model_len": 256,
    "max_num_seqs": 8,
    "sparse": {"method": "quest", "token_budget": 48, "recent_pages": 1, "dense_layers": 1},
}

# in a process of its own: the tests' process has its own connection to Ray, of which there is one
CLUSTER = """
    import json, os, sys, time
    import ray
    from ray.cluster_utils import Cluster
    from distributed_sparse import LLM, SamplingParams

    path, settings, prompts, params = json.load(sys.stdin)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:1])  # each node, and what it starts, sees one core, as on a machine of its own
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    os.sched_setaffinity(0, cores[-1:])
    cluster.add_node(num_cpus=1)
    os.sched_setaffinity(0, cores)
    os.environ["RAY_ADDRESS"] = cluster.address
    with LLM(path, tensor_parallel_size=2, **settings) as llm:
        batches = [llm.generate(prompts, SamplingParams(**own), use_tqdm=False) for own in params]
        stats = llm.stats()
    tokens = [[output.outputs[0].token_ids for output in outputs] for outputs in batches]
    assert not ray.is_initialized(), "a cluster that LLM has joined is left again"
    ray.init(address=cluster.address, logging_level="ERROR")
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    left = [entry["name"] for entry in ray.util.placement_group_table().values() if entry["state"] != "REMOVED"]
    deadline = time.monotonic() + 300.0  # Ray's nodes report what is free now and then
    while (free := ray.available_resources().get("CPU")) != 2.0 and time.monotonic() < deadline:
        time.sleep(0.1)
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps({"tokens": tokens, "ranks": stats["ranks"], "nodes": nodes, "left": left, "free": free}))
"""


@pytest.mark.slow
def test_one_rank_on_each_of_two_nodes_gives_the_tokens_of_one_process(ray_environment: Path, tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "model")
    with own_ray(ray_environment) as environment:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(CLUSTER)],
            input=json.dumps([str(path), SETTINGS, PROMPTS, PARAMS]),
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=2 * WAIT_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert_no_processes(environment["RAY_TMPDIR"])
    found = json.loads(done.stdout.splitlines()[-1])

    with LLM(str(path), **SETTINGS) as llm:
        for params, tokens in zip(PARAMS, found["tokens"], strict=True):
            outputs = llm.generate(PROMPTS, SamplingParams(**params), use_tqdm=False)
            assert tokens == [output.outputs[0].token_ids for output in outputs]
    nodes = [rank["node_id"] for rank in found["ranks"]]
    assert nodes == sorted(found["nodes"]) and len(set(nodes)) == 2
    assert [rank["kv_heads"] for rank in found["ranks"]] == [[0, 2], [2, 4]]
    assert (found["left"], found["free"]) == ([], 2.0), "the cluster is as it was"


# ---- nodes that go


@pytest.fixture(scope="module")
def losses(ray_environment: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `tests.support.node_loss` saw: one cluster for all tests, since it takes half a minute."""
    path = write_checkpoint(tmp_path_factory.mktemp("stand-in"))
    with own_ray(ray_environment) as environment:
        done = subprocess.run(
            [sys.executable, "-m", "tests.support.node_loss", str(path)],
            cwd=ROOT, env=environment | FAST_HEALTH_CHECKS, capture_output=True, text=True, timeout=2 * WAIT_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert_no_processes(environment["RAY_TMPDIR"])
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["started"]["steps"] and len(set(found["started"]["nodes"])) == 2
    return found


@pytest.mark.slow
def test_a_rank_whose_node_loses_power_is_placed_on_a_spare_one(losses: dict[str, Any]) -> None:
    """The replacement is asked for before Ray has noticed that the node has gone, and so on that node at first."""
    before = losses["started"]
    lost, rebuilt = losses["power"]
    assert lost["ranks"] == [1] and lost["seconds"] < 5.0
    assert rebuilt["steps"], rebuilt["error"]
    assert rebuilt["pids"][0] == before["pids"][0], "the other rank stays"
    assert rebuilt["nodes"][0] == before["nodes"][0]
    assert rebuilt["nodes"][1] not in before["nodes"]
    assert rebuilt["log"] == ["rank 1 was placed on a lost node; placing it again"]


@pytest.mark.slow
def test_a_rank_without_a_node_waits_for_a_new_one_and_says_so(losses: dict[str, Any]) -> None:
    survivor = losses["power"][1]["pids"][0]
    lost, rebuilt = losses["no room, then a new node"]
    assert lost["ranks"] == [1]
    assert "the actor's node was terminated" in lost["cause"] or "its process" in lost["cause"]
    assert rebuilt["steps"], rebuilt["error"]
    assert rebuilt["pids"][0] == survivor
    (line,) = rebuilt["log"]
    assert "tensor_parallel_size=2 on device='cpu' asks for 2 CPUs, and those of a lost node have no room" in line
    assert "the Ray cluster has 0 of 1 unused on 2 node(s)" in line


@pytest.mark.slow
def test_a_rank_that_finds_no_node_in_time_is_refused_with_the_numbers(losses: dict[str, Any]) -> None:
    _, refused = losses["no room until the deadline"]
    assert "ValueError: tensor_parallel_size=2 on device='cpu' asks for 2 CPUs" in refused["error"]
    assert "the Ray cluster has 0 of 1 unused on 2 node(s); add a node or lower tensor_parallel_size" in refused["error"]
    assert 6.0 <= refused["seconds"] < 9.0
    assert losses["given up"]["placements"] == []


@pytest.mark.slow
def test_ranks_that_shared_a_node_go_to_two_where_no_other_has_room_for_both(losses: dict[str, Any]) -> None:
    """Ray would keep a placement group that asked for one node waiting for ever."""
    before = losses["on one node"]
    assert before["steps"] and len(set(before["nodes"])) == 1 and before["placements"] == ["STRICT_PACK"]
    _, rebuilt = losses["the only node with room for all"]
    assert rebuilt["steps"], rebuilt["error"]
    assert len(set(rebuilt["nodes"])) == 2 and rebuilt["nodes"] == sorted(rebuilt["nodes"])
    assert rebuilt["placements"] == ["PACK"]


@pytest.mark.slow
def test_a_wait_for_a_node_can_be_cancelled(losses: dict[str, Any]) -> None:
    _, cancelled = losses["cancelled"]
    assert "the shards have been stopped" in cancelled["error"]
    assert cancelled["seconds"] < 2.0
    assert losses["stopped"]["placements"] == []
