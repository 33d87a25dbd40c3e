"""The pool: of every sort, the same for a seed, and only of requests that answer the same when nothing disturbs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from distributed_sparse.outputs import CompletionOutput, RequestOutput
from distributed_sparse.sampling_params import SamplingParams
from distributed_sparse.tools.chaos.soak_workload import PooledRequest, make_pool, settle


def test_a_pool_has_requests_of_every_sort_and_each_has_one_right_answer() -> None:
    pool = make_pool(60, seed=1, max_model_len=8192, max_num_seqs=4)
    params = [asked.params for asked in pool]
    assert len({len(asked.prompt_token_ids) for asked in pool}) > 3 and len({own.max_tokens for own in params}) > 2
    assert {own.n for own in params} == {1, 2, 3}
    assert any(own.greedy and own.stop_token_ids for own in params) and any(not own.greedy for own in params)
    assert any(own.decode_last_prompt_tokens for own in params)
    assert all(own.seed is not None for own in params)  # a sampled one draws with it, and so do some methods


def test_a_seed_gives_the_same_pool_again() -> None:
    def asked(seed: int) -> list[tuple[Any, ...]]:
        return [(one.prompt_token_ids, one.params) for one in make_pool(6, seed, max_model_len=8192, max_num_seqs=4)]

    assert asked(1) == asked(1) != asked(2)


def test_requests_fit_into_the_engine() -> None:
    for asked in make_pool(30, seed=0, max_model_len=300, max_num_seqs=2):
        assert asked.params.max_tokens is not None and asked.params.n <= 2
        assert len(asked.prompt_token_ids) + asked.params.max_tokens <= 300
    with pytest.raises(ValueError, match="max_model_len=100 is too small for a soak; give 176"):
        make_pool(1, seed=0, max_model_len=100, max_num_seqs=2)


class StandInEngine:
    """Answers prompt [i] with token i, and prompt [0] with the size of the batch's first prompt: as a tie does."""

    def __init__(self, error: str | None = None) -> None:
        self._error = error

    def generate(self, prompts: list[list[int]], params: Sequence[SamplingParams], use_tqdm: bool) -> list[RequestOutput]:
        answers = [prompt[0] or prompts[0][0] for prompt in prompts]
        return [
            RequestOutput("", None, prompt, outputs=[CompletionOutput(0, "", [answer], "length")], error=self._error)
            for prompt, answer in zip(prompts, answers)
        ]


def test_what_answers_otherwise_in_another_batch_is_left_out() -> None:
    pool = [PooledRequest([number], SamplingParams()) for number in (4, 0, 7)]
    settled = settle(StandInEngine(), pool)  # type: ignore[arg-type]
    assert [asked.prompt_token_ids for asked in settled] == [[4], [7]]
    assert [asked.expected[0].token_ids for asked in settled] == [[4], [7]]


def test_an_error_before_anything_is_disturbed_ends_it() -> None:
    with pytest.raises(RuntimeError, match="undisturbed, 1 of 1 requests ended in an error: too long"):
        settle(StandInEngine("too long"), [PooledRequest([1], SamplingParams())])  # type: ignore[arg-type]
