"""The Driver, one step at a time, over a real shard: what ends a request, what it brings back, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from distributed_sparse.client.output_builder import OutputBuilder, block_arrays
from distributed_sparse.client.tokenizer import tokenizer_json
from distributed_sparse.config import EngineConfig
from distributed_sparse.driver.admission import derived_seed
from distributed_sparse.driver.detokenizer import Detokenizer
from distributed_sparse.driver.driver import Driver
from distributed_sparse.outputs import CompletionOutput, RequestOutput
from distributed_sparse.protocol.client import ModelInfo, NewRequest, RequestUpdate
from distributed_sparse.protocol.step import StepPlan
from distributed_sparse.ranks.base import ShardFailure
from distributed_sparse.ranks.in_process import InProcessGroup
from distributed_sparse.sampling_params import SamplingParams
from tests.support.checkpoints import transformers_model
from tests.support.text_checkpoint import byte_level_bos_tokenizer, text_checkpoint

MAX_MODEL_LEN = 96
PROMPT = [1, 40, 77, 200, 301, 12, 99, 310, 45, 46, 150, 7, 8, 219, 33, 71, 290, 5, 111]  # 19 tokens: two pages
OTHER = [1, 90, 13, 250, 17, 60, 61]

JSON = tokenizer_json(byte_level_bos_tokenizer())
DETOKENIZER = Detokenizer(JSON)


class Engine:
    """A Driver over a shard in this process; its updates become outputs as they do in a client."""

    def __init__(self, path: Path, eos: tuple[int, ...] = (), tokenizer: str | None = JSON, **engine_args: Any) -> None:
        args: dict[str, Any] = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": 8, "device": "cpu"}
        config = EngineConfig.from_dict({"model": str(path), **args, **engine_args})
        info = ModelInfo(331, num_layers=3, num_kv_heads=4, eos_token_ids=eos, max_model_len=MAX_MODEL_LEN)
        self.group = InProcessGroup(config)
        self.driver = Driver(config, info, tokenizer, self.group)
        self.driver.group.start()
        self.driver.resume()
        self.updates: dict[str, list[RequestUpdate]] = {}
        self.builders: dict[str, OutputBuilder] = {}
        self._numbers = itertools.count()

    def add(self, prompt: list[int], score: bool = False, client_id: str = "c", **params: Any) -> str:
        """Queue a request; its id."""
        request_id, sampling = f"r{next(self._numbers)}", SamplingParams(**params)
        self.updates[request_id] = []
        self.builders[request_id] = OutputBuilder(request_id, None, prompt, sampling, DETOKENIZER.decode_token)
        refused = self.driver.add_request(client_id, NewRequest(request_id, prompt, sampling, score))
        self._take([refused] if refused is not None else [])
        return request_id

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.expire()
            for updates in self.driver.step().values():
                self._take(updates)

    def expire(self) -> None:
        for updates in self.driver.expire().values():
            self._take(updates)

    def finish(self) -> None:
        for _ in range(1000):
            if not self.driver.has_work:
                return
            self.step()
        raise AssertionError("work is left that never ends")

    def recover(self) -> None:
        """The shard fails in a step, and is made anew."""
        shard = self.group._shard
        assert shard is not None
        shard.begin = None  # type: ignore[assignment, method-assign]
        with pytest.raises(ShardFailure):
            self.driver.step()
        self.group.rebuild()
        for updates in self.driver.resume().values():
            self._take(updates)

    def abort(self, *request_ids: str) -> None:
        self._take(self.driver.abort(list(request_ids)))

    def run(self, prompt: list[int], **params: Any) -> RequestOutput:
        """One request, alone, to its end."""
        request_id = self.add(prompt, **params)
        self.finish()
        return self.output(request_id)

    def one(self, prompt: list[int], **params: Any) -> CompletionOutput:
        (completion,) = self.run(prompt, **params).outputs
        return completion

    def output(self, request_id: str) -> RequestOutput:
        return self.builders[request_id].output

    def _take(self, updates: list[RequestUpdate]) -> None:
        for update in updates:
            assert not self.output(update.request_id).finished, "an update came after the last one"
            self.updates[update.request_id].append(update)
            self.builders[update.request_id].add(update)

    @property
    def pages(self) -> tuple[int, int]:
        return self.driver.allocator.used, self.driver.allocator.reserved


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_checkpoint(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def shared(path: Path) -> Engine:
    return Engine(path)


@pytest.fixture
def engine(shared: Engine) -> Iterator[Engine]:
    """One engine for all tests that need no setting of their own; each must leave it empty."""
    yield shared
    assert shared.pages == (0, 0)
    assert not shared.driver.has_work


@pytest.fixture(scope="module")
def alone(shared: Engine) -> list[int]:
    """What PROMPT is greedily continued with, alone."""
    return shared.one(PROMPT, temperature=0, max_tokens=40).token_ids


def first_seen_late(tokens: list[int], earliest: int) -> int:
    """An index at `earliest` or later whose token has not occurred before it."""
    return next(i for i in range(earliest, len(tokens)) if tokens[i] not in tokens[:i])


# ---- what ends a sequence


def test_max_tokens_ends_a_sequence_and_says_length(engine: Engine, alone: list[int]) -> None:
    completion = engine.one(PROMPT, temperature=0, max_tokens=7)
    assert (completion.token_ids, completion.finish_reason, completion.stop_reason) == (alone[:7], "length", None)


def test_without_max_tokens_the_context_is_filled_to_its_end(engine: Engine, alone: list[int]) -> None:
    completion = engine.one(PROMPT, temperature=0, max_tokens=None)
    assert len(completion.token_ids) == MAX_MODEL_LEN - len(PROMPT)
    assert completion.token_ids[:40] == alone
    assert completion.finish_reason == "length"


def test_a_stop_token_ends_a_sequence_and_is_its_last_token(engine: Engine, alone: list[int]) -> None:
    place = first_seen_late(alone, 5)
    completion = engine.one(PROMPT, temperature=0, max_tokens=40, stop_token_ids=[0, alone[place]])
    assert completion.token_ids == alone[: place + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", alone[place])


def test_the_text_of_a_stop_token_is_left_out_unless_it_is_asked_for(engine: Engine, alone: list[int]) -> None:
    place = first_seen_late(alone, 5)
    short = engine.one(PROMPT, temperature=0, max_tokens=place).text
    long = engine.one(PROMPT, temperature=0, max_tokens=place + 1).text
    assert len(long) > len(short)
    params: dict[str, Any] = {"temperature": 0, "max_tokens": 40, "stop_token_ids": [alone[place]]}
    assert engine.one(PROMPT, **params).text == short
    assert engine.one(PROMPT, **params, include_stop_str_in_output=True).text == long


def test_every_eos_token_ends_a_sequence_unless_eos_is_ignored(path: Path, alone: list[int]) -> None:
    early, late = first_seen_late(alone, 4), first_seen_late(alone, 9)
    for eos, place in (((alone[late], alone[early]), early), ((alone[late], 0), late)):
        engine = Engine(path, eos=eos)
        completion = engine.one(PROMPT, temperature=0, max_tokens=40)
        assert completion.token_ids == alone[: place + 1]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
        assert engine.one(PROMPT, temperature=0, max_tokens=40, ignore_eos=True).token_ids == alone
        # a token that the caller names stops even where it is an EOS that is ignored
        named = engine.one(PROMPT, temperature=0, max_tokens=40, ignore_eos=True, stop_token_ids=[eos[0]])
        assert (named.finish_reason, named.stop_reason) == ("stop", eos[0])


def test_before_min_tokens_no_end_is_sampled_and_right_behind_it_one_is(path: Path, alone: list[int]) -> None:
    place = first_seen_late(alone, 6)
    engine = Engine(path, eos=(alone[place],))
    for min_tokens in (0, 1, place):  # tokens before the end: as many as were asked for
        assert engine.one(PROMPT, temperature=0, max_tokens=40, min_tokens=min_tokens).token_ids == alone[: place + 1]
    for min_tokens in (place + 1, place + 5):
        tokens = engine.one(PROMPT, temperature=0, max_tokens=40, min_tokens=min_tokens).token_ids
        assert len(tokens) > min_tokens
        assert tokens[:place] == alone[:place]
        assert alone[place] not in tokens[:min_tokens]
    tokens = engine.one(PROMPT, temperature=0, max_tokens=20, min_tokens=20, stop_token_ids=[alone[0]]).token_ids
    assert len(tokens) == 20 and alone[0] not in tokens


def stop_string_in(engine: Engine) -> tuple[str, str]:
    """(the greedy text, a string of it that begins and ends within tokens and occurs nowhere before)."""
    text = engine.one(PROMPT, temperature=0, max_tokens=40).text
    for start in range(8, len(text) - 3):
        string = text[start : start + 3]
        if text.find(string) == start and "\N{REPLACEMENT CHARACTER}" not in string:
            return text, string
    raise AssertionError(f"no string to stop at in {text!r}")


def test_a_stop_string_ends_the_text_before_it(engine: Engine, alone: list[int]) -> None:
    text, string = stop_string_in(engine)
    completion = engine.one(PROMPT, temperature=0, max_tokens=40, stop=["not in it", string])
    assert completion.text == text[: text.index(string)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", string)
    assert completion.token_ids == alone[: len(completion.token_ids)]
    assert len(completion.token_ids) < 40


def test_a_stop_string_is_kept_where_the_request_says_so(engine: Engine) -> None:
    text, string = stop_string_in(engine)
    completion = engine.one(PROMPT, temperature=0, max_tokens=40, stop=string, include_stop_str_in_output=True)
    assert completion.text == text[: text.index(string) + len(string)]
    assert completion.stop_reason == string


def test_a_stop_string_within_min_tokens_does_not_count(engine: Engine) -> None:
    text, string = stop_string_in(engine)
    completion = engine.one(PROMPT, temperature=0, max_tokens=40, min_tokens=40, stop=string)
    assert (completion.text, completion.finish_reason) == (text, "length")


def special_at(engine: Engine, monkeypatch: pytest.MonkeyPatch, token: int) -> str:
    """Make a token of the vocabulary a special one, which the text leaves out; its name."""
    raw = json.loads(JSON)
    name = next(name for name, token_id in raw["model"]["vocab"].items() if token_id == token)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    raw["added_tokens"].append({"id": token, "content": name, "special": True, **flags})
    monkeypatch.setattr(engine.driver._admission, "_detokenizer", Detokenizer(json.dumps(raw)))
    return name


def test_a_stop_string_that_is_a_special_token_stops_at_it(
    engine: Engine, alone: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = first_seen_late(alone, 5)
    name = special_at(engine, monkeypatch, alone[place])
    params: dict[str, Any] = {"temperature": 0, "max_tokens": 40, "stop": ["not in it", name]}
    text = engine.one(PROMPT, temperature=0, max_tokens=place).text
    for include in (False, True):
        completion = engine.one(PROMPT, **params, include_stop_str_in_output=include)
        assert completion.token_ids == alone[: place + 1]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", name)
        assert completion.text == text + (name if include else "")
    assert engine.one(PROMPT, **params, min_tokens=place + 1).token_ids[: place + 2] == alone[: place + 2]
    assert [c.stop_reason for c in engine.run(PROMPT, **params, n=3).outputs] == [name] * 3


def test_a_stop_string_that_is_the_end_of_sequence_is_the_reason(
    engine: Engine, alone: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = first_seen_late(alone, 5)
    name = special_at(engine, monkeypatch, alone[place])
    monkeypatch.setattr(engine.driver, "model", msgspec.structs.replace(engine.driver.model, eos_token_ids=(alone[place],)))
    reasons = [
        engine.one(PROMPT, temperature=0, max_tokens=40, **stops).stop_reason
        for stops in ({}, {"stop": name}, {"stop": name, "stop_token_ids": [alone[place]]})
    ]
    assert reasons == [None, name, alone[place]]


@pytest.mark.parametrize("stop", [False, True])
def test_the_published_pieces_join_to_the_text_and_never_show_a_part_of_the_stop_string(engine: Engine, stop: bool) -> None:
    text, string = stop_string_in(engine)
    request_id = engine.add(PROMPT, temperature=0, max_tokens=40, stop=[string] if stop else [])
    engine.finish()
    wanted = text[: text.index(string)] if stop else text
    samples = [sample for update in engine.updates[request_id] for sample in update.samples]
    assert "".join(sample.text for sample in samples) == wanted
    assert [token for sample in samples for token in sample.token_ids] == engine.output(request_id).outputs[0].token_ids
    shown = ""
    for sample in samples:
        shown += sample.text
        assert wanted.startswith(shown)
    assert [update.finished for update in engine.updates[request_id]] == [False] * (len(samples) - 1) + [True]


def test_one_update_comes_with_each_token(engine: Engine) -> None:
    request_id = engine.add(PROMPT, temperature=0, max_tokens=5)
    engine.step(3)
    assert [len(update.samples[0].token_ids) for update in engine.updates[request_id]] == [1, 1, 1]
    engine.finish()


# ---- several samples


def test_greedy_samples_are_all_the_same_and_equal_the_request_alone(engine: Engine, alone: list[int]) -> None:
    output = engine.run(PROMPT, temperature=0, max_tokens=40, n=3)
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    assert [completion.token_ids for completion in output.outputs] == [alone] * 3
    assert len({completion.text for completion in output.outputs}) == 1


def test_samples_of_one_request_differ_and_are_the_same_again_with_its_seed(engine: Engine) -> None:
    params: dict[str, Any] = {"temperature": 1.5, "max_tokens": 30, "seed": 11}
    first = [completion.token_ids for completion in engine.run(PROMPT, n=4, **params).outputs]
    assert len({tuple(tokens) for tokens in first}) == 4
    engine.add(OTHER, max_tokens=40)  # company changes nothing
    assert [completion.token_ids for completion in engine.run(PROMPT, n=4, **params).outputs] == first
    assert engine.one(PROMPT, **params).token_ids == first[0]
    assert engine.run(PROMPT, n=2, **params).outputs[1].token_ids == first[1]


def test_samples_end_one_by_one_and_a_fork_keeps_its_tokens(engine: Engine) -> None:
    params: dict[str, Any] = {"temperature": 1.5, "max_tokens": 30, "seed": 11, "n": 4}
    whole = [completion.token_ids for completion in engine.run(PROMPT, **params).outputs]
    stops = sorted({tokens[0] for tokens in whole[:1]} | {tokens[7] for tokens in whole[1:2]})
    output = engine.run(PROMPT, **params, stop_token_ids=stops)
    for tokens, completion in zip(whole, output.outputs):
        ends = [i for i, token in enumerate(tokens) if token in stops]
        assert completion.token_ids == (tokens[: ends[0] + 1] if ends else tokens)
        assert completion.finish_reason == ("stop" if ends else "length")
    assert len(output.outputs[0].token_ids) == 1 and len(output.outputs[1].token_ids) <= 8


# ---- log-probabilities


def true_logprobs(path: Path, tokens: list[int]) -> np.ndarray:
    """float32 [len(tokens) - 1, vocab] of transformers: entry i is that of token i + 1."""
    with torch.inference_mode():
        logits = transformers_model(path)(torch.tensor([tokens])).logits[0, :-1]
    return logits.float().log_softmax(-1).numpy()


def assert_row(row: dict[int, Any], token: int, truth: np.ndarray, num_best: int) -> None:
    """`row` has the token itself, first, and the best ones in order, with transformers' values and ranks."""
    assert next(iter(row)) == token
    assert row[token].logprob == pytest.approx(truth[token], abs=1e-3)
    assert abs(row[token].rank - 1 - int((truth > truth[token]).sum())) <= int((np.abs(truth - truth[token]) < 2e-3).sum()) - 1
    best = np.argsort(-truth, kind="stable")[:num_best].tolist()
    assert len(row) == (num_best if token in best else num_best + 1)
    values = [row[other].logprob for other in best]
    np.testing.assert_allclose(values, truth[best], atol=1e-3)
    assert [row[other].rank for other in best] == list(range(1, num_best + 1))
    assert all(entry.decoded_token == DETOKENIZER.decode_token(other) for other, entry in row.items())


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_logprobs_are_those_of_the_raw_logits_whatever_the_temperature(engine: Engine, path: Path, temperature: float) -> None:
    completion = engine.one(PROMPT, temperature=temperature, top_k=40, max_tokens=12, logprobs=3, seed=5)
    truth = true_logprobs(path, PROMPT + completion.token_ids)[len(PROMPT) - 1 :]
    assert completion.logprobs is not None and len(completion.logprobs) == 12
    for row, token, values in zip(completion.logprobs, completion.token_ids, truth):
        assert_row(row, token, values, 3)
    assert completion.cumulative_logprob == pytest.approx(
        sum(row[token].logprob for row, token in zip(completion.logprobs, completion.token_ids))
    )


