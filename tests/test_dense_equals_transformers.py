"""The engine, from prompt to token, computes what transformers computes: every family, any chunks, any batch, any order."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from distributed_sparse import SamplingParams
from distributed_sparse.llm import LLM
from distributed_sparse.outputs import CompletionOutput, RequestOutput
from distributed_sparse.protocol.step import StepPlan
from tests.support.checkpoints import LLAMA3_ROPE, ROPE_PARAMETERS, decisive_checkpoint, tiny_checkpoint, transformers_model
from tests.support.engine import make_llm
from tests.support.grids import corners
from tests.support.prompts import random_tokens
from tests.support.stepped_engine import SteppedEngine
from tests.support.transformers_reference import assert_close_to, greedy_tokens, reference_logits

pytestmark = pytest.mark.each_value

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-mha": ("llama", {"num_key_value_heads": 8, "attention_bias": True, "mlp_bias": True}),
    "llama3-mqa-tied": (
        "llama",
        {"num_key_value_heads": 1, "head_dim": 64, "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    ),
    "mistral": ("mistral", {}),
    "mistral-head-dim-apart": ("mistral", {"head_dim": 32, "num_key_value_heads": 2}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-mha-tied": ("qwen3", {"num_key_value_heads": 8, "tie_word_embeddings": True}),
}
VOCAB_SIZE = 331
GREEDY = SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True)


@pytest.fixture(scope="module", params=corners(VARIANTS, kept=("llama3-mqa-tied", "mistral", "qwen2", "qwen3")))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    """A random checkpoint of the family, and the same in transformers."""
    family, overrides = VARIANTS[request.param]
    path = tiny_checkpoint(tmp_path_factory.mktemp(request.param), family, **overrides)
    return path, transformers_model(path)


def scored(llm: LLM, token_ids: list[int], decoded: int = 0) -> np.ndarray | None:
    return llm.score(token_ids, whole_vocabulary=True, decode_last_prompt_tokens=decoded)[0].logprobs


def steps_taken(llm: LLM) -> int:
    """Steps with tokens in them."""
    return llm.stats()["steps"]


def whole_vocabulary(completion: CompletionOutput) -> np.ndarray:
    """float32 [tokens, V] of a completion made with ``logprobs=VOCAB_SIZE``."""
    assert completion.logprobs is not None
    return np.array([[row[token].logprob for token in range(VOCAB_SIZE)] for row in completion.logprobs], dtype=np.float32)


def assert_equals_transformers(model: PreTrainedModel, output: RequestOutput) -> None:
    """Tokens equal ``generate``'s, and each was drawn from transformers' distribution."""
    (completion,) = output.outputs
    assert completion.token_ids == greedy_tokens_past_eos(model, output.prompt_token_ids, len(completion.token_ids))
    logits = reference_logits(model, output.prompt_token_ids + completion.token_ids, decoded=len(completion.token_ids))
    assert_close_to(whole_vocabulary(completion), logits[len(output.prompt_token_ids) - 1 :])


def greedy_tokens_past_eos(model: PreTrainedModel, prompt: list[int], max_tokens: int) -> list[int]:
    """``generate`` without an end of sequence: what ``ignore_eos`` asks for."""
    assert model.generation_config is not None
    eos, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    try:
        return greedy_tokens(model, prompt, max_tokens)
    finally:
        model.generation_config.eos_token_id = eos


# ---- logits, every family


def test_a_prompt_read_in_one_chunk(checkpoint: tuple[Path, PreTrainedModel]) -> None:
    path, model = checkpoint
    prompt = random_tokens(70, seed=1)
    with make_llm(path) as llm:
        found = scored(llm, prompt)
        assert steps_taken(llm) == 1
    assert_close_to(found, reference_logits(model, prompt))


def test_prompts_read_together_in_chunks_of_odd_sizes(checkpoint: tuple[Path, PreTrainedModel]) -> None:
    """13 tokens a step, over prompts whose borders fall within chunks, and chunks whose borders fall within pages."""
    path, model = checkpoint
    prompts = [random_tokens(length, seed=length) for length in (70, 23, 41, 16, 2)]
    with make_llm(path, max_num_batched_tokens=13, max_num_seqs=5) as llm:
        found = llm.score(prompts, whole_vocabulary=True)
        assert steps_taken(llm) == -(-sum(map(len, prompts)) // 13)
    for prompt, score in zip(prompts, found):
        assert_close_to(score.logprobs, reference_logits(model, prompt))


def test_fifty_decode_steps(checkpoint: tuple[Path, PreTrainedModel]) -> None:
    path, model = checkpoint
    prompt = random_tokens(85, seed=2)
    with make_llm(path) as llm:
        found = scored(llm, prompt, decoded=50)
        rows = llm.stats()["attention"]["rows_dense"]
    assert rows == 50 * model.config.num_hidden_layers * model.config.num_key_value_heads
    assert_close_to(found, reference_logits(model, prompt, decoded=50))


def test_sequences_of_different_lengths_decoded_together_after_odd_chunks(checkpoint: tuple[Path, PreTrainedModel]) -> None:
    path, model = checkpoint
    prompts = [random_tokens(length, seed=length) for length in (90, 52, 33, 71)]
    with make_llm(path, max_num_batched_tokens=17, max_num_seqs=4) as llm:
        found = llm.score(prompts, whole_vocabulary=True, decode_last_prompt_tokens=30)
    for prompt, score in zip(prompts, found):
        assert_close_to(score.logprobs, reference_logits(model, prompt, decoded=30))


def test_greedy_tokens_equal_those_of_generate(checkpoint: tuple[Path, PreTrainedModel]) -> None:
    path, model = checkpoint
    prompts = [random_tokens(length, seed=length) for length in (1, 15, 16, 17, 60)]
    with make_llm(path) as llm:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    for prompt, output in zip(prompts, outputs):
        assert output.outputs[0].token_ids == greedy_tokens_past_eos(model, prompt, 50)


# ---- requests that come and go


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    path = tiny_checkpoint(tmp_path_factory.mktemp("llama"))
    return path, transformers_model(path)


def test_requests_that_arrive_and_end_at_different_steps(llama: tuple[Path, PreTrainedModel]) -> None:
    """Six requests over four slots: chunks beside decode rows, slots and pages handed on, one token and one-token prompts."""
    path, model = llama
    arrivals = {0: [(33, 30), (5, 4)], 3: [(64, 20)], 4: [(17, 1)], 9: [(1, 25), (90, 12)]}
    outputs: list[RequestOutput] = []
    with SteppedEngine(path, max_num_batched_tokens=23, max_num_seqs=4) as engine:
        plans: list[StepPlan] = []
        waited = False
        while engine.driver.has_work or len(plans) <= max(arrivals):
            for length, max_tokens in arrivals.get(len(plans), []):
                params: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "logprobs": VOCAB_SIZE}
                outputs.append(engine.add(random_tokens(length, seed=length), max_tokens=max_tokens, **params))
            plans.append(engine.step())
            waited |= bool(engine.driver.scheduler.waiting)
        assert engine.driver.allocator.used == engine.driver.allocator.reserved == 0
    assert any(plan.decode and plan.prefill for plan in plans), "no step mixed decode rows and chunks"
    assert waited and {len(plan.decode) for plan in plans} >= {1, 2, 3, 4}
    assert [len(output.outputs[0].token_ids) for output in outputs] == [30, 4, 20, 1, 25, 12]
    for output in outputs:
        assert_equals_transformers(model, output)


def test_streams_that_start_while_others_run(llama: tuple[Path, PreTrainedModel]) -> None:
    path, model = llama
    long, short = (
        SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, logprobs=VOCAB_SIZE) for count in (300, 60)
    )
    prompts = [random_tokens(length, seed=length) for length in (40, 11, 77)]
    late: list[RequestOutput] = []
    with make_llm(path, max_num_batched_tokens=19, max_num_seqs=8) as llm:
        threads = [
            threading.Thread(target=lambda prompt=prompt: late.extend(llm.generate([prompt], short, use_tqdm=False)))
            for prompt in prompts[1:]
        ]
        lengths = []
        for output in llm.stream(prompts[0], long):
            lengths.append(len(output.outputs[0].token_ids))
            if len(lengths) == 5:
                for thread in threads:
                    thread.start()
        for thread in threads:
            thread.join()
        steps = steps_taken(llm)
    assert lengths == list(range(1, 301))
    alone = 300 + 2 * 60 + sum(-(-len(prompt) // 19) for prompt in prompts)
    assert steps < alone - 30, "the requests did not run beside each other"
    for found in (output, *late):
        assert_equals_transformers(model, found)


def test_every_end_of_sequence_token_of_the_generation_config_ends_the_output(tmp_path: Path) -> None:
    prompts = [random_tokens(length, seed=length) for length in (12, 30, 31)]
    path = tiny_checkpoint(tmp_path / "plain")
    with make_llm(path) as llm:
        free = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY, use_tqdm=False)]
    path = tiny_checkpoint(tmp_path / "eos", generation={"eos_token_id": [free[0][7], free[1][4]]})
    model = transformers_model(path)
    params = SamplingParams(temperature=0.0, max_tokens=50)
    with make_llm(path) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, tokens, output in zip(prompts, free, outputs):
        ends = [tokens.index(eos) + 1 for eos in (free[0][7], free[1][4]) if eos in tokens]
        (completion,) = output.outputs
        assert completion.token_ids == tokens[: min(ends, default=50)] == greedy_tokens(model, prompt, 50)
        assert completion.finish_reason == ("stop" if ends else "length")
    assert len(outputs[0].outputs[0].token_ids) <= 8 and len(outputs[1].outputs[0].token_ids) <= 5


def test_a_sequence_of_the_models_full_length_is_scored(tmp_path: Path) -> None:
    """Nothing is sampled, so no room for output is needed."""
    path = tiny_checkpoint(tmp_path, max_position_embeddings=48)
    prompt = random_tokens(48)
    with make_llm(path) as llm:
        found = scored(llm, prompt, decoded=20)
    assert_close_to(found, reference_logits(transformers_model(path), prompt, decoded=20))


# ---- rotary embeddings whose frequencies depend on the length


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
@pytest.mark.parametrize(("length", "decoded"), [(75, 0), (75, 25), (75, 50), (60, 40)])
def test_lengths_past_the_original_one(tmp_path: Path, rope_type: str, length: int, decoded: int) -> None:
    """The original length (40 and 32 tokens) is crossed within the prompt's chunks, or by decoding."""
    limits: dict[str, Any] = {"max_position_embeddings": 40} if rope_type == "dynamic" else {}
    path = tiny_checkpoint(tmp_path, rope_parameters=ROPE_PARAMETERS[rope_type], **limits)
    prompt = random_tokens(length, seed=4)
    with make_llm(path, max_model_len=128, max_num_batched_tokens=11, max_num_seqs=2) as llm:
        found = scored(llm, prompt, decoded=decoded)
        output = llm.generate([prompt[: length - decoded]], GREEDY, use_tqdm=False)[0]
    # A new model each time: transformers' dynamic frequencies remember the longest sequence that it has seen.
    assert_close_to(found, reference_logits(transformers_model(path), prompt, decoded=decoded))
    assert output.outputs[0].token_ids == greedy_tokens_past_eos(transformers_model(path), prompt[: length - decoded], 50)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_neighbours_of_another_length_do_not_change_the_frequencies(tmp_path: Path, rope_type: str) -> None:
    limits: dict[str, Any] = {"max_position_embeddings": 40} if rope_type == "dynamic" else {}
    path = tiny_checkpoint(tmp_path, rope_parameters=ROPE_PARAMETERS[rope_type], **limits)
    prompts = [random_tokens(length, seed=length) for length in (100, 45, 20, 31)]
    with make_llm(path, max_model_len=128) as llm:
        found = llm.score(prompts, whole_vocabulary=True, decode_last_prompt_tokens=10)
    for prompt, score in zip(prompts, found):
        assert_close_to(score.logprobs, reference_logits(transformers_model(path), prompt, decoded=10))


