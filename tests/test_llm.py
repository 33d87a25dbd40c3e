"""The Python API as a user meets it: what comes back, in which order, and what is left when the user walks away."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distributed_sparse import LLM, CompletionOutput, SamplingParams
from distributed_sparse.config import EngineConfig
from distributed_sparse.llm import EngineError
from tests.support.checkpoints import tiny_checkpoint, transformers_model
from tests.support.engine import make_llm
from tests.support.patience import WAIT_S
from tests.support.text_checkpoint import byte_level_bos_tokenizer, text_checkpoint

ROOT = Path(__file__).resolve().parents[1]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
PROMPTS = [[1, 5, 6, 7], [1, 50, 60, 70, 80], [1, 200], [1, *range(100, 140)]]
SETTINGS: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 8, "device": "cpu"}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_checkpoint(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def shared(path: Path) -> Iterator[LLM]:
    with make_llm(path, **SETTINGS) as llm:
        yield llm


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """One engine for all tests; each must leave it empty."""
    yield shared
    wait_until(lambda: is_idle(shared), "the end of all requests")


@pytest.fixture(scope="module")
def alone(shared: LLM) -> list[list[int]]:
    """What each of PROMPTS is greedily continued with."""
    return [tokens(shared.generate(prompt, GREEDY, use_tqdm=False)[0]) for prompt in PROMPTS]


def tokens(output: Any, index: int = 0) -> list[int]:
    return output.outputs[index].token_ids


def is_idle(llm: LLM) -> bool:
    stats = llm.stats()
    counts = stats["requests"]
    return (counts["running"], counts["waiting"], stats["pages"]["used"], stats["pages"]["reserved"]) == (0, 0, 0, 0)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.01)


def decode(llm: LLM, token_ids: list[int], **options: Any) -> Any:
    assert llm.tokenizer is not None
    return llm.tokenizer.decode(token_ids, **options)


def run_python(code: str, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S, env={**os.environ, **(env or {})},
    )  # fmt: skip


# ---- generate


def test_a_single_prompt_and_a_list_of_prompts_give_lists_of_outputs_in_order(llm: LLM, alone: list[list[int]]) -> None:
    (single,) = llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    assert (single.prompt, single.prompt_token_ids, single.finished, single.error) == (None, PROMPTS[0], True, None)
    assert tokens(single) == alone[0]
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == PROMPTS
    assert [tokens(output) for output in outputs] == alone
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_the_order_is_that_of_the_prompts_and_not_that_in_which_they_end(llm: LLM, alone: list[list[int]]) -> None:
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in (12, 2, 9, 1)]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [tokens(output) for output in outputs] == [whole[: own.max_tokens] for whole, own in zip(alone, params)]


def test_more_prompts_than_run_at_once_all_get_their_tokens(llm: LLM, alone: list[list[int]]) -> None:
    outputs = llm.generate(PROMPTS * 8, GREEDY, use_tqdm=False)
    assert [tokens(output) for output in outputs] == alone * 8


def test_text_is_encoded_with_one_bos_and_equals_its_token_ids(llm: LLM) -> None:
    token_ids = byte_level_bos_tokenizer()("the quick")["input_ids"]
    text, ids = llm.generate(["the quick", token_ids], GREEDY, use_tqdm=False)
    assert (text.prompt, text.prompt_token_ids) == ("the quick", token_ids)
    assert token_ids.count(1) == 1
    assert tokens(text) == tokens(ids)
    decoded = decode(llm, token_ids + tokens(text), skip_special_tokens=True)
    assert "the quick" + text.outputs[0].text == decoded == "the quick" + ids.outputs[0].text


def test_greedy_tokens_are_those_of_transformers(path: Path, llm: LLM, alone: list[list[int]]) -> None:
    model: Any = transformers_model(path)
    for prompt, own in zip(PROMPTS, alone):
        with torch.inference_mode():
            generated = model.generate(
                torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None
            )
        assert generated[0, len(prompt) :].tolist() == own


def test_every_eos_of_the_generation_config_ends_an_output(tmp_path: Path, alone: list[list[int]]) -> None:
    first, second = alone[0][4], alone[0][2]
    text_checkpoint(tmp_path)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [first, second]}))
    with make_llm(tmp_path, **SETTINGS) as llm:
        ended = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)[0].outputs[0]
        end = min(alone[0].index(first), alone[0].index(second)) + 1
        assert (ended.token_ids, ended.finish_reason, ended.stop_reason) == (alone[0][:end], "stop", None)
        assert tokens(llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)[0]) == alone[0]


def test_the_tokenizers_own_eos_ends_an_output_beside_the_checkpoints(tmp_path: Path, alone: list[list[int]]) -> None:
    text_checkpoint(tmp_path)
    tokenizer = byte_level_bos_tokenizer()
    prompt, own = next((p, o) for p, o in zip(PROMPTS, alone) if any(token < len(tokenizer) for token in o[1:]))
    end = next(token for token in own[1:] if token < len(tokenizer))
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    tokenizer.save_pretrained(tmp_path)
    with make_llm(tmp_path, **SETTINGS) as llm:
        ended = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)[0].outputs[0]
        assert (ended.token_ids, ended.finish_reason) == (own[: own.index(end) + 1], "stop")
        later = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=12, min_tokens=12), use_tqdm=False)[0]
        assert len(tokens(later)) == 12 and end not in tokens(later)[:-1]


def test_a_request_that_is_refused_leaves_the_others_of_its_list_alone(llm: LLM, alone: list[list[int]]) -> None:
    wrong: list[Any] = [[331], [], [1, -1], None, 3.5, [1] * 250, "\ud800"]
    prompts = [item for pair in zip(wrong, PROMPTS * 2) for item in pair]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [tokens(output) for output in outputs[1::2]] == (alone * 2)[: len(wrong)]
    for output in outputs[::2]:
        assert (output.finished, output.metrics) == (True, None)
        assert output.outputs == [CompletionOutput(0, "", [], "error")]
        assert output.error
    messages = [str(output.error) for output in outputs[::2]]
    assert "prompt_token_ids[0]=331 is outside the vocabulary of 331" in messages[0]
    assert "the prompt is empty" in messages[1]
    assert "prompt=None must be a str or a list of token ids" in messages[3]
    assert "over max_model_len=256; use max_tokens <= 6" in messages[5]
    assert "is it valid Unicode" in messages[6]


def test_a_single_request_that_is_refused_raises(llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"prompt of 250 tokens .* over max_model_len=256"):
        llm.generate([1] * 250, GREEDY, use_tqdm=False)
    with pytest.raises(ValueError, match="is outside the vocabulary"):
        llm.generate([1, 999], GREEDY, use_tqdm=False)
    with pytest.raises(ValueError, match="is it valid Unicode"):
        llm.generate("\ud800", GREEDY, use_tqdm=False)


@pytest.mark.parametrize("prompts", [None, 5, np.array([1, 2])])
def test_what_is_no_prompt_and_no_list_is_refused(llm: LLM, prompts: Any) -> None:
    with pytest.raises(ValueError, match="must be a str, a list of token ids, or a list of those"):
        llm.generate(prompts, GREEDY, use_tqdm=False)


def test_sampling_params_must_fit_the_prompts(llm: LLM) -> None:
    with pytest.raises(ValueError, match="2 sampling_params for 3 prompts; give one for all, or one per prompt"):
        llm.generate(PROMPTS[:3], [GREEDY] * 2, use_tqdm=False)
    for wrong in (5, {"max_tokens": 3}):
        with pytest.raises(ValueError, match=r"sampling_params=.* must be a SamplingParams"):
            llm.generate(PROMPTS[0], wrong, use_tqdm=False)  # type: ignore[arg-type]
    outputs = llm.generate(PROMPTS[:2], [GREEDY, 5], use_tqdm=False)  # type: ignore[list-item]
    assert (outputs[0].error, "must be a SamplingParams" in str(outputs[1].error)) == (None, True)


def test_a_progress_bar_counts_prompts_and_can_be_left_out(
    llm: LLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    llm.generate(PROMPTS[:3], GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""
    llm.generate(PROMPTS[:3], GREEDY)
    assert "3/3" in capsys.readouterr().err


# ---- chat


CONVERSATION = [{"role": "user", "content": "the fox"}]


def test_a_conversation_goes_through_the_template_with_one_bos(llm: LLM) -> None:
    (output,) = llm.chat(CONVERSATION, GREEDY, use_tqdm=False)
    assert decode(llm, output.prompt_token_ids) == "<s>[user]the fox\n[assistant]"
    assert output.prompt_token_ids.count(1) == 1
    assert tokens(output) == tokens(llm.generate(output.prompt_token_ids, GREEDY, use_tqdm=False)[0])


def test_several_conversations_come_back_in_order_and_template_arguments_arrive(llm: LLM) -> None:
    conversations = [CONVERSATION, [{"role": "system", "content": "dog"}, {"role": "user", "content": "again"}]]
    outputs = llm.chat(conversations, GREEDY, use_tqdm=False, add_generation_prompt=False)
    assert [decode(llm, output.prompt_token_ids) for output in outputs] == [
        "<s>[user]the fox\n",
        "<s>[system]dog\n[user]again\n",
    ]


def test_a_conversation_that_cannot_be_answered_raises(llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"messages\[0\]=.* has no 'content'"):
        llm.chat([{"role": "user"}], GREEDY, use_tqdm=False)
    with pytest.raises(ValueError, match="over max_model_len=256"):
        llm.chat([{"role": "user", "content": "x" * 300}], GREEDY, use_tqdm=False)
    for wrong in ("hello", {"role": "user", "content": "x"}, None):
        with pytest.raises(ValueError, match=r"messages=.* must be a list"):
            llm.chat(wrong, GREEDY, use_tqdm=False)  # type: ignore[arg-type]


def test_of_several_conversations_a_malformed_one_fails_alone(llm: LLM) -> None:
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    for wrong, error in (
        (image, "of type 'image_url' is not supported"),
        ([{"role": "user"}], "has no 'content'"),
        ([], "must be a non-empty list"),
        ("hello", "messages='hello' must be a non-empty list"),
        (CONVERSATION[0], "must be a non-empty list"),
        (None, "messages=None must be a non-empty list"),
        ([None], r"messages[0]=None must be a mapping"),
    ):
        outputs = llm.chat([wrong, CONVERSATION, wrong], GREEDY, use_tqdm=False)  # type: ignore[list-item]
        assert [output.error is None for output in outputs] == [False, True, False]
        assert error in str(outputs[0].error) and outputs[0].finished
        assert decode(llm, outputs[1].prompt_token_ids) == "<s>[user]the fox\n[assistant]"
    with pytest.raises(ValueError, match="of type 'image_url' is not supported"):
        llm.chat(image, GREEDY, use_tqdm=False)
    with pytest.raises(ValueError, match="needs add_generation_prompt=False"):
        llm.chat([CONVERSATION, CONVERSATION], GREEDY, use_tqdm=False, continue_final_message=True)


def test_text_that_brings_its_own_bos_is_warned_of_once(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(llm, "_warned_of_bos", False)
    llm.generate(["the fox", [1, 1, 5]], GREEDY, use_tqdm=False)
    llm.chat(CONVERSATION, GREEDY, use_tqdm=False)
    assert "another one" not in caplog.text
    for _ in range(2):
        llm.generate(["<s>the fox", "<s>the dog"], GREEDY, use_tqdm=False)
    assert caplog.text.count("a text prompt begins with '<s>', and the tokenizer adds another one; leave it out") == 1


def test_without_a_tokenizer_token_ids_work_and_text_is_refused(tmp_path: Path) -> None:
    with make_llm(tiny_checkpoint(tmp_path), **SETTINGS) as llm:
        (output,) = llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
        assert (len(tokens(output)), output.outputs[0].text) == (12, "")
        for call in (lambda: llm.generate("text"), lambda: llm.chat(CONVERSATION)):
            with pytest.raises(ValueError, match=r"needs a tokenizer, and '.*' has none; give token ids, or tokenizer="):
                call()
        with pytest.raises(ValueError, match=r"stop=\['x'\] needs a tokenizer"):
            llm.generate(PROMPTS[0], SamplingParams(stop="x"), use_tqdm=False)


# ---- stream


def test_a_stream_grows_token_by_token_to_the_output_of_generate(llm: LLM, alone: list[list[int]]) -> None:
    outputs = list(llm.stream(PROMPTS[0], GREEDY))
    assert [tokens(output) for output in outputs] == [alone[0][:count] for count in range(1, 13)]
    assert [output.finished for output in outputs] == [False] * 11 + [True]
    assert outputs[-1].outputs[0].text == llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)[0].outputs[0].text
    assert all(late.outputs[0].text.startswith(early.outputs[0].text) for early, late in itertools.pairwise(outputs))
    assert len({output.request_id for output in outputs}) == 1


def test_what_a_stream_has_given_does_not_change_any_more(path: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=1, prompt_logprobs=1, n=2)
    with make_llm(path, **SETTINGS, max_num_batched_tokens=16) as llm:
        seen = [(output, repr(output)) for output in llm.stream(PROMPTS[3], params)]
    assert len(seen) > 5
    assert all(repr(output) == then for output, then in seen)


def test_a_stream_can_be_read_with_async_for(llm: LLM, alone: list[list[int]]) -> None:
    async def read(prompt: list[int]) -> list[int]:
        last = None
        async for output in llm.stream(prompt, GREEDY):
            last = output
        return tokens(last)

    async def read_all() -> list[list[int]]:
        return await asyncio.gather(*(read(prompt) for prompt in PROMPTS * 3))

    assert asyncio.run(read_all()) == alone * 3


def test_leaving_a_stream_early_aborts_its_request_and_frees_its_pages(llm: LLM) -> None:
    before = llm.stats()["requests"]["aborted"]
    for output in llm.stream(PROMPTS[0], LONG):
        if len(tokens(output)) == 3:
            break
    wait_until(lambda: is_idle(llm), "the end of the request")
    assert llm.stats()["requests"]["aborted"] == before + 1


def test_an_error_in_the_loops_body_aborts_the_request_too(llm: LLM) -> None:
    before = llm.stats()["requests"]["aborted"]
    with pytest.raises(ZeroDivisionError):
        for _ in llm.stream(PROMPTS[0], LONG):
            _ = 1 / 0
    wait_until(lambda: is_idle(llm), "the end of the request")
    assert llm.stats()["requests"]["aborted"] == before + 1


def test_leaving_an_async_stream_or_cancelling_its_task_aborts_the_request(llm: LLM) -> None:
    before = llm.stats()["requests"]["aborted"]

    async def leave() -> None:
        async for _ in llm.stream(PROMPTS[0], LONG):
            break

    async def follow(started: asyncio.Event) -> None:
        async for _ in llm.stream(PROMPTS[1], LONG):
            started.set()

    async def cancel() -> None:
        started = asyncio.Event()
        task = asyncio.create_task(follow(started))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    asyncio.run(cancel())
    wait_until(lambda: is_idle(llm), "the end of the requests")
    assert llm.stats()["requests"]["aborted"] == before + 2


def test_a_stream_that_is_refused_raises_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        llm.stream([])


def test_what_only_the_driver_can_refuse_is_raised_when_a_stream_is_read(llm: LLM) -> None:
    page_bytes = llm.stats()["ranks"][0]["page_bytes"]
    params = SamplingParams(max_tokens=200, n=2)  # within max_model_len, and too much for a cache of one sequence
    with make_llm(llm.config.model, **SETTINGS, kv_cache_memory_bytes=17 * page_bytes) as small:
        with pytest.raises(ValueError, match=r"the request needs 28 pages .* but the cache has 16"):
            list(small.stream([1] * 40, params))
        with pytest.raises(ValueError, match="the request needs 28 pages"):
            small.generate([1] * 40, params, use_tqdm=False)
        fits, refused = small.generate([PROMPTS[0], [1] * 40], [GREEDY, params], use_tqdm=False)
        assert (len(tokens(fits)), refused.outputs) == (12, [CompletionOutput(0, "", [], "error")])
        assert "but the cache has 16" in str(refused.error)


def test_a_request_id_may_be_chosen_and_must_be_free(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[0], LONG, request_id="mine")
    assert stream.request_id == "mine"
    with pytest.raises(ValueError, match="request_id='mine' is running already; choose another"):
        llm.stream(PROMPTS[0], LONG, request_id="mine")
    stream.close()
    assert list(stream)[-1].outputs[0].finish_reason == "abort"
    assert list(stream) == []
    assert tokens(list(llm.stream(PROMPTS[0], GREEDY, request_id="mine"))[-1])


def test_threads_may_stream_and_generate_at_once(llm: LLM, alone: list[list[int]]) -> None:
    def stream(index: int) -> list[int]:
        return tokens(list(llm.stream(PROMPTS[index % 4], GREEDY))[-1])

    def generate(index: int) -> list[int]:
        return tokens(llm.generate(PROMPTS[index % 4], GREEDY, use_tqdm=False)[0])

    with ThreadPoolExecutor(8) as threads:
        futures = [threads.submit(generate if index % 3 == 0 else stream, index) for index in range(24)]
        assert [future.result(timeout=WAIT_S) for future in futures] == [alone[index % 4] for index in range(24)]


# ---- abort


def test_an_abort_by_id_ends_a_stream_with_the_tokens_so_far(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[0], LONG)
    outputs = []
    for output in stream:
        outputs.append(output)
        if len(outputs) == 2:
            llm.abort(stream.request_id)
            llm.abort(["unknown"])
    last = outputs[-1]
    assert (last.finished, last.error, last.outputs[0].finish_reason) == (True, None, "abort")
    assert 2 <= len(tokens(last)) < 200
    assert last.metrics is not None and last.metrics.num_output_tokens == len(tokens(last))


def test_ctrl_c_in_generate_aborts_what_runs(llm: LLM, alone: list[list[int]]) -> None:
    before = llm.stats()["requests"]["aborted"]

    def press() -> None:
        wait_until(lambda: llm.stats()["requests"]["running"] >= 8, "a full batch")
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press)
    presser.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS * 5, LONG, use_tqdm=False)
    presser.join(WAIT_S)
    wait_until(lambda: is_idle(llm), "the end of the requests")
    assert llm.stats()["requests"]["aborted"] == before + 20
    assert tokens(llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)[0]) == alone[0]


# ---- score


def test_scores_are_transformers_log_probabilities(llm: LLM, path: Path) -> None:
    sequences = [PROMPTS[3], PROMPTS[1]]
    plain = llm.score(sequences)
    whole = llm.score(sequences, whole_vocabulary=True)
    decoded = llm.score(sequences, decode_last_prompt_tokens=3)
    for sequence, *scores in zip(sequences, plain, whole, decoded):
        with torch.inference_mode():
            logits = transformers_model(path)(torch.tensor([sequence])).logits[0, :-1]
        truth = logits.float().log_softmax(-1).numpy()
        own = truth[np.arange(len(sequence) - 1), sequence[1:]]
        for score in scores:
            assert score.token_ids == sequence
            np.testing.assert_allclose(score.token_logprobs, own, atol=1e-3)
        assert scores[0].logprobs is None and scores[2].logprobs is None and scores[1].logprobs is not None
        np.testing.assert_allclose(scores[1].logprobs, truth, atol=1e-3)


@pytest.mark.parametrize("decoded", [0, 3])
@pytest.mark.parametrize("whole", [False, True])
def test_a_score_may_begin_at_any_token(llm: LLM, decoded: int, whole: bool) -> None:
    prompt = [7 * i % 331 for i in range(150)]  # two prefill chunks: the first one has no logits to compute
    (every,) = llm.score(prompt, whole_vocabulary=whole, decode_last_prompt_tokens=decoded)
    for first in (1, 100, 148, 149, 150, 200):
        (score,) = llm.score(prompt, whole_vocabulary=whole, decode_last_prompt_tokens=decoded, first=first)
        np.testing.assert_allclose(score.token_logprobs, every.token_logprobs[first - 1 :], atol=1e-5)
        if every.logprobs is not None and first < 150:
            assert score.logprobs is not None
            np.testing.assert_allclose(score.logprobs, every.logprobs[first - 1 :], atol=1e-5)
    with pytest.raises(ValueError, match="first=0 must be >= 1"):
        llm.score(prompt, first=0)


def test_one_sequence_can_be_scored_up_to_the_whole_context(llm: LLM) -> None:
    (score,) = llm.score([7] * 256)
    assert score.token_logprobs.shape == (255,) and np.isfinite(score.token_logprobs).all()
    assert llm.score([7])[0].token_logprobs.shape == (0,)
    with pytest.raises(ValueError, match="257 tokens are over max_model_len=256"):
        llm.score([7] * 257)
    with pytest.raises(ValueError, match="decode_last_prompt_tokens=4 must be below the prompt's 4 tokens"):
        llm.score([1, 2, 3, 4], decode_last_prompt_tokens=4)


# ---- engines come and go


def test_two_engines_in_one_process_keep_to_themselves(path: Path, llm: LLM, alone: list[list[int]]) -> None:
    with make_llm(path, **SETTINGS, sparse={"method": "quest", "token_budget": 64}) as other:
        with ThreadPoolExecutor(2) as threads:
            found = list(threads.map(lambda own: own.generate(PROMPTS, GREEDY, use_tqdm=False), (llm, other)))
        assert [[tokens(output) for output in outputs] for outputs in found] == [alone, alone]
        assert other.stats()["requests"]["finished"] == 4
    assert tokens(llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)[0]) == alone[0]


def test_after_shutdown_calls_say_so(path: Path) -> None:
    llm = make_llm(path, **SETTINGS)
    stream = llm.stream(PROMPTS[0], LONG)
    assert llm.health()
    llm.shutdown()
    llm.shutdown()
    assert not llm.health()
    with pytest.raises(EngineError, match="the engine has been shut down"):
        list(stream)
    stream.close()
    llm.abort("0")
    for call in (lambda: llm.generate(PROMPTS[0], use_tqdm=False), lambda: llm.stream(PROMPTS[0]), llm.stats):
        with pytest.raises(RuntimeError, match="the engine has been shut down"):
            call()


def engine_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name in ("driver", "outputs")}


def test_an_engine_that_nobody_holds_any_more_leaves_no_thread(path: Path) -> None:
    before = engine_threads()
    llm = make_llm(path, **SETTINGS)
    assert len(engine_threads() - before) == 2
    gone = weakref.ref(llm)
    del llm
    gc.collect()
    assert gone() is None
    wait_until(lambda: engine_threads() <= before, "the end of its threads")


def test_an_engine_lives_as_long_as_its_stream_is_read(path: Path) -> None:
    before = engine_threads()
    stream = make_llm(path, **SETTINGS).stream(PROMPTS[0], GREEDY)
    gc.collect()
    assert len(tokens(list(stream)[-1])) == 12
    del stream
    gc.collect()
    wait_until(lambda: engine_threads() <= before, "the end of its threads")


def test_a_failure_inside_a_shard_is_an_engine_error_for_one_and_an_error_entry_in_a_list(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distributed_sparse.shard.shard import Shard

    with make_llm(path, **SETTINGS) as llm:
        tokens_before = tokens(llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)[0])
        steps = Shard.run

        def broken(self: Shard, plan: Any) -> Any:
            if plan.decode and plan.decode[0].position > 8:
                raise ArithmeticError("boom")
            return steps(self, plan)

        monkeypatch.setattr(Shard, "run", broken)
        outputs = llm.generate([PROMPTS[0], PROMPTS[2]], GREEDY, use_tqdm=False)
        for output in outputs:
            assert "rank 0 (this process) failed in step" in str(output.error) and "boom" in str(output.error)
            assert output.outputs[0].finish_reason == "error"
        assert tokens_before[: len(tokens(outputs[0]))] == tokens(outputs[0]) != []
        with pytest.raises(EngineError, match="ArithmeticError: boom"):
            llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
        with pytest.raises(EngineError, match="ArithmeticError: boom"):
            list(llm.stream(PROMPTS[0], GREEDY))
        with pytest.raises(EngineError, match="ArithmeticError: boom"):
            llm.score(PROMPTS[0])
        assert not llm.health()


def test_a_config_object_makes_the_same_engine(path: Path, alone: list[list[int]]) -> None:
    with LLM.from_config(EngineConfig.from_dict({"model": path, **SETTINGS})) as llm:
        assert tokens(llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)[0]) == alone[0]


# ---- whole processes


@pytest.mark.slow
def test_an_engine_left_without_shutdown_ends_with_its_process(path: Path) -> None:
    done = run_python(
        """
        import sys, threading
        from distributed_sparse import LLM, CompletionOutput, SamplingParams
        llm = LLM(sys.argv[1], max_model_len=256, device="cpu")
        stream = iter(llm.stream([1, 5, 6], SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)))
        next(stream)
        print("left", flush=True)
        """,
        str(path),
    )
    assert (done.returncode, done.stdout) == (0, "left\n"), done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.slow
def test_an_error_in_the_users_program_still_ends_the_process(path: Path) -> None:
    done = run_python(
        """
        import sys
        from distributed_sparse import LLM, CompletionOutput, SamplingParams
        llm = LLM(sys.argv[1], max_model_len=256, device="cpu")
        for output in llm.stream([1, 5, 6], SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)):
            raise SystemExit(3)
        """,
        str(path),
    )
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr


def test_one_rank_runs_where_ray_cannot_be_imported_and_the_import_takes_no_kernel_integrations(
    path: Path, alone: list[list[int]]
) -> None:
    done = run_python(
        """
        import sys
        sys.modules["ray"] = None
        from distributed_sparse import LLM, CompletionOutput, SamplingParams
        assert "transformers" not in sys.modules  # seconds that only an engine has to wait for
        with LLM(sys.argv[1], max_model_len=256, device="cpu") as llm:
            params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
            print(llm.generate([1, 5, 6, 7], params, use_tqdm=False)[0].outputs[0].token_ids)
        """,
        str(path),
    )
    assert (done.returncode, done.stdout) == (0, f"{alone[0]}\n"), done.stderr


def test_bytes_are_no_prompt_and_arrays_are_told_the_remedy(llm: LLM) -> None:
    with pytest.raises(ValueError, match="must be a str, a list of token ids"):
        llm.generate(b"Hello", use_tqdm=False)
    assert "must be a str or a list of token ids" in str(llm.generate([b"Hello"], use_tqdm=False)[0].error)
    with pytest.raises(ValueError, match=r"tolist"):
        llm.score(np.array([1, 2, 3]))
    with pytest.raises(ValueError, match="Python ints"):
        llm.score([np.int64(1), np.int64(2)])


def test_after_shutdown_every_call_raises_engine_error(path: Path) -> None:
    llm = make_llm(path, max_model_len=64)
    llm.shutdown()
    for call in (lambda: llm.generate([[1, 2]], use_tqdm=False), lambda: llm.score([1, 2]), llm.stats):
        with pytest.raises(EngineError):
            call()


def test_many_asynchronous_streams_at_once_take_no_thread_each(llm: LLM) -> None:
    async def read(first: int) -> int:
        count = 0
        params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
        async for output in llm.stream([first, 2], params):
            count = len(output.outputs[0].token_ids)
        return count

    async def read_all() -> list[int]:
        threads = threading.active_count()
        tasks = [asyncio.create_task(read(first)) for first in range(1, 41)]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0.01)
            assert threading.active_count() <= threads
        return [task.result() for task in tasks]

    assert asyncio.run(read_all()) == [20] * 40