def test_logprobs_zero_gives_the_sampled_token_alone_and_none_gives_nothing(engine: Engine) -> None:
    completion = engine.one(PROMPT, max_tokens=4, logprobs=0)
    assert completion.logprobs is not None
    assert [list(row) for row in completion.logprobs] == [[token] for token in completion.token_ids]
    completion = engine.one(PROMPT, max_tokens=4)
    assert (completion.logprobs, completion.cumulative_logprob) == (None, None)


def test_each_sample_has_its_own_logprobs(engine: Engine, path: Path) -> None:
    for completion in engine.run(PROMPT, temperature=1.5, n=3, max_tokens=6, logprobs=2, seed=3).outputs:
        truth = true_logprobs(path, PROMPT + completion.token_ids)[len(PROMPT) - 1 :]
        assert completion.logprobs is not None
        for row, token, values in zip(completion.logprobs, completion.token_ids, truth):
            assert_row(row, token, values, 2)


def test_a_prompt_that_is_scored_in_the_same_step_does_not_take_anothers_logprobs(engine: Engine, path: Path) -> None:
    scored = engine.add(OTHER, score=True, prompt_logprobs=0)
    ids = [engine.add(PROMPT, temperature=0, max_tokens=3, logprobs=2), engine.add(OTHER, temperature=0, max_tokens=3)]
    engine.finish()
    assert engine.output(scored).finished
    (completion,) = engine.output(ids[0]).outputs
    truth = true_logprobs(path, PROMPT + completion.token_ids)[len(PROMPT) - 1 :]
    assert completion.logprobs is not None and len(completion.logprobs) == 3
    for row, token, values in zip(completion.logprobs, completion.token_ids, truth):
        assert_row(row, token, values, 2)


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 8}])
@pytest.mark.parametrize("decoded", [0, 1, 7])
def test_prompt_logprobs_are_the_same_however_the_prompt_is_cut(path: Path, settings: dict[str, Any], decoded: int) -> None:
    engine = Engine(path, **settings)
    engine.add(OTHER, max_tokens=20)  # makes chunks odd
    output = engine.run(PROMPT, max_tokens=2, prompt_logprobs=3, decode_last_prompt_tokens=decoded)
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(PROMPT)
    assert output.prompt_logprobs[0] is None
    for row, token, values in zip(output.prompt_logprobs[1:], PROMPT[1:], true_logprobs(path, PROMPT)):
        assert row is not None
        assert_row(row, token, values, 3)


