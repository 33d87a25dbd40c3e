"""Whatever is raised while one request is worked on ends that request, with its pages free, and no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from distributed_sparse import SamplingParams
from distributed_sparse.client.client import EngineError
from distributed_sparse.driver.detokenizer import Detokenizer
from distributed_sparse.driver.service import DriverService
from distributed_sparse.llm import LLM
from distributed_sparse.outputs import RequestOutput
from distributed_sparse.protocol.client import NewRequest
from tests.support.engine import make_llm
from tests.support.faulty_tokenizer import FaultyTokenizer
from tests.support.text_checkpoint import text_checkpoint

PROMPTS = [[1, 40, 77, 200, 301, 12, 99], [1, 90, 13, 250, 17, 60, 61], [1, 44, 219, 33, 71, 290, 5]]
PARAMS = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


class Panic(BaseException):
    """As what the `tokenizers` library raises where its own code panics: no Exception."""


ERRORS = [
    *(TypeError("an int is needed"), KeyError(7), IndexError("out of range"), AttributeError("no such thing")),
    *(OverflowError("too large"), RecursionError("too deep"), MemoryError("no room"), ValueError("no such token"), Panic("!")),
]

Fault = Callable[[int, BaseException], None]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path: Path = text_checkpoint(tmp_path_factory.mktemp("text"))
    with make_llm(path, max_num_seqs=4, max_model_len=128) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list[RequestOutput]:
    """What the prompts give when nothing goes wrong."""
    return llm.generate(PROMPTS, PARAMS, use_tqdm=False)


@pytest.fixture
def faulty(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Fault:
    """Has the Driver's tokenizer raise an error when it decodes a token."""

    def arm(token_id: int, error: BaseException) -> None:
        detokenizer = driver_of(llm)._admission._detokenizer
        assert isinstance(detokenizer, Detokenizer)
        monkeypatch.setattr(detokenizer, "_tokenizer", FaultyTokenizer(detokenizer._tokenizer, token_id, error))

    return arm


def driver_of(llm: LLM) -> Any:
    service = llm.client.service
    assert isinstance(service, DriverService)
    return service._driver


def assert_others_are_unharmed(llm: LLM, outputs: list[RequestOutput], expected: list[RequestOutput], place: int) -> None:
    for i, output in enumerate(outputs):
        if i != place:
            assert output.error is None
            assert output.outputs[0].text == expected[i].outputs[0].text
            assert output.outputs[0].token_ids == expected[i].outputs[0].token_ids
    stats = llm.stats()
    assert stats["requests"]["running"] == stats["requests"]["waiting"] == 0
    assert stats["pages"]["used"] == stats["pages"]["reserved"] == 0


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_while_a_request_is_admitted_refuses_it_alone(
    llm: LLM, expected: list[RequestOutput], faulty: Fault, error: BaseException
) -> None:
    faulty(PROMPTS[1][-1], error)  # the prompt's last token is decoded at admission
    failed = llm.stats()["requests"]["failed"]
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert outputs[1].finished and str(error) in str(outputs[1].error)
    assert llm.stats()["requests"]["failed"] == failed + 1
    assert_others_are_unharmed(llm, outputs, expected, 1)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_while_a_token_becomes_text_ends_its_request_alone(
    llm: LLM, expected: list[RequestOutput], faulty: Fault, error: BaseException
) -> None:
    own = expected[1].outputs[0].token_ids
    token = next(token for token in own[3:] if token not in own[:3] and not any(token in prompt for prompt in PROMPTS))
    assert all(token not in output.outputs[0].token_ids for output in (expected[0], expected[2]))
    faulty(token, error)
    failed = llm.stats()["requests"]["failed"]
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert f"the engine failed on this request alone: {type(error).__name__}" in str(outputs[1].error)
    (completion,) = outputs[1].outputs
    assert completion.finish_reason == "error"
    assert completion.token_ids == own[: own.index(token)] and expected[1].outputs[0].text.startswith(completion.text)
    assert llm.stats()["requests"]["failed"] == failed + 1
    assert_others_are_unharmed(llm, outputs, expected, 1)
    with pytest.raises(EngineError, match="failed on this request alone"):
        llm.generate(PROMPTS[1], PARAMS, use_tqdm=False)


def test_an_error_in_the_text_of_an_aborted_request_still_answers_it(
    llm: LLM, expected: list[RequestOutput], monkeypatch: pytest.MonkeyPatch
) -> None:
    from distributed_sparse.driver.detokenizer import CompletionText

    def fail(self: CompletionText) -> str | None:
        raise KeyError("no text")

    stream = iter(llm.stream(PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)))
    request_id = next(stream).request_id
    with monkeypatch.context() as patch:
        patch.setattr(CompletionText, "finish", fail)
        llm.abort(request_id)
        with pytest.raises(EngineError, match="KeyError: 'no text'"):
            list(stream)
    assert_others_are_unharmed(llm, llm.generate(PROMPTS, PARAMS, use_tqdm=False), expected, -1)


