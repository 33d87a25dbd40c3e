"""LLM(trace=True) shows, for the steps that are asked for, what a method read and what it missed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distributed_sparse import SamplingParams
from distributed_sparse.llm import LLM
from distributed_sparse.trace import TraceStep
from tests.support.checkpoints import tiny_checkpoint
from tests.support.eager_methods import quantile
from tests.support.engine import make_llm
from tests.support.prompts import random_tokens

PROMPT = random_tokens(130, seed=1)
QUEST = {"method": "quest", "token_budget": 48, "recent_pages": 1, "dense_layers": 1}
TWILIGHT = {"method": "twilight", "p": 0.8, "candidate_fraction": 0.5, "min_candidates": 48, "dense_layers": 1}
VATTENTION: dict[str, Any] = {
    "method": "vattention",
    "guarantee": "denominator",
    "epsilon": 0.3,
    "delta": 0.3,
    "top_k_fraction": 0.02,
    "sink_tokens": 16,
    "window_tokens": 16,
    "dense_layers": 1,
}
CASES = {"quest": (QUEST, 130), "twilight": (TWILIGHT, 151), "vattention": (VATTENTION, 1200)}
"""Settings, and a context that is long enough for sparse rows."""

PER_KV_HEAD = {"candidates", "chosen", "pilot", "budget", "is_dense"}
STATISTICS = {
    "denominator",
    "numerator_norm_sq",
    "weight_variance",
    "weight_kurtosis",
    "trace",
    "trace_of_square",
    "kurtosis",
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("traced"), "llama", max_position_embeddings=2048)


@pytest.fixture(scope="module")
def traces(path: Path) -> Callable[[str, int], list[TraceStep]]:
    """traces(case, ranks): three decode steps over the same tokens."""

    @cache
    def of(case: str, ranks: int) -> list[TraceStep]:
        sparse, length = CASES[case]
        with make_llm(path, ranks, sparse=sparse, trace=True, max_model_len=1400) as llm:
            return llm.score(random_tokens(length, seed=1), decode_last_prompt_tokens=4)[0].trace

    return of


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


@pytest.mark.parametrize(
    "case", ["quest", *(pytest.param(name, marks=pytest.mark.slow) for name in ("twilight", "vattention"))]
)
def test_a_trace_is_the_same_on_two_ranks(traces: Callable[[str, int], list[TraceStep]], case: str) -> None:
    """Head by head: no rank's part is lost, doubled or out of order."""
    one, two = traces(case, 1), traces(case, 2)
    assert [step.position for step in one] == [step.position for step in two]
    for first, second in [pair for steps in zip(one, two) for pair in zip(steps[0].layers, steps[1].layers, strict=True)]:
        for name in ("captured_mass", "entropy", "relative_error"):
            expected = getattr(first, name)
            assert expected.shape == (8,)
            assert getattr(second, name) == pytest.approx(expected, rel=1e-3, abs=1e-5)  # errors of dense layers are rounding
        assert second.tokens_for_mass == pytest.approx(first.tokens_for_mass, abs=1)  # a tie may fall to either side
        assert [of_head.tolist() for of_head in second.indices] == [of_head.tolist() for of_head in first.indices]
        assert second.details.keys() == first.details.keys()
        for name, expected in first.details.items():
            assert expected.shape == ((4,) if name in PER_KV_HEAD else (8,))
            assert len(set(expected)) > 1 or name in ("candidates", "chosen", "pilot", "is_dense"), "heads are told apart"
            assert second.details[name] == pytest.approx(expected, rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_twilight_trace_tells_what_was_offered_and_what_was_kept(
    traces: Callable[[str, int], list[TraceStep]], ranks: int
) -> None:
    for step in traces("twilight", ranks):
        n = step.position + 1
        dense, *sparse = step.layers
        assert dense.details == {} and len(sparse) == 2
        for layer in sparse:
            found = layer.details
            assert found.keys() == {"candidates", "candidate_mass", "kept"}
            assert found["candidates"].tolist() == [16 * math.ceil(n / 2 / 16) - (-n % 16)] * 4
            assert ((layer.captured_mass <= found["candidate_mass"] + 1e-5) & (found["candidate_mass"] < 1)).all()
            assert (layer.captured_mass > 0.75 * found["candidate_mass"]).all()  # p of it, but for what 4 bits misjudge
            kept, forced = found["kept"].reshape(4, 2), 2 * 16 + (n - 1) % 16 + 1
            assert (kept.max(1) <= layer.num_attended).all() and (layer.num_attended <= kept.sum(1) + forced).all()
            assert (layer.num_attended < found["candidates"]).all() and (kept > 0).all()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_vattention_trace_tells_why_each_row_reads_what_it_reads(
    traces: Callable[[str, int], list[TraceStep]], ranks: int
) -> None:
    rows_dense, steps = [], traces("vattention", ranks)
    for step in steps:
        n = step.position + 1
        dense, *sparse = step.layers
        assert dense.details == {} and len(sparse) == 2
        for layer in sparse:
            found = layer.details
            assert found.keys() == {"chosen", "pilot", "budget", "is_dense"} | STATISTICS
            # sinks, the window's page and one more, and two of the top-k; the newest page may be partial
            assert found["chosen"].tolist() == [5 * 16 - (-n % 16)] * 4 and found["pilot"].tolist() == [256] * 4
            read, is_dense = found["chosen"] + found["budget"], found["is_dense"].astype(bool)
            assert layer.num_attended.tolist() == np.where(is_dense, n, read).tolist()
            assert is_dense.tolist() == (2 * read > n).tolist()
            assert found["budget"].tolist() == sizes(found, n).tolist()
            of_query_head = is_dense.repeat(2)
            assert layer.captured_mass[of_query_head] == pytest.approx(1.0)
            assert (layer.captured_mass[~of_query_head] < 1).all() and (layer.relative_error[~of_query_head] > 1e-3).all()
            rows_dense += is_dense.tolist()
    assert 0 < sum(rows_dense) < len(rows_dense), "both kinds of rows are shown"


def sizes(found: dict[str, np.ndarray], n: int) -> np.ndarray:
    """What the statistics ask for, [H_kv]: (z n_s sigma / (epsilon D))^2 with sigma raised, drawn without replacement."""
    m, n_s = 256, n - found["chosen"].repeat(2).astype(np.float64)
    raised = found["weight_variance"] * (1 + quantile(0.99) * np.sqrt((found["weight_kurtosis"] - 1) / m))
    epsilon, delta = VATTENTION["epsilon"], VATTENTION["delta"]
    b0 = (quantile(1 - delta / 2) * n_s / (epsilon * found["denominator"])) ** 2 * raised
    needed = (b0 / (1 + b0 / n_s)).reshape(4, 2).max(1)
    return np.minimum(64 * np.ceil(np.maximum(needed, m) / 64), n_s[::2])


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
    (scored,) = llm.score(PROMPT, decode_last_prompt_tokens=4, trace_steps=[1])
    assert [step.position for step in scored.trace] == [127]


def test_a_score_repeats_under_its_seed_whatever_came_before(path: Path) -> None:
    sparse = {"method": "random", "token_budget": 64, "dense_layers": 0}
    with make_llm(path, sparse=sparse) as llm:
        found = [llm.score(PROMPT, decode_last_prompt_tokens=4, seed=seed)[0].token_logprobs for seed in (7, 8, 7)]
    assert np.array_equal(found[0], found[2]) and not np.array_equal(found[0], found[1])


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
    sparse = {"method": "window", "token_budget": 48, "recent_pages": 1, "evict": True, "dense_layers": 0}
    with pytest.raises(ValueError, match=r"trace=True needs every page.*evict"):
        make_llm(path, sparse=sparse, trace=True)
