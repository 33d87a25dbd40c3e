"""Requests that stream over Ray while shards die, hang, or lose their node: the tokens of an undisturbed run, none lost."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from distributed_sparse import LLM, SamplingParams
from tests.ray_backend.test_group import assert_gone, placement_groups
from tests.support.checkpoints import decisive_checkpoint
from tests.support.patience import WAIT_S
from tests.support.prompts import random_tokens
from tests.support.ray_processes import FAST_HEALTH_CHECKS, assert_no_processes, own_ray

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[1]
GREEDY = SamplingParams(temperature=0.0, max_tokens=250, ignore_eos=True)
SEEDED = [SamplingParams(temperature=0.9, top_p=0.95, seed=seed, max_tokens=250, ignore_eos=True) for seed in (7, 8, 9)]
REQUESTS = list(zip([random_tokens(length, seed=length) for length in (150, 1, 97, 64, 200)], [GREEDY, GREEDY, *SEEDED]))
SETTINGS: dict[str, Any] = {
    "tensor_parallel_size": 2,
    "distributed_executor_backend": "ray",
    "device": "cpu",
    "max_model_len": 512,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 100,
    "sparse": {"method": "quest", "token_budget": 48, "recent_pages": 1, "dense_layers": 1},
}
TOKENS_BEFORE = 20
"""Each request has streamed so many when the fault comes."""


def stream_all(llm: LLM, fault: Callable[[], object] = lambda: None) -> list[list[int]]:
    """Stream all requests at once, the `fault` in the middle of them; every stream only ever goes on from where it was."""
    under_way = [threading.Event() for _ in REQUESTS]

    def stream(number: int) -> list[int]:
        tokens: list[int] = []
        try:
            for output in llm.stream(*REQUESTS[number]):
                before, tokens = tokens, output.outputs[0].token_ids
                assert tokens[: len(before)] == before
                if len(tokens) >= TOKENS_BEFORE:
                    under_way[number].set()
        finally:
            under_way[number].set()
        return list(tokens)

    with ThreadPoolExecutor(len(REQUESTS)) as threads:
        streams = [threads.submit(stream, number) for number in range(len(REQUESTS))]
        for event in under_way:
            event.wait()
        fault()
        return [stream.result() for stream in streams]


@pytest.fixture(scope="module")
def llm(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    before = placement_groups()
    with LLM(str(decisive_checkpoint(tmp_path_factory.mktemp("model"))), **SETTINGS) as llm:
        yield llm
        pids = [rank["pid"] for rank in llm.stats()["ranks"]]
    assert_gone(pids)
    assert placement_groups() == before, "a placement group is left"


@pytest.fixture(scope="module")
def undisturbed(llm: LLM) -> list[list[int]]:
    tokens = stream_all(llm)
    assert [len(of_request) for of_request in tokens] == [250] * len(REQUESTS)
    assert len(set(itertools.chain(*tokens))) > 50, "else equal tokens would say little"
    return tokens


@pytest.mark.parametrize(
    ("ranks", "number"),
    [
        pytest.param([1], signal.SIGKILL, id="rank 1 is killed"),
        pytest.param([0, 1], signal.SIGKILL, id="both are killed", marks=pytest.mark.slow),
        pytest.param([0], signal.SIGKILL, id="rank 0 is killed", marks=pytest.mark.slow),
        pytest.param([1], signal.SIGSTOP, id="rank 1 hangs", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_streams_go_on_with_the_tokens_of_an_undisturbed_run(
    llm: LLM, undisturbed: list[list[int]], ranks: list[int], number: signal.Signals
) -> None:
    before = llm.stats()
    pids = [rank["pid"] for rank in before["ranks"]]

    def fault() -> None:
        for rank in ranks:
            os.kill(pids[rank], number)

    assert stream_all(llm, fault) == undisturbed
    after = llm.stats()
    assert after["recoveries"] == before["recoveries"] + 1
    kept = [rank["pid"] == pid for rank, pid in zip(after["ranks"], pids, strict=True)]
    assert kept == [rank not in ranks for rank in range(2)]
    record = after["recovery_log"][-1]
    assert record["ranks"] == tuple(ranks)
    assert record["detect_s"] < (1.0 if number == signal.SIGKILL else 12.0)
    assert record["replayed_tokens"] >= TOKENS_BEFORE * len(REQUESTS)
    assert_gone([pids[rank] for rank in ranks])
    assert after["pages"]["used"] == 0, "pages of finished requests are free"
    assert llm.health()


# ---- a node that goes, on a cluster in a process of its own


def lose_a_node(path: str) -> dict[str, Any]:
    """One rank on each of two nodes, a third to spare; the second rank's node goes as if its power had gone."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cores = os.sched_getaffinity(0)
    for core in (min(cores), max(cores), min(cores)):
        os.sched_setaffinity(0, [core])  # each node, and what it starts, sees one core, as on a machine of its own
        cluster.add_node(num_cpus=1)
    os.sched_setaffinity(0, cores)
    os.environ["RAY_ADDRESS"] = cluster.address
    with LLM(path, **SETTINGS) as llm:
        before = llm.stats()["ranks"]
        undisturbed = stream_all(llm)

        def fault() -> None:
            entry = next(node for node in ray.nodes() if node["NodeID"] == before[1]["node_id"])
            node = next(node for node in cluster.worker_nodes if node._raylet_socket_name == entry["RayletSocketName"])
            os.kill(before[1]["pid"], signal.SIGKILL)
            cluster.remove_node(node, allow_graceful=False)

        disturbed = stream_all(llm, fault)
        stats = llm.stats()
    cluster.shutdown()
    return {"tokens": [undisturbed, disturbed], "before": before, "after": stats["ranks"], "recoveries": stats["recovery_log"]}


@pytest.mark.slow  # the soak removes nodes, too
def test_a_node_goes_and_streams_go_on_on_another(ray_environment: Path, tmp_path: Path) -> None:
    path = decisive_checkpoint(tmp_path / "model")
    code = f"import json, tests.test_ray_recovery as own; print(json.dumps(own.lose_a_node({str(path)!r})))"
    with own_ray(ray_environment) as environment:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment | FAST_HEALTH_CHECKS,
            capture_output=True,
            text=True,
            timeout=2 * WAIT_S,
        )
        assert done.returncode == 0, done.stderr
        assert_no_processes(environment["RAY_TMPDIR"])
    found = json.loads(done.stdout.splitlines()[-1])
    undisturbed, disturbed = found["tokens"]
    assert disturbed == undisturbed
    before, after = found["before"], found["after"]
    assert after[0]["pid"] == before[0]["pid"], "the other rank stays"
    assert after[1]["node_id"] not in [rank["node_id"] for rank in before]
    (record,) = found["recoveries"]
    assert record["ranks"] == [1] and record["detect_s"] < 5.0
