"""One rank on each of two nodes: the Driver, the ranks and the client find each other over the nodes' addresses."""

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
from tests.support.prompts import random_tokens
from tests.support.ray_processes import assert_no_processes, own_ray

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
    "sparse": {"method": "quest", "token_budget": 48, "dense_layers": 1},
}

# in a process of its own: the tests' process has its own connection to Ray, of which there is one
CLUSTER = """
    import json, os, sys
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
    free = ray.available_resources().get("CPU")
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps({"tokens": tokens, "ranks": stats["ranks"], "nodes": nodes, "left": left, "free": free}))
"""


def test_one_rank_on_each_of_two_nodes_gives_the_tokens_of_one_process(ray_environment: Path, tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "model")
    with own_ray(ray_environment) as environment:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(CLUSTER)],
            input=json.dumps([str(path), SETTINGS, PROMPTS, PARAMS]),
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert_no_processes(environment["RAY_TMPDIR"], timeout=20.0)
    found = json.loads(done.stdout.splitlines()[-1])

    with LLM(str(path), **SETTINGS) as llm:
        for params, tokens in zip(PARAMS, found["tokens"], strict=True):
            outputs = llm.generate(PROMPTS, SamplingParams(**params), use_tqdm=False)
            assert tokens == [output.outputs[0].token_ids for output in outputs]
    nodes = [rank["node_id"] for rank in found["ranks"]]
    assert nodes == sorted(found["nodes"]) and len(set(nodes)) == 2
    assert [rank["kv_heads"] for rank in found["ranks"]] == [[0, 2], [2, 4]]
    assert (found["left"], found["free"]) == ([], 2.0), "the cluster is as it was"