def test_prompt_logprobs_of_the_whole_vocabulary(engine: Engine, path: Path) -> None:
    output = engine.run(OTHER, max_tokens=1, prompt_logprobs=-1)
    assert output.prompt_logprobs is not None
    for row, token, values in zip(output.prompt_logprobs[1:], OTHER[1:], true_logprobs(path, OTHER)):
        assert row is not None and len(row) == 331
        assert_row(row, token, values, 331)


# ---- the prompt's last tokens, and scores


@pytest.mark.parametrize("decoded", [1, 3, len(PROMPT) - 1])
def test_with_dense_attention_it_makes_no_difference_how_the_prompts_end_is_read(
    engine: Engine, alone: list[int], decoded: int
) -> None:
    output = engine.run(PROMPT, temperature=0, max_tokens=40, decode_last_prompt_tokens=decoded, n=2)
    assert [completion.token_ids for completion in output.outputs] == [alone] * 2
    assert output.metrics is not None and output.metrics.num_prompt_tokens == len(PROMPT)


def scores_of(engine: Engine, request_id: str) -> tuple[list[int], np.ndarray]:
    """(positions, log-probabilities [rows, width]) that a scored request has brought."""
    blocks = [block for update in engine.updates[request_id] for block in update.prompt_logprobs]
    positions = [position for block in blocks for position in range(block.position, block.position + block.rows)]
    return positions, np.concatenate([block_arrays(block)[1] for block in blocks])