def test_an_error_while_an_output_is_built_is_that_outputs_alone(
    llm: LLM, expected: list[RequestOutput], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client decodes the tokens of log-probabilities."""
    assert llm._detokenizer is not None
    token = expected[2].outputs[0].token_ids[1]
    assert all(token not in output.outputs[0].token_ids for output in expected[:2])
    own = llm._detokenizer
    monkeypatch.setattr(own, "_tokenizer", FaultyTokenizer(own._tokenizer, token, OverflowError("too large")))
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=0)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert outputs[2].error == "the output cannot be built: OverflowError: too large" and outputs[2].finished
    assert_others_are_unharmed(llm, outputs, expected, 2)


# ---- values that no message carries


def nested(depth: int) -> list[Any]:
    prompt: list[Any] = [1]
    for _ in range(depth):
        prompt = [prompt]
    return [1, prompt]


def test_prompts_that_cannot_even_be_shown_are_refused_alone(llm: LLM, expected: list[RequestOutput]) -> None:
    outputs = llm.generate([PROMPTS[0], nested(5000), PROMPTS[2]], PARAMS, use_tqdm=False)
    assert "RecursionError" in str(outputs[1].error)
    assert_others_are_unharmed(llm, outputs, [expected[0], outputs[1], expected[2]], 1)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seed", 2**64, "seed=18446744073709551616 must be in -1..9223372036854775807"),
        ("seed", "7", "seed='7' must be an integer"),
        ("top_k", 2**70, "top_k=.* must be in -1..2147483647"),
        ("stop_token_ids", [2**70], "token id .* is outside the vocabulary"),
        ("stop_token_ids", 5, "stop_token_ids=5 must be a list"),
        ("logprobs", 2**70, "logprobs=.* is over the vocabulary"),
        ("min_tokens", 2**70, "min_tokens=.* is above max_tokens=12"),
        ("timeout_s", 10**400, "timeout_s=.* must be finite"),
        ("stop", ["a", "\ud800"], "stop: string='\\\\ud800' holds a lone surrogate"),
    ],
)
def test_parameters_that_no_constructor_has_seen_are_refused_alone(
    llm: LLM, expected: list[RequestOutput], name: str, value: Any, message: str
) -> None:
    """By the client, and by the Driver where they come past it."""
    wrong = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    object.__setattr__(wrong, name, value)
    outputs = llm.generate(PROMPTS, [PARAMS, wrong, PARAMS], use_tqdm=False)
    with pytest.raises(ValueError, match=message):
        raise ValueError(outputs[1].error)
    assert_others_are_unharmed(llm, outputs, expected, 1)
    updates = llm.client.submit([NewRequest("wrong", PROMPTS[0], wrong), NewRequest("right", PROMPTS[1], PARAMS)])
    refused = updates.get(timeout=30)
    assert (refused.request_id, refused.error, refused.error_kind) == ("wrong", outputs[1].error, "invalid")
    while not (update := updates.get(timeout=30)).finished:
        pass
    assert update.request_id == "right" and update.error is None


def test_numpy_numbers_become_pythons_own_before_they_are_sent(llm: LLM) -> None:
    params = SamplingParams(max_tokens=np.int64(3), seed=np.int64(5), top_k=np.int32(7), temperature=np.float32(0.5))
    object.__setattr__(params, "seed", np.int64(5))
    request = driver_of(llm)._admission.new_request("client", NewRequest("1", [1, 2], params), 0.0, 0)
    assert {type(getattr(request.params, name)) for name in ("max_tokens", "seed", "top_k")} == {int}
    assert type(request.seed) is int and msgspec.msgpack.encode(request.seed) == msgspec.msgpack.encode(5)


@pytest.mark.parametrize("request_id", ["\ud800", 7, b"id", "", ["id"]])
def test_a_request_id_that_is_no_text_is_refused_before_anything_is_sent(llm: LLM, request_id: Any) -> None:
    with pytest.raises(ValueError, match="request_id="):
        llm.client.submit([NewRequest("fine", PROMPTS[0], PARAMS), NewRequest(request_id, PROMPTS[0], PARAMS)])
    if request_id:
        with pytest.raises(ValueError, match="request_id="):
            llm.stream(PROMPTS[0], PARAMS, request_id=request_id)
    assert len(list(llm.stream(PROMPTS[0], PARAMS, request_id="fine"))) == 12


def test_a_request_id_that_occurs_twice_in_one_call_is_refused(llm: LLM) -> None:
    with pytest.raises(ValueError, match="request_id='one' occurs twice in one call"):
        llm.client.submit([NewRequest("one", PROMPTS[0], PARAMS), NewRequest("one", PROMPTS[1], PARAMS)])
