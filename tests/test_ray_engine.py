"""The Python API over Ray actors: the tokens of one rank, clear ends when a shard dies, and nothing left behind."""

from __future__ import annotations

import ast
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from distributed_sparse import LLM, SamplingParams
from distributed_sparse.driver.step_times import TIMEOUT_FLOOR_S
from distributed_sparse.llm import EngineError
from tests.ray_backend.test_group import assert_gone, placement_groups
from tests.support.checkpoints import tiny_checkpoint
from tests.support.patience import WAIT_S
from tests.support.prompts import random_tokens
from tests.support.ray_processes import assert_no_processes, own_ray, ray_processes
from tests.support.text_checkpoint import text_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.each_value]

ROOT = Path(__file__).resolve().parents[1]
METHODS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "quest": {"method": "quest", "token_budget": 48, "recent_pages": 1, "dense_layers": 1},
}
PROMPTS: list[str | list[int]] = ["the quick brown fox", *(random_tokens(length, seed=length) for length in (150, 1, 97, 64))]
GREEDY = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, n=2, seed=7, max_tokens=20, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "max_model_len": 512,
    "max_num_seqs": 12,
    "max_num_batched_tokens": 100,
    "max_rebuilds": 0,  # recovery has tests of its own; here a failure must not pass unseen
}

Engines = Callable[[str, int], LLM]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_checkpoint(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def engines(local_ray: None, path: Path) -> Iterator[Engines]:
    """engines(method, tensor_parallel_size): made when first asked for, or when a test has killed it; one rank needs no Ray."""
    made: dict[tuple[str, int], LLM] = {}
    before = placement_groups()

    def engine(method: str, tensor_parallel_size: int) -> LLM:
        key = (method, tensor_parallel_size)
        if key in made and not made[key].health():
            made.pop(key).shutdown()
        if key not in made:
            made[key] = LLM(str(path), tensor_parallel_size=tensor_parallel_size, sparse=METHODS[method], **SETTINGS)
        return made[key]

    yield engine
    shards = [rank["pid"] for llm in made.values() for rank in llm.stats()["ranks"] if rank["pid"] != os.getpid()]
    for llm in made.values():
        llm.shutdown()
    assert_gone(shards)
    assert placement_groups() == before, "a placement group is left"


def tokens(llm: LLM, params: SamplingParams) -> list[list[list[int]]]:
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [output.error for output in outputs] == [None] * len(PROMPTS)
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


# ---- the same tokens


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("quest", SEEDED),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("quest", GREEDY), ("dense", GREEDY), ("dense", SEEDED))),
    ],
    ids=lambda value: value if isinstance(value, str) else "greedy" if value is GREEDY else "seeded",
)
def test_two_actors_draw_the_tokens_of_one_rank_in_this_process(engines: Engines, method: str, params: SamplingParams) -> None:
    assert tokens(engines(method, 2), params) == tokens(engines(method, 1), params)


def test_text_streams_from_actors_as_it_is_generated(engines: Engines) -> None:
    (expected,) = engines("dense", 1).generate("the quick brown fox", GREEDY)
    *_, last = texts = [output.outputs[0].text for output in engines("dense", 2).stream("the quick brown fox", GREEDY)]
    assert last == expected.outputs[0].text
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts)) and len(set(texts)) > 2


def test_quest_over_ray_reads_as_much_of_every_head_as_in_one_process(engines: Engines) -> None:
    """Were a rank to select for another's heads, or its counts to be lost, the densities would differ."""
    found = {}
    for ranks in (1, 2):
        llm = engines("quest", ranks)
        before = llm.stats()["attention"]
        llm.score(random_tokens(300, seed=1), decode_last_prompt_tokens=40)
        after = llm.stats()["attention"]
        found[ranks] = {name: after[name] - before[name] for name in ("rows_dense", "rows_sparse", "bytes_read")}
    assert found[2] == found[1]
    assert found[2] | {"bytes_read": 0} == {"rows_dense": 40 * 4, "rows_sparse": 2 * 40 * 4, "bytes_read": 0}
    dense, *sparse = engines("quest", 2).stats()["attention"]["density"]
    assert dense == [1.0] * 4
    assert all(0.0 < density < 0.6 for heads in sparse for density in heads)


@pytest.mark.slow
def test_two_engines_in_one_process_keep_to_their_own_actors(engines: Engines) -> None:
    pair = engines("dense", 2), engines("quest", 2)
    assert len({rank["pid"] for llm in pair for rank in llm.stats()["ranks"]} | {os.getpid()}) == 5
    alone = [tokens(llm, GREEDY) for llm in pair]
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(lambda llm: tokens(llm, GREEDY), pair))
    assert together == alone
    assert together[0] != together[1], "else nothing tells the two engines apart"


