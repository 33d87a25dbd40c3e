"""The engine on a GPU: the recall checkpoint through the Triton kernels, in float32 and bfloat16. Needs one CUDA device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed_sparse import LLM, SamplingParams
from distributed_sparse.shard.shard import Shard
from distributed_sparse.tools.evaluation.recall import make_prompts, make_quiz, score_quiz
from distributed_sparse.tools.evaluation.recall_model import save_recall_checkpoint
from tests.support.checkpoints import tiny_checkpoint
from tests.support.hash_weights import random_hash_weights
from tests.support.methods import METHODS, sparse_settings
from tests.support.padded_shard import padded_shard
from tests.support.stepped_shard import SteppedShard

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

QUEST = {"method": "quest", "token_budget": 128}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recall")
    save_recall_checkpoint(folder)
    return folder


def share_right(llm: LLM) -> float:
    """Right answers over 40 questions, each read sparsely."""
    quiz = make_quiz(256, 4096, 40, seed=3)
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, decode_last_prompt_tokens=quiz.num_quiz_tokens)
    (output,) = llm.generate([quiz.token_ids], params, use_tqdm=False)
    assert output.prompt_logprobs is not None, output.error
    score = score_quiz(quiz, output.prompt_logprobs)
    return score.right / score.total


@pytest.mark.parametrize("sparse", [{"method": "twilight"}, {"method": "vattention"}])
def test_the_adaptive_methods_answer_on_the_gpu(checkpoint: Path, sparse: dict[str, Any]) -> None:
    with LLM(str(checkpoint), device="cuda", sparse=sparse, max_model_len=8192, gpu_memory_utilization=0.3) as llm:
        assert share_right(llm) >= 0.95
        assert llm.stats()["attention"]["rows_sparse"] > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quest_answers_on_the_gpu_and_gives_the_tokens_of_the_cpu(checkpoint: Path, dtype: str) -> None:
    prompts = [prompt.token_ids for prompt in make_prompts(96, 1200, 4, seed=5)] + [[1, 2, 3]]
    params = SamplingParams(n=3, temperature=0.7, seed=11, max_tokens=12, ignore_eos=True)
    args = {"sparse": QUEST, "max_model_len": 8192, "max_num_batched_tokens": 512, "max_num_seqs": 16}
    with LLM(str(checkpoint), device="cuda", dtype=dtype, gpu_memory_utilization=0.3, **args) as llm:
        assert share_right(llm) >= 0.95
        on_gpu = llm.generate(prompts, params, use_tqdm=False)
        stats = llm.stats()
    assert stats["attention"]["rows_sparse"] > 0
    assert stats["pages"]["used"] == 0
    assert all(output.error is None and len(output.outputs) == 3 for output in on_gpu)
    if dtype == "float32":
        with LLM(str(checkpoint), device="cpu", dtype=dtype, **args) as llm:
            on_cpu = llm.generate(prompts, params, use_tqdm=False)
        for gpu, cpu in zip(on_gpu, on_cpu):
            assert [o.token_ids for o in gpu.outputs] == [o.token_ids for o in cpu.outputs]


def test_a_second_engine_in_the_process_finds_the_memory_of_the_first(checkpoint: Path) -> None:
    for _ in range(2):
        with LLM(str(checkpoint), device="cuda", sparse=QUEST, max_model_len=8192, gpu_memory_utilization=0.8) as llm:
            assert llm.generate([[1, 2, 3]], SamplingParams(temperature=0.0, max_tokens=4), use_tqdm=False)
    assert torch.cuda.memory_reserved() < 1 << 30


# ---- captured steps

LAYERS, HEADS, HEAD_DIM = 4, 8, 64
CAPTURED: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    **{method: (method, {}) for method, case in METHODS.items() if case.captured},
    "quest below min_context": ("quest", {"min_context": 400}),
}
LENGTHS = (1100, 30, 300, 90, 5)
"""Five rows, padded to eight; long enough to be sampled, covered by a budget, and in between."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    random_hash_weights(folder / "hash.safetensors", range(LAYERS), HEADS, HEAD_DIM)
    sizes: dict[str, Any] = {
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "head_dim": HEAD_DIM,
    }
    return tiny_checkpoint(folder / "model", hidden_size=256, max_position_embeddings=2048, **sizes)


def stepped(tiny: Path, variant: str, make_shard: Any = Shard, **config: Any) -> SteppedShard:
    method, changes = CAPTURED[variant]
    sparse = sparse_settings(method, str(tiny.parent / "hash.safetensors"), **changes)
    given = {"device": "cuda", "dtype": "float32", "sparse": sparse, "max_num_seqs": 12, "max_num_batched_tokens": 2048}
    return SteppedShard(tiny, 1500, make_shard, **{**given, **config})


def logits_of(engine: SteppedShard) -> Tensor:
    """Of the last decode step's rows."""
    assert engine.shard.graphs is not None
    return engine.shard.graphs._logits[: len(engine.lengths)].clone()