# ---- half precision


@pytest.fixture(scope="module")
def decisive(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A checkpoint of spread logits, and the log-probabilities float64 [R, V] that the engine gives in float32."""
    path = decisive_checkpoint(tmp_path_factory.mktemp("decisive"))
    return path, decisive_logprobs(path)


def decisive_logprobs(path: Path, **engine_args: Any) -> torch.Tensor:
    with make_llm(path, **engine_args) as llm:
        prompts = [random_tokens(120, seed=seed) for seed in range(8)]
        scores = llm.score(prompts, whole_vocabulary=True, decode_last_prompt_tokens=80)
    return torch.cat([torch.from_numpy(score.logprobs) for score in scores]).double()


def top_1_agreement(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float((expected.argmax(-1) == found.argmax(-1)).double().mean())


def divergence(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Mean KL(expected || found) in nats."""
    return float((expected.exp() * (expected - found)).sum(-1).mean())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_agrees_with_float32(decisive: tuple[Path, torch.Tensor], dtype: str) -> None:
    path, expected = decisive
    found = decisive_logprobs(path, dtype=dtype, max_num_batched_tokens=37, max_num_seqs=8)
    assert top_1_agreement(expected, found) >= 0.995
    assert 0.0 < divergence(expected, found) <= 1e-3


def test_what_attention_reads_matters_to_the_decisive_checkpoint(decisive: tuple[Path, torch.Tensor]) -> None:
    """Else the test above would pass with a broken attention."""
    path, expected = decisive
    found = decisive_logprobs(path, sparse={"method": "window", "token_budget": 32, "recent_pages": 1, "dense_layers": 0})
    assert top_1_agreement(expected, found) < 0.995 and divergence(expected, found) > 0.01