@pytest.mark.slow
def test_a_relative_path_counts_from_where_the_user_is(
    local_ray: None, engines: Engines, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's workers stay in the directory in which Ray was started."""
    monkeypatch.chdir(path.parent)
    with LLM(path.name, tokenizer=f"./{path.name}", tensor_parallel_size=2, **SETTINGS) as llm:
        monkeypatch.chdir("/")
        assert (llm.config.model, llm.config.tokenizer) == (path.name, f"./{path.name}")
        assert tokens(llm, GREEDY) == tokens(engines("dense", 1), GREEDY)


# ---- what goes wrong


def test_a_killed_shard_that_may_not_be_replaced_ends_every_request_by_name_and_leaves_no_process(engines: Engines) -> None:
    llm = engines("quest", 2)
    ranks = llm.stats()["ranks"]
    groups = placement_groups()
    prompts = [random_tokens(20, seed=seed) for seed in range(14)]  # 12 run, with the stream 3 wait
    stream = iter(llm.stream(prompts[0], LONG))
    next(stream)
    with ThreadPoolExecutor(1) as threads:
        batch = threads.submit(llm.generate, prompts, LONG, use_tqdm=False)
        while llm.stats()["requests"]["running"] < 12:
            time.sleep(0.01)
        os.kill(ranks[1]["pid"], signal.SIGKILL)
        killed = time.monotonic()
        outputs = batch.result(timeout=WAIT_S)
    assert time.monotonic() - killed < TIMEOUT_FLOOR_S, "the shortest deadline that a step has"
    reason = rf"the engine has stopped: rank 1 \(node {ranks[1]['node_id']}, host .*, pid {ranks[1]['pid']}\) died"
    for output in outputs:
        assert output.error is not None and len(output.outputs[0].token_ids) < 400
        with pytest.raises(EngineError, match=reason):
            raise EngineError(output.error)
    assert any(output.outputs[0].token_ids for output in outputs), "tokens of finished steps stay"
    with pytest.raises(EngineError, match=reason):
        list(stream)

    for later in (lambda: llm.generate(prompts[0], use_tqdm=False), lambda: list(llm.stream(prompts[0]))):
        with pytest.raises(EngineError, match=reason):
            later()
    assert not llm.health()
    assert_gone([rank["pid"] for rank in ranks])
    deadline = time.monotonic() + WAIT_S
    while len(placement_groups()) == len(groups) and time.monotonic() < deadline:
        time.sleep(0.05)  # the last thing that a group gives back
    assert len(placement_groups()) == len(groups) - 1


def test_more_ranks_than_the_cluster_has_cpus_are_refused_at_once(local_ray: None, tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, num_key_value_heads=8)
    before = placement_groups()
    began = time.monotonic()
    with pytest.raises(ValueError, match="tensor_parallel_size=8 on device='cpu' asks for 8 CPUs, but the Ray cluster has 6"):
        LLM(str(path), tensor_parallel_size=8, **SETTINGS)
    assert time.monotonic() - began < 20.0, "the time of one actor's start, not of a placement that is waited for"
    assert placement_groups() == before


# ---- whole processes, each with a Ray that LLM starts itself

FEW_PROMPTS = [[1, 5, 6, 7], [1, 200]]
FEW: dict[str, Any] = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True}
LEFT = """
    import atexit, json, sys
    import ray
    from distributed_sparse import LLM, SamplingParams

    # Ray's own end is registered by its import: this comes before it, and after all that an engine registers
    atexit.register(lambda: print("Ray is still up:", ray.is_initialized(), file=sys.stderr))
    path, *sizes = sys.argv[1:]
    prompts, settings, params = json.loads(sys.stdin.readline())
    for size in map(int, sizes):
        llm = LLM(path, tensor_parallel_size=size, **settings)
        outputs = llm.generate(prompts, SamplingParams(**params), use_tqdm=False)
        print([output.outputs[0].token_ids for output in outputs], flush=True)
        if size != int(sizes[-1]):
            llm.shutdown()
    stream = iter(llm.stream([1, 5, 6], SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)))
    next(stream)
    print("left", flush=True)
    STAY
"""


def leave(environment: dict[str, str], path: Path, *sizes: int, stay: bool) -> tuple[subprocess.Popen[str], list[Any]]:
    """A user's process with engines of these sizes, one after the other, the last left in a request; and their tokens."""
    code = textwrap.dedent(LEFT).replace("STAY", "sys.stdin.readline()" if stay else "")
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path), *map(str, sizes)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    process.stdin.write(json.dumps([FEW_PROMPTS, SETTINGS, FEW]) + "\n")
    process.stdin.flush()
    lines: list[str] = []
    for line in process.stdout:
        if line == "left\n":
            return process, [ast.literal_eval(line) for line in lines]
        lines.append(line)
    raise AssertionError("the engine did not start: " + process.stderr.read())


@pytest.mark.slow  # four ranks start twice
def test_more_ranks_than_cores_run_twice_in_a_process_that_leaves_nothing_behind(
    ray_environment: Path, path: Path, engines: Engines
) -> None:
    """Made, shut down and made again, then left without shutdown: no shard and no process of the Ray that was started stays."""
    outputs = engines("dense", 1).generate(FEW_PROMPTS, SamplingParams(**FEW), use_tqdm=False)
    expected = [output.outputs[0].token_ids for output in outputs]
    with own_ray(ray_environment) as environment:
        process, found = leave(environment, path, 2, 4, stay=False)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert found == [expected, expected]
        # a thread that calls Ray after Ray's own end starts another one, which crashes, or stays
        assert "Ray is still up: False" in errors, errors
        assert "Traceback" not in errors and "Started a local Ray" not in errors, errors
        assert_no_processes(environment["RAY_TMPDIR"])


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_no_shard_and_no_ray(ray_environment: Path, path: Path) -> None:
    with own_ray(ray_environment) as environment:
        process, _ = leave(environment, path, 2, stay=True)
        commands = ray_processes(environment["RAY_TMPDIR"])
        shards = [pid for pid, command in commands.items() if "ray::ShardActor" in command]
        assert len(shards) == 2
        own = os.getpriority(os.PRIO_PROCESS, process.pid)
        assert [os.getpriority(os.PRIO_PROCESS, pid) for pid in shards] == [own, own]  # Ray's default is 15 more
        process.kill()
        process.communicate()
        # Ray's agents look for their parent every few seconds only, and then try to tell a Ray that has gone
        assert_no_processes(environment["RAY_TMPDIR"], but=("ray::DashboardAgent", "ray::RuntimeEnvAgent"))
