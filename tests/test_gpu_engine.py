"""The engine on a GPU: the recall checkpoint through the Triton kernels, in float32 and bfloat16. Needs one CUDA device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_sparse import LLM, SamplingParams
from distributed_sparse.evaluation.recall import make_prompts, make_quiz, score_quiz
from distributed_sparse.evaluation.recall_model import save_recall_checkpoint

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