@pytest.mark.parametrize("decoded", [0, 4])
def test_a_score_has_every_position_once_and_samples_nothing(engine: Engine, path: Path, decoded: int) -> None:
    request_id = engine.add(PROMPT, score=True, prompt_logprobs=-1, decode_last_prompt_tokens=decoded)
    engine.finish()
    positions, values = scores_of(engine, request_id)
    assert positions == list(range(1, len(PROMPT)))
    np.testing.assert_allclose(values, true_logprobs(path, PROMPT), atol=1e-3)
    assert all(not update.samples for update in engine.updates[request_id])
    assert engine.updates[request_id][-1].finished and engine.updates[request_id][-1].error is None


def test_a_prompt_of_the_whole_context_can_be_scored(engine: Engine) -> None:
    request_id = engine.add([5] * MAX_MODEL_LEN, score=True, prompt_logprobs=0)
    engine.finish()
    assert scores_of(engine, request_id)[0] == list(range(1, MAX_MODEL_LEN))


# ---- after a recovery


@pytest.mark.parametrize("failures", [(2,), (4, 5), (1, 9, 12)])
def test_after_a_recovery_text_stop_strings_and_logprobs_go_on_as_if_nothing_had_been(
    engine: Engine, path: Path, failures: tuple[int, ...]
) -> None:
    _, string = stop_string_in(engine)
    requests: list[tuple[list[int], dict[str, Any]]] = [
        (PROMPT, {"temperature": 0, "max_tokens": 40, "stop": [string], "logprobs": 2}),
        (OTHER, {"temperature": 1.5, "max_tokens": 14, "n": 3, "seed": 11, "logprobs": 1, "prompt_logprobs": 2}),
        (PROMPT, {"temperature": 0, "max_tokens": 9, "decode_last_prompt_tokens": 7, "prompt_logprobs": 0}),
    ]
    undisturbed = [engine.run(prompt, **params) for prompt, params in requests]
    failing = Engine(path, max_num_batched_tokens=16)
    ids = [failing.add(prompt, **params) for prompt, params in requests]
    for step in range(max(failures) + 1):
        failing.step()
        if step in failures:
            failing.recover()
    failing.finish()
    for request_id, whole in zip(ids, undisturbed):
        output = failing.output(request_id)
        for again, before in zip(output.outputs, whole.outputs, strict=True):
            assert (again.token_ids, again.text) == (before.token_ids, before.text)
            assert (again.finish_reason, again.stop_reason) == (before.finish_reason, before.stop_reason)
            assert_equal_rows(again.logprobs, before.logprobs)
        assert_equal_rows(output.prompt_logprobs, whole.prompt_logprobs)
        assert output.metrics is not None and output.metrics.num_replayed_tokens > 0
    assert failing.pages == (0, 0)


