"""LLM(trace=True) shows, for the steps that are asked for, what a method read and what it missed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distributed_sparse import SamplingParams
from distributed_sparse.llm import LLM
from distributed_sparse.trace import TraceStep
from tests.support.checkpoints import tiny_checkpoint
from tests.support.engine import make_llm
from tests.support.prompts import random_tokens

PROMPT = random_tokens(130, seed=1)
QUEST = {"method": "quest", "token_budget": 48, "dense_layers": 1}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("traced"), "llama")


@pytest.fixture(scope="module", params=[1, 2])
def llm(path: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    with make_llm(path, request.param, sparse=QUEST, trace=True, max_num_batched_tokens=100) as llm:
        yield llm


def params(**settings: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, **settings)


def traced(llm: LLM, own: SamplingParams) -> list[TraceStep]:
    (output,) = llm.generate([PROMPT], own, use_tqdm=False)
    assert output.error is None
    return output.outputs[0].trace or []


def test_every_decode_step_is_traced_unless_told_otherwise(llm: LLM) -> None:
    """The first token comes from the prompt's last position, densely: five decode steps give the other five."""
    assert [step.position for step in traced(llm, params())] == [130, 131, 132, 133, 134]


def test_chosen_steps_are_traced_and_no_others(llm: LLM) -> None:
    steps = traced(llm, params(trace_steps=[0, 3, 99]))
    assert [step.position for step in steps] == [130, 133]
    assert traced(llm, params(trace_steps=[])) == []


def test_the_last_tokens_of_a_prompt_are_decode_steps_too(llm: LLM) -> None:
    steps = traced(llm, params(trace_steps=[0, 2, 3], decode_last_prompt_tokens=3))
    assert [step.position for step in steps] == [127, 129, 130]


def test_a_trace_has_every_layer_and_head(llm: LLM) -> None:
    for step in traced(llm, params()):
        n = step.position + 1
        dense, *sparse = step.layers
        assert dense.captured_mass == pytest.approx(np.ones(8)) and (dense.relative_error < 1e-4).all()
        assert dense.num_attended.tolist() == [n] * 4
        for layer in sparse:
            assert layer.captured_mass.shape == layer.relative_error.shape == layer.entropy.shape == (8,)
            assert layer.tokens_for_mass.shape == (8, 4)
            assert layer.num_attended.tolist() == [48 - (-n % 16)] * 4
            assert ((layer.captured_mass > 0) & (layer.captured_mass < 1)).all() and (layer.relative_error > 1e-3).all()
            assert all(n - 1 in of_head and 0 in of_head for of_head in layer.indices)


def test_a_trace_is_the_same_on_two_ranks(path: Path) -> None:
    found = []
    for ranks in (1, 2):
        with make_llm(path, ranks, sparse=QUEST, trace=True) as llm:
            found.append(traced(llm, params(trace_steps=[2])))
    ((one,), (two,)) = found
    for first, second in zip(one.layers, two.layers, strict=True):
        assert second.captured_mass == pytest.approx(first.captured_mass, rel=1e-3)
        assert second.entropy == pytest.approx(first.entropy, rel=1e-3)
        assert [of_head.tolist() for of_head in second.indices] == [of_head.tolist() for of_head in first.indices]


def test_tracing_changes_no_token_and_only_who_is_traced_is_told(path: Path, llm: LLM) -> None:
    own = [params(trace_steps=[]), params(trace_steps=[1]), params(n=2, trace_steps=[0])]
    with make_llm(path, sparse=QUEST) as plain:
        expected = plain.generate([PROMPT] * 3, [params(), params(), params(n=2)], use_tqdm=False)
    outputs = llm.generate([PROMPT] * 3, own, use_tqdm=False)
    assert [[c.token_ids for c in o.outputs] for o in outputs] == [[c.token_ids for c in o.outputs] for o in expected]
    positions = [[[step.position for step in c.trace or []] for c in output.outputs] for output in outputs]
    assert positions == [[[]], [[131]], [[130], [130]]]


def test_scored_tokens_that_are_decoded_are_traced(llm: LLM) -> None:
    (scored,) = llm.score(PROMPT, decode_last_prompt_tokens=4)
    assert [step.position for step in scored.trace] == [126, 127, 128, 129]


def test_steps_cannot_be_chosen_where_nothing_is_traced(path: Path) -> None:
    with make_llm(path) as llm:
        with pytest.raises(ValueError, match=r"trace_steps=\[0\] needs an engine that traces"):
            llm.generate(PROMPT, params(trace_steps=[0]), use_tqdm=False)
        assert llm.generate(PROMPT, params(), use_tqdm=False)[0].outputs[0].trace is None


@pytest.mark.parametrize(
    ("steps", "message"),
    [(3, "trace_steps=3 must be a list of step numbers"), ([-1], "trace_steps: step=-1"), (["a"], "trace_steps: step='a'")],
)
def test_wrong_steps_are_refused(steps: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(trace_steps=steps)


def test_evicted_pages_cannot_be_compared_with(path: Path) -> None:
    sparse = {"method": "window", "token_budget": 48, "evict": True, "dense_layers": 0}
    with pytest.raises(ValueError, match=r"trace=True needs every page.*evict"):
        make_llm(path, sparse=sparse, trace=True)
