"""Forked children of a process with an engine: a call says at once what to do, and nothing there harms the parent."""

from __future__ import annotations

import asyncio
import gc
import json
import multiprocessing
import os
import re
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_sparse import LLM, SamplingParams
from tests.support.engine import make_llm
from tests.support.grids import corners
from tests.support.ray_processes import assert_no_processes, own_ray
from tests.support.text_checkpoint import text_checkpoint

ROOT = Path(__file__).resolve().parents[1]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
PROMPT = [1, 5, 6, 7]
SETTINGS: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 8, "device": "cpu"}
REMEDY = r"RuntimeError: this engine belongs to process \d+, .* make an LLM inside the child, or .* 'spawn' method"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_checkpoint(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    with make_llm(path, **SETTINGS) as llm:
        yield llm


def in_child(work: Callable[[], object]) -> str:
    """What `work` says in a child made by os.fork: "returned ...", or the last line of its traceback."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        said = "ended without a word"
        try:
            said = f"returned {work()!r}"
        except BaseException as error:
            said = traceback.format_exception_only(error)[-1].strip()
        finally:
            os.write(write, said.encode())
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        said = file.read()
    os.waitpid(pid, 0)
    return said


async def read_all(stream: Any) -> None:
    async for _ in stream:
        pass


CALLS: dict[str, Callable[[LLM, Any], object]] = {
    "generate": lambda llm, stream: llm.generate(PROMPT, GREEDY, use_tqdm=False),
    "generate nothing": lambda llm, stream: llm.generate([], GREEDY, use_tqdm=False),
    "generate a prompt that is refused": lambda llm, stream: llm.generate([[]], GREEDY, use_tqdm=False),
    "chat": lambda llm, stream: llm.chat([{"role": "user", "content": "x"}], GREEDY, use_tqdm=False),
    "stream": lambda llm, stream: llm.stream(PROMPT, GREEDY),
    "go on with a stream": lambda llm, stream: list(stream),
    "go on with a stream, async": lambda llm, stream: asyncio.run(read_all(stream)),
    "score": lambda llm, stream: llm.score(PROMPT),
    "stats": lambda llm, stream: llm.stats(),
    "health": lambda llm, stream: llm.health(),
    "abort": lambda llm, stream: llm.abort("0"),
    "the client": lambda llm, stream: llm.client.submit([]),
}


@pytest.mark.parametrize("call", corners(CALLS, kept=("generate", "stream", "go on with a stream", "stats")))
def test_a_call_in_a_forked_child_says_what_to_do(llm: LLM, call: str) -> None:
    stream = llm.stream(PROMPT, LONG)
    assert re.match(REMEDY, in_child(lambda: CALLS[call](llm, stream)))
    assert len(list(stream)[-1].outputs[0].token_ids) == 200, "the parent's request goes on"


def test_a_lock_that_another_thread_held_at_the_fork_stops_no_call(llm: LLM) -> None:
    for lock in (llm.client._lock, llm.client.service._wake):  # type: ignore[attr-defined]
        with lock:
            for call in ("generate", "stats", "abort"):
                assert in_child(lambda call=call: CALLS[call](llm, None)).startswith("RuntimeError: this engine belongs")
            assert in_child(llm.shutdown) == "returned None"


def test_shutdown_and_the_end_of_its_objects_in_a_child_are_harmless(llm: LLM) -> None:
    reading = iter(llm.stream(PROMPT, LONG))
    next(reading)
    before = llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids

    def leave() -> None:
        llm.shutdown()
        with llm:
            pass
        reading.close()
        llm.client.close()
        gc.collect()

    assert in_child(leave) == "returned None"
    assert len(list(reading)[-1].outputs[0].token_ids) == 200
    assert llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids == before


class Prompts(torch.utils.data.Dataset):
    """A data set that calls the engine for its items."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        return len(self.llm.generate(PROMPT, GREEDY, use_tqdm=False))


def test_a_worker_of_a_data_loader_passes_the_error_on(llm: LLM) -> None:
    loader = torch.utils.data.DataLoader(Prompts(llm), num_workers=1, multiprocessing_context="fork", timeout=30)
    with pytest.raises(RuntimeError, match="multiprocessing_context='spawn'"):
        list(loader)
    assert llm.health()


def test_a_child_of_multiprocessing_can_make_an_engine_of_its_own(llm: LLM, path: Path) -> None:
    """GNU OpenMP hangs in a child on a thread that has computed in parallel before the fork."""

    def work(found: Any) -> None:
        with LLM(str(path), **SETTINGS) as own:
            found.put(own.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.ones(1 << 20).add_(1.0)
        context = multiprocessing.get_context("fork")
        found = context.SimpleQueue()
        child = context.Process(target=work, args=(found,), daemon=True)
        child.start()
        child.join(60)
        assert child.exitcode == 0
    finally:
        torch.set_num_threads(before)
    assert found.get() == llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids


# ---- whole processes, over Ray

PARENT = """
    import gc, json, os, signal, sys, threading, time, traceback
    import ray
    from distributed_sparse import LLM, SamplingParams

    path, ranks, settings = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    llm = LLM(path, tensor_parallel_size=ranks, **settings)

    def generate():
        return llm.generate([1, 5, 6, 7], params, use_tqdm=False)[0].outputs[0].token_ids

    def work(kind):
        global llm
        if kind == "call":
            try:
                generate()
            except RuntimeError as error:
                print("said", error, flush=True)
        elif kind == "forget":
            del llm
            gc.collect()
        elif kind == "shutdown":
            llm.shutdown()
        elif kind == "make another":
            try:
                LLM(path, tensor_parallel_size=2, **settings)
            except RuntimeError as error:
                print("said", error, flush=True)
        elif kind == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        sys.exit(7)  # by Python's whole way out: atexit, finalizers, destructors

    before = generate()
    for kind in sys.argv[4:]:
        if (pid := os.fork()) == 0:
            work(kind)
        deadline = time.monotonic() + 60.0
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        print(kind, os.waitstatus_to_exitcode(ended[1]), generate() == before and llm.health(), flush=True)
    time.sleep(2.0)  # what a child told the cluster, if it did, arrives
    print("at last", generate() == before and llm.health(), ray.is_initialized(), flush=True)
"""
ENDS = ["leave", "call", "forget", "shutdown", "terminate"]


def run_parent(environment: dict[str, str], path: Path, ranks: int, *kinds: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PARENT), str(path), str(ranks), json.dumps(SETTINGS), *kinds],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and "SIGSEGV" not in done.stderr, done.stderr
    return done.stdout.splitlines()


def check_ends(lines: list[str], kinds: list[str]) -> list[str]:
    """Every child has ended as it should, and left the parent's engine as it was; what children said."""
    ended = [line for line in lines if not line.startswith("said")]
    assert ended[:-1] == [f"{kind} {-15 if kind == 'terminate' else 7} True" for kind in kinds]
    return [line for line in lines if line.startswith("said")]


@pytest.mark.slow
def test_children_that_end_as_processes_do_leave_a_rank_in_process_alone(path: Path) -> None:
    lines = run_parent(dict(os.environ), path, 1, *ENDS)
    (said,) = check_ends(lines, ENDS)
    assert "make an LLM inside the child" in said
    assert lines[-1] == "at last True False"


@pytest.mark.ray
@pytest.mark.slow
def test_children_that_end_as_processes_do_leave_actors_and_ray_alone(ray_environment: Path, path: Path) -> None:
    """Ray's own objects in a child, left to themselves, end the parent's actors and its Ray, or hang."""
    with own_ray(ray_environment) as environment:
        lines = run_parent(environment, path, 2, *ENDS, "make another")
        call, another = check_ends(lines, [*ENDS, "make another"])
        assert "make an LLM inside the child" in call
        assert "Ray does not work in a forked child; start it with the 'spawn' method" in another
        assert lines[-1] == "at last True True"
        assert_no_processes(environment["RAY_TMPDIR"], timeout=20.0)