def assert_equal_rows(again: Any, before: Any) -> None:
    """Of log-probabilities: lists of dicts, or of None, or None."""
    assert (again is None) == (before is None)
    for row, other in zip(again or [], before or [], strict=True):
        assert (row is None) == (other is None)
        assert list(row or {}) == list(other or {})
        for token, entry in (row or {}).items():
            assert other is not None and entry.logprob == pytest.approx(other[token].logprob, abs=1e-4)


# ---- time, abort, refusal


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The Driver's clock, which stands still until a test turns it."""
    clock = SimpleNamespace(now=100.0)
    fake = SimpleNamespace(monotonic=lambda: clock.now, thread_time=time.thread_time)
    monkeypatch.setattr("distributed_sparse.driver.driver.time", fake)
    return clock


def test_a_request_past_its_time_ends_with_an_error_and_the_tokens_so_far(
    engine: Engine, clock: SimpleNamespace, alone: list[int]
) -> None:
    late = engine.add(PROMPT, temperature=0, max_tokens=40, timeout_s=5)
    other = engine.add(PROMPT, temperature=0, max_tokens=40)
    engine.step(3)
    clock.now += 4.9
    engine.step(1)
    assert not engine.output(late).finished
    clock.now += 0.2
    engine.step()
    output = engine.output(late)
    assert output.error == "timeout_s=5.0 has passed; raise it, or expect fewer tokens"
    assert engine.updates[late][-1].error_kind == "timeout"
    assert output.outputs[0].token_ids == alone[:4]
    engine.finish()
    assert engine.output(other).outputs[0].token_ids == alone