@contextmanager
def no_waiting() -> Iterator[None]:
    """Any operation that waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", CAPTURED)
def test_a_captured_step_is_bit_for_bit_the_step_that_was_captured(tiny: Path, method: str, dtype: str) -> None:
    """The same shapes with and without capture, over 40 steps in which contexts outgrow pages."""
    captured = stepped(tiny, method, dtype=dtype)
    padded = stepped(tiny, method, padded_shard, dtype=dtype, enforce_eager=True)
    assert captured.shard._captures and not padded.shard._captures
    assert captured.start(LENGTHS).tokens == padded.start(LENGTHS).tokens
    for _ in range(40):
        assert captured.decode() == padded.decode()
        assert torch.equal(logits_of(captured), logits_of(padded))
    with torch.inference_mode():
        assert captured.shard._report() == padded.shard._report()
    assert method == "dense" or captured.shard.attention.rows[1] > 0


@pytest.mark.parametrize("method", CAPTURED)
def test_graphs_give_the_tokens_of_eager_steps(tiny: Path, method: str) -> None:
    """Through ends, slots that are given on, and batches of every size: captured steps against steps of their own shape."""
    tokens: dict[bool, list[list[int]]] = {}
    for enforce_eager in (False, True):
        engine = stepped(tiny, method, enforce_eager=enforce_eager)
        assert (engine.shard.graphs is None) == enforce_eager
        found = tokens[enforce_eager] = [engine.start(LENGTHS).tokens]
        for step in range(60):
            if step % 12 == 5:
                engine.end(next(iter(engine.lengths)))
            if step % 12 == 10:
                free = next(slot for slot in range(12) if slot not in engine.lengths)
                found.append(engine.start([17 * step % 700 + 3], first_slot=free, temperature=0.8, top_p=0.9).tokens)
            if step == 30:
                engine.start([40, 41, 42, 43], first_slot=8, temperature=1.0)
            found.append(engine.decode())
        engine.shard.close()
    assert tokens[False] == tokens[True]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8}, {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "min_p": 0.01}])
@pytest.mark.parametrize("method", CAPTURED)
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_decode_steps_wait_for_nothing(tiny: Path, method: str, sampling: dict[str, Any], enforce_eager: bool) -> None:
    engine = stepped(tiny, method, enforce_eager=enforce_eager)
    engine.start(LENGTHS[:3], **sampling)
    engine.start(LENGTHS[3:], first_slot=3)
    for _ in range(17):  # over a page's border: its kernels are loaded by then
        engine.decode()
    plans = [engine.decode_plan() for _ in range(20)]
    with no_waiting():
        pending = [engine.shard.begin(plan) for plan in plans]
    assert all(len(step.result().tokens) == len(LENGTHS) for step in pending)


@pytest.mark.parametrize("method", CAPTURED)
def test_decode_steps_allocate_nothing(tiny: Path, method: str) -> None:
    """Nothing is asked of the driver, and nothing is held when a step has ended."""
    engine = stepped(tiny, method)
    engine.start(LENGTHS, temperature=0.8, top_p=0.9)
    for _ in range(20):
        engine.decode()
    names = ("num_device_alloc", "num_device_free", "reserved_bytes.all.current", "allocated_bytes.all.current")
    before = torch.cuda.memory_stats()
    for _ in range(20):
        engine.decode()
    after = torch.cuda.memory_stats()
    assert {name: after[name] for name in names} == {name: before[name] for name in names}


def test_steps_that_are_queued_one_behind_the_other_give_the_tokens_of_steps_one_by_one(tiny: Path) -> None:
    one_by_one, queued = stepped(tiny, "quest"), stepped(tiny, "quest")
    for engine in (one_by_one, queued):
        engine.start(LENGTHS, temperature=0.9)
    expected = [one_by_one.decode() for _ in range(30)]
    pending, found = queued.begin(), []
    for _ in range(29):
        following = queued.begin()
        found.append(pending.result())
        pending = following
    found.append(pending.result())
    assert [result.tokens for result in found] == expected
    assert all(0 < result.step_ms < 1000 for result in found)


def test_graphs_fit_in_the_memory_that_was_reserved_for_them(tiny: Path) -> None:
    """The cache takes what the profile leaves: when all is in place, the engine holds no more than its share."""
    torch.cuda.empty_cache()
    free_before, total = torch.cuda.mem_get_info()
    with LLM(
        str(tiny), device="cuda", dtype="bfloat16", sparse={"method": "quest"}, max_model_len=2048, max_num_seqs=256,
        gpu_memory_utilization=0.5,
    ) as llm:  # fmt: skip
        llm.generate(
            [[5, 6, 7]] * 256, SamplingParams(temperature=0.9, top_p=0.9, max_tokens=40, ignore_eos=True), use_tqdm=False
        )
        used = total - torch.cuda.mem_get_info()[0]
    others = total - free_before
    assert used <= max(0.5 * total, others) + (256 << 20)


def test_a_method_that_reads_the_device_runs_without_graphs_and_says_so(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = SteppedShard(
        tiny, 200, device="cuda", dtype="float32", sparse={"method": "oracle_topk", "token_budget": 64}, max_num_seqs=2
    )
    assert engine.shard.graphs is None
    (message,) = [record.getMessage() for record in caplog.records if "CUDA graphs" in record.getMessage()]
    assert "oracle_topk" in message
    engine.start([100])
    assert len(engine.decode()) == 1
