"""Logits that are NaN or infinite end their request, with an error that names dtype and remedy; other requests go on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from distributed_sparse import SamplingParams
from distributed_sparse.client.client import EngineError
from distributed_sparse.commands.generate import main
from distributed_sparse.llm import LLM
from distributed_sparse.outputs import RequestOutput
from tests.support.checkpoints import tiny_checkpoint
from tests.support.engine import make_llm
from tests.support.prompts import random_tokens
from tests.support.stepped_engine import SteppedEngine

BAD, HUGE = 300, 301
"""Tokens that are never sampled; embeddings of NaN, and of numbers beyond float16."""
HEALTHY = [random_tokens(length, seed=length, vocab_size=299) for length in (40, 19)]
PROMPT = [*HEALTHY[0][:20], BAD, *HEALTHY[0][20:]]
GREEDY = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True}
SAMPLED = {**GREEDY, "temperature": 1.0, "seed": 5}
NAN = "logits at position [0-9]+ are NaN: the model cannot be computed in float32; check the checkpoint"


def checkpoint(folder: Path, rows: dict[int, float]) -> Path:
    """A tiny one, of two layers, with rows of its embedding set to one value; none of these tokens is ever sampled."""
    path = tiny_checkpoint(folder, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32)
    weights = load_file(path / "model.safetensors")
    for token, value in rows.items():
        weights["model.embed_tokens.weight"][token] = value
    weights["lm_head.weight"][[BAD, HUGE]] = 0.0
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("bad"), {BAD: math.nan, HUGE: 1e5})


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    with make_llm(path, max_num_seqs=8, max_num_batched_tokens=32, max_model_len=128) as llm:
        yield llm
        assert llm.stats()["pages"]["used"] == llm.stats()["pages"]["reserved"] == 0


def tokens(output: RequestOutput) -> list[list[int]]:
    return [completion.token_ids for completion in output.outputs]


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SAMPLED,
        {**SAMPLED, "top_k": 5, "top_p": 0.9, "min_p": 0.01},
        {**SAMPLED, "n": 3},
        {**GREEDY, "logprobs": 2, "prompt_logprobs": 1},
        {**GREEDY, "prompt_logprobs": -1},
        {**SAMPLED, "min_tokens": 3, "ignore_eos": False},
        {**GREEDY, "decode_last_prompt_tokens": 30},
        {**GREEDY, "decode_last_prompt_tokens": 10},
    ],
    ids=["greedy", "sampled", "masks", "n", "logprobs", "vocabulary", "min_tokens", "decoded last", "prefilled before"],
)
def test_a_prompt_with_a_nan_fails_alone(llm: LLM, params: dict[str, Any]) -> None:
    """In a chunk of the prompt that samples nothing, or in one of its last tokens, which are decoded."""
    given = [SamplingParams(**{**params, "decode_last_prompt_tokens": 0}), SamplingParams(**params)]
    alone = [llm.generate(prompt, given[0], use_tqdm=False)[0] for prompt in HEALTHY]
    first, bad, second = llm.generate([HEALTHY[0], PROMPT, HEALTHY[1]], [given[0], given[1], given[0]], use_tqdm=False)
    assert [tokens(first), tokens(second)] == [tokens(output) for output in alone]
    assert first.error is None and second.error is None
    assert bad.error is not None and bad.finished
    with pytest.raises(EngineError, match=NAN):
        llm.generate(PROMPT, given[1], use_tqdm=False)
    assert [(completion.finish_reason, completion.token_ids) for completion in bad.outputs] == [("error", [])] * given[1].n


def test_a_score_with_a_nan_fails_and_the_next_one_is_right(llm: LLM) -> None:
    (expected,) = llm.score([HEALTHY[0]])
    with pytest.raises(EngineError, match=NAN):
        llm.score([HEALTHY[0], PROMPT])
    (found,) = llm.score([HEALTHY[0]])
    assert (found.token_logprobs == expected.token_logprobs).all()


def test_failed_requests_are_counted_and_a_stream_raises(llm: LLM) -> None:
    before = llm.stats()["requests"]["failed"]
    with pytest.raises(EngineError, match=NAN):
        list(llm.stream(PROMPT, SamplingParams(**GREEDY)))
    assert llm.stats()["requests"]["failed"] == before + 1


@pytest.mark.parametrize(("dtype", "fails"), [("float16", True), ("bfloat16", False)])
def test_a_float16_overflow_names_the_remedy_and_the_remedy_helps(path: Path, dtype: str, fails: bool) -> None:
    with make_llm(path, dtype=dtype, max_num_seqs=4) as llm:
        healthy, overflows = llm.generate([HEALTHY[1], [HUGE] * 20], SamplingParams(**GREEDY), use_tqdm=False)
        assert llm.stats()["ranks"][0]["dtype"] == dtype
    assert healthy.error is None and len(healthy.outputs[0].token_ids) == 6
    assert (overflows.error is not None) == fails
    if fails:
        remedy = "float16 overflows in this model; use dtype='bfloat16' or 'float32', or check the weights"
        assert remedy in str(overflows.error)


def test_infinite_logits_are_named(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, {})
    weights = load_file(path / "model.safetensors")
    weights["model.norm.weight"][0] = 1e4
    weights["lm_head.weight"][5, 0], weights["lm_head.weight"][6, 0] = 3e38, -3e38  # one of the two logits is +inf
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with make_llm(path, max_num_seqs=4) as llm, pytest.raises(EngineError, match="logits at position 18 are infinite"):
        llm.generate(HEALTHY[1], SamplingParams(**GREEDY), use_tqdm=False)


def test_stop_tokens_that_are_the_whole_vocabulary_leave_nothing_to_sample(llm: LLM) -> None:
    params = SamplingParams(stop_token_ids=list(range(331)), min_tokens=2)
    with pytest.raises(ValueError, match="min_tokens=2 excludes stop_token_ids and EOS, which are all 331 tokens"):
        llm.generate(HEALTHY[1], params, use_tqdm=False)


# ---- in the middle of an output


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list[list[int]]:
    """What healthy prompts are continued with."""
    return [llm.generate(prompt, SamplingParams(**{**GREEDY, "max_tokens": 12}), use_tqdm=False)[0].outputs[0].token_ids
            for prompt in HEALTHY]  # fmt: skip


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory, expected: list[list[int]]) -> tuple[Path, int]:
    """A checkpoint whose first healthy prompt samples a token of NaN, and the number of tokens that it gets."""
    first, second = expected
    count = next(i for i in range(3, 12) if first[i] not in (*first[:i], *second, *HEALTHY[0], *HEALTHY[1])) + 1
    return checkpoint(tmp_path_factory.mktemp("middle"), {first[count - 1]: math.nan}), count


@pytest.mark.parametrize("queues_plans", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_tokens_before_a_nan_are_kept_and_a_step_that_is_already_queued_changes_nothing(
    failing: tuple[Path, int], expected: list[list[int]], ranks: int, queues_plans: bool
) -> None:
    path, count = failing
    with SteppedEngine(path, ranks, queues_plans, max_num_seqs=4, device="cpu") as engine:
        outputs = [engine.add(prompt, **{**GREEDY, "max_tokens": 12}) for prompt in HEALTHY]
        engine.finish()
        assert engine.driver.allocator.used == engine.driver.allocator.reserved == 0
    assert outputs[0].outputs[0].token_ids == expected[0][:count]
    assert outputs[0].outputs[0].finish_reason == "error"
    assert f"logits at position {len(HEALTHY[0]) + count - 1} are NaN" in str(outputs[0].error)
    assert outputs[1].outputs[0].token_ids == expected[1] and outputs[1].error is None


def test_a_replayed_request_ends_in_the_same_way(failing: tuple[Path, int], expected: list[list[int]]) -> None:
    path, count = failing
    with SteppedEngine(path, max_num_seqs=4, device="cpu") as engine:
        outputs = [engine.add(prompt, **{**GREEDY, "max_tokens": 12}) for prompt in HEALTHY]
        for _ in range(count):  # all that it samples is committed: the next step fails
            engine.step()
        engine.group.rebuild()
        assert engine.driver.resume() == {}
        engine.finish()
    assert outputs[0].outputs[0].token_ids == expected[0][:count] and outputs[0].metrics.num_replayed_tokens > 0
    assert f"logits at position {len(HEALTHY[0]) + count - 1} are NaN" in str(outputs[0].error)
    assert outputs[1].outputs[0].token_ids == expected[1]


# ---- JSON


def test_rows_are_json_whatever_their_numbers_are(path: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    engine = f"model: {path}\ndevice: cpu\nmax_num_seqs: 4\ntrace: true\n"
    config.write_text(engine + "sampling: {temperature: 0.0, max_tokens: 3}\n")
    rows = [{"prompt": PROMPT, "sampling_params": {"logprobs": 2, "prompt_logprobs": 1}}, {"prompt": HEALTHY[1]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    main(["--config", str(config), "--prompts-file", str(tmp_path / "in.jsonl"), "--output", str(out)])

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    failed, written = (json.loads(line, parse_constant=refuse) for line in out.read_text().splitlines())
    assert "are NaN" in failed["error"] and len(written["outputs"][0]["token_ids"]) == 3
    assert written["outputs"][0]["trace"][0]["layers"][0]["captured_mass"] == [1.0] * 4


def test_bad_weights_in_every_token_fail_every_request(path: Path, tmp_path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 3] = torch.nan
    broken = checkpoint(tmp_path / "broken", {})
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with make_llm(broken, max_num_seqs=4) as llm:
        outputs = llm.generate(HEALTHY, SamplingParams(**SAMPLED), use_tqdm=False)
        assert llm.stats()["requests"]["failed"] == 2
    assert ["are NaN" in str(output.error) for output in outputs] == [True, True]