def test_a_request_can_run_out_of_time_while_it_waits(path: Path, clock: SimpleNamespace) -> None:
    engine = Engine(path, max_num_seqs=1)
    running = engine.add(PROMPT, temperature=0, max_tokens=10)
    waiting = engine.add(PROMPT, temperature=0, max_tokens=10, timeout_s=1)
    engine.step(2)
    clock.now += 2
    engine.step()
    assert engine.output(waiting).finished and "timeout_s=1.0 has passed" in str(engine.output(waiting).error)
    assert not engine.output(running).finished
    engine.finish()
    assert engine.pages == (0, 0)


@pytest.mark.parametrize(
    ("steps", "state"), [(0, "waiting"), (1, "in prefill"), (3, "just sampled"), (4, "decoding"), (9, "decoding")]
)
@pytest.mark.parametrize("n", [1, 3])
def test_an_aborted_request_ends_at_once_and_its_pages_are_free(path: Path, steps: int, state: str, n: int) -> None:
    engine = Engine(path, max_num_batched_tokens=8)
    request_id = engine.add(PROMPT, temperature=0, max_tokens=30, n=n)
    engine.step(steps)
    engine.abort(request_id)
    output = engine.output(request_id)
    assert output.finished and output.error is None
    assert [completion.finish_reason for completion in output.outputs] == ["abort"] * n
    assert {len(completion.token_ids) for completion in output.outputs} == {max(0, steps - 2)}, state
    assert engine.pages == (0, 0)
    assert not engine.driver.has_work
    assert engine.driver.stats()["requests"] == {"running": 0, "waiting": 0, "finished": 0, "aborted": 1, "failed": 0}


def test_an_abort_leaves_the_others_their_tokens(engine: Engine, alone: list[int]) -> None:
    kept = engine.add(PROMPT, temperature=0, max_tokens=40)
    aborted = engine.add(OTHER, temperature=1, max_tokens=40, n=3)
    engine.step(1)
    engine.abort(aborted)
    later = engine.add(PROMPT, temperature=0, max_tokens=40, n=2)  # takes the pages that became free
    engine.step(4)
    engine.abort("unknown", aborted)
    engine.finish()
    assert engine.output(kept).outputs[0].token_ids == alone
    assert [completion.token_ids for completion in engine.output(later).outputs] == [alone] * 2


def test_an_abort_keeps_the_reason_of_a_sample_that_had_ended(engine: Engine) -> None:
    params: dict[str, Any] = {"temperature": 1.5, "max_tokens": 30, "seed": 11, "n": 2}
    whole = engine.run(PROMPT, **params).outputs
    request_id = engine.add(PROMPT, **params, stop_token_ids=[whole[0].token_ids[0]])
    engine.step(1)
    if whole[0].token_ids[0] == whole[1].token_ids[0]:
        pytest.fail("both samples begin with the same token; choose another seed")
    engine.abort(request_id)
    assert [completion.finish_reason for completion in engine.output(request_id).outputs] == ["stop", "abort"]


def test_a_request_that_needs_more_pages_than_there_are_is_refused_alone(path: Path) -> None:
    engine = Engine(path)
    page_bytes = engine.group.ranks[0].page_bytes
    engine = Engine(path, kv_cache_memory_bytes=7 * page_bytes)  # one sequence of 96 tokens, and the null page
    good = engine.add(PROMPT, max_tokens=5)
    bad = engine.add(PROMPT, max_tokens=70, n=2)
    assert engine.updates[bad][0].error_kind == "invalid"
    assert "the request needs 11 pages of 16 tokens" in str(engine.output(bad).error)
    assert "the cache has 6" in str(engine.output(bad).error)
    engine.finish()
    assert len(engine.output(good).outputs[0].token_ids) == 5
    assert len(engine.one(PROMPT, max_tokens=None).token_ids) == MAX_MODEL_LEN - len(PROMPT)


def test_the_driver_checks_again_what_a_client_sends(engine: Engine) -> None:
    wrong: list[tuple[list[int], dict[str, Any]]] = [([], {}), ([331], {}), ([5], {"max_tokens": 256}), ([5], {"n": 9})]
    for prompt, params in wrong:
        request_id = engine.add(prompt, **params)
        (update,) = engine.updates[request_id]
        assert update.finished and update.error_kind == "invalid"


def test_a_request_id_that_runs_is_refused_and_can_be_used_again_afterwards(engine: Engine) -> None:
    driver, params = engine.driver, SamplingParams(max_tokens=3)
    engine.builders["same"] = OutputBuilder("same", None, OTHER, params, None)
    engine.updates["same"] = []
    assert driver.add_request("c", NewRequest("same", OTHER, params)) is None
    refused = driver.add_request("d", NewRequest("same", OTHER, params))
    assert refused is not None and "request_id='same' is running already" in str(refused.error)
    engine.finish()
    assert engine.output("same").finished
    assert driver.add_request("c", NewRequest("same", OTHER, params)) is None
    driver.abort(["same"])


def test_updates_go_to_the_client_that_asked(engine: Engine) -> None:
    ids = {client: engine.add(OTHER, client_id=client, max_tokens=3) for client in ("a", "b")}
    updates = engine.driver.step()
    assert {client: [update.request_id for update in updates[client]] for client in updates} == {
        "a": [ids["a"]],
        "b": [ids["b"]],
    }
    assert engine.driver.owned_by("a") == [ids["a"]]
    engine.driver.abort(list(ids.values()))


# ---- randomness


def test_requests_without_a_seed_differ_and_a_second_engine_repeats_them(path: Path) -> None:
    def draw(seed: int) -> list[list[int]]:
        engine = Engine(path, seed=seed)
        ids = [engine.add(PROMPT, temperature=1.0, max_tokens=12) for _ in range(4)]
        engine.finish()
        return [engine.output(request_id).outputs[0].token_ids for request_id in ids]

    first = draw(0)
    assert len({tuple(tokens) for tokens in first}) == 4
    assert draw(0) == first
    assert all(other not in first for other in draw(1))


def test_a_requests_own_seed_does_not_depend_on_when_it_comes(engine: Engine) -> None:
    params: dict[str, Any] = {"temperature": 1.0, "max_tokens": 12, "seed": 9}
    first = engine.one(PROMPT, **params).token_ids
    engine.add(OTHER, max_tokens=9)
    engine.step(2)
    assert engine.one(PROMPT, **params).token_ids == first
    assert engine.one(PROMPT, **params | {"seed": 10}).token_ids != first


def test_derived_seeds_are_distinct_and_fit_an_int64() -> None:
    seeds = [derived_seed(engine_seed, arrival) for engine_seed in range(4) for arrival in range(2000)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # the last bits differ too: a counter's low word is all that some generators look at
    assert len({seed & 0xFFFFFFFF for seed in seeds}) > len(seeds) - 10


# ---- what is told


def test_metrics_follow_the_clock_of_a_request(path: Path, clock: SimpleNamespace) -> None:
    engine = Engine(path, max_num_batched_tokens=10)
    request_id = engine.add(PROMPT, temperature=0, max_tokens=3, n=2)
    while engine.driver.has_work:
        clock.now += 1
        engine.step()
    metrics = engine.output(request_id).metrics
    assert metrics is not None
    assert dataclasses.asdict(metrics) == {
        "arrival_time": 100.0,
        "first_scheduled_time": 101.0,
        "first_token_time": 102.0,  # 19 tokens in two chunks
        "finished_time": 104.0,
        "num_prompt_tokens": 19,
        "num_output_tokens": 3,
        "num_replayed_tokens": 0,
    }
    assert (metrics.queue_time, metrics.ttft, metrics.latency, metrics.tpot) == (1.0, 2.0, 4.0, 1.0)


@pytest.mark.parametrize("interval", [None, 3])
def test_profile_steps_are_those_of_the_interval_and_of_requests_that_ask(path: Path, interval: int | None) -> None:
    engine = Engine(path, profile_interval=interval)
    plans: list[StepPlan] = []
    send = engine.group.send

    def noted(plan: StepPlan) -> None:
        plans.append(plan)
        send(plan)

    engine.group.send = noted  # type: ignore[method-assign]
    engine.add(PROMPT, temperature=0, max_tokens=16)
    engine.step(2)
    engine.driver.add_request("c", NewRequest("asks", OTHER, SamplingParams(temperature=0, max_tokens=4), profile=True))
    for _ in range(20):
        engine.driver.step()
    asked = [3, 4, 5]  # step 2 reads its prompt
    assert [plan.step for plan in plans if plan.profile] == asked + ([8, 11, 14] if interval else [])
    assert all(plan.report == plan.profile for plan in plans)


def test_stats_count_requests_pages_and_steps(path: Path) -> None:
    engine = Engine(path, max_num_seqs=2)
    engine.add(PROMPT, temperature=0, max_tokens=2)
    running = engine.add(PROMPT, temperature=0, max_tokens=20)
    waiting = engine.add(PROMPT, temperature=0, max_tokens=20, n=2)
    engine.add([], max_tokens=2)
    engine.step(3)
    engine.driver.check(report=True)
    stats = engine.driver.stats()
    assert stats["requests"] == {"running": 1, "waiting": 1, "finished": 1, "aborted": 0, "failed": 1}
    assert stats["pages"] == {"total": engine.driver.allocator.total, "used": 2, "reserved": 3}
    assert (stats["steps"], stats["generation"]) == (3, 0)
    assert stats["ranks"][0]["kv_heads"] == (0, 4)
    # 3 steps of which 2 were decode steps: 3 rows and 4 KV heads in 3 layers, each dense
    assert (stats["attention"]["rows_dense"], stats["attention"]["rows_sparse"]) == (3 * 4 * 3, 0)
    assert stats["attention"]["density"] == [[1.0] * 4] * 3
    assert stats["attention"]["bytes_read"] == sum(stats["attention"]["bytes_read_of_ranks"]) > 0
    engine.abort(running, waiting)
    assert engine.driver.stats()["requests"]["aborted"] == 2
