"""A budget that covers the context changes no bit; one that does not is kept to the token, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distributed_sparse import SamplingParams
from distributed_sparse.llm import LLM
from distributed_sparse.outputs import ScoreOutput
from tests.support.checkpoints import tiny_checkpoint
from tests.support.engine import make_llm
from tests.support.hash_weights import random_hash_weights
from tests.support.methods import METHODS
from tests.support.prompts import random_tokens

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.each_value]  # on CPU, equal bits are promised at one thread

PAGE, LAYERS, KV_HEADS, HEAD_DIM = 16, 4, 2, 16
TOKEN_BYTES = 2 * HEAD_DIM * 4  # K and V of one KV head
BUDGETED = [method for method, case in METHODS.items() if case.budget]
PER_TOKEN = ["oracle_topk", "hash"]
"""These fill the budget's pages with single tokens; the newest page may be partial for the others."""
DECODED = 12


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes: dict[str, Any] = {
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": KV_HEADS,
        "hidden_size": 32,
    }
    folder = tmp_path_factory.mktemp("long")
    random_hash_weights(folder / "hash.safetensors", range(LAYERS), sizes["num_attention_heads"], HEAD_DIM)
    return tiny_checkpoint(folder / "model", max_position_embeddings=8192, **sizes)


@pytest.fixture(scope="module")
def dense(path: Path) -> Iterator[LLM]:
    with make_llm(path, max_num_seqs=4) as llm:
        yield llm


def sparse_llm(path: Path, method: str, token_budget: int, **settings: Any) -> LLM:
    """All layers follow the method, unless told otherwise."""
    sparse = {"method": method, "token_budget": token_budget, "dense_layers": 0, "recent_pages": 1, **settings}
    if method == "hash":
        sparse["hash_weights"] = str(path.parent / "hash.safetensors")
    return make_llm(path, max_num_seqs=4, sparse=sparse)


def score(llm: LLM, *lengths: int, decoded: int = DECODED) -> list[ScoreOutput]:
    """Sequences of these lengths, scored together; the last ``decoded`` tokens of each go through the method."""
    prompts = [random_tokens(length, seed=length) for length in lengths]
    return llm.score(prompts, whole_vocabulary=True, decode_last_prompt_tokens=decoded)


def assert_same_bits(expected: ScoreOutput, found: ScoreOutput) -> None:
    assert expected.logprobs is not None and found.logprobs is not None
    assert np.isfinite(expected.logprobs).all()
    assert np.array_equal(expected.logprobs.view(np.int32), found.logprobs.view(np.int32))


def contexts(length: int, decoded: int = DECODED) -> range:
    """Context lengths of the decode rows that score a sequence."""
    return range(length - decoded + 1, length + 1)


def attended(method: str, context: int, token_budget: int) -> int:
    """Tokens that a row reads: all, or whole pages up to the budget, of which the newest may be partial; or as many tokens."""
    pages, budget = -(-context // PAGE), -(-token_budget // PAGE)
    if pages <= budget:
        return context
    return budget * PAGE - (0 if method in PER_TOKEN else pages * PAGE - context)


def density(method: str, lengths: range, token_budget: int) -> float:
    return sum(attended(method, context, token_budget) for context in lengths) / sum(lengths)


# ---- a budget that covers the context


@pytest.mark.parametrize("spare_pages", [0, 7])
@pytest.mark.parametrize("length", [17, 100, 1500])
@pytest.mark.parametrize("method", BUDGETED)
def test_a_budget_that_covers_the_context_is_bitwise_dense(
    path: Path, dense: LLM, method: str, length: int, spare_pages: int
) -> None:
    """At no spare page, the budget is the context's own pages, the partial last one included."""
    token_budget = (-(-length // PAGE) + spare_pages) * PAGE
    with sparse_llm(path, method, token_budget) as llm:
        (found,) = score(llm, length)
        attention = llm.stats()["attention"]
    assert attention["rows_sparse"] == 0 and attention["rows_dense"] == DECODED * LAYERS * KV_HEADS
    assert attention["density"] == [[1.0] * KV_HEADS] * LAYERS
    assert attention["bytes_read"] == sum(contexts(length)) * LAYERS * KV_HEADS * TOKEN_BYTES  # and no metadata was scored
    assert_same_bits(score(dense, length)[0], found)


@pytest.mark.parametrize("method", BUDGETED)
def test_a_covered_row_stays_bitwise_dense_beside_rows_that_are_not(path: Path, dense: LLM, method: str) -> None:
    """Here the device decides, row by row: the host only knows that the longest context is not covered."""
    lengths = (100, 1500, 17, 700)
    expected = score(dense, *lengths)
    with sparse_llm(path, method, 112) as llm:
        found = score(llm, *lengths)
        attention = llm.stats()["attention"]
    assert attention["rows_sparse"] == 2 * DECODED * LAYERS * KV_HEADS  # those of 1500 and 700 tokens
    assert attention["rows_dense"] == 2 * DECODED * LAYERS * KV_HEADS
    for place in (0, 2):
        assert_same_bits(expected[place], found[place])
    for place in (1, 3):
        assert (expected[place].token_logprobs[-DECODED + 1 :] != found[place].token_logprobs[-DECODED + 1 :]).any()


@pytest.mark.parametrize("length", [100, 1496])
@pytest.mark.parametrize("method", BUDGETED)
def test_one_page_less_than_the_context_is_sparse(path: Path, dense: LLM, method: str, length: int) -> None:
    token_budget = (-(-length // PAGE) - 1) * PAGE
    with sparse_llm(path, method, token_budget) as llm:
        (found,) = score(llm, length)
        attention = llm.stats()["attention"]
    sparse_rows = sum(attended(method, context, token_budget) < context for context in contexts(length))
    assert 0 < sparse_rows < DECODED  # the context outgrows the budget on the way
    assert attention["rows_sparse"] == sparse_rows * LAYERS * KV_HEADS
    assert attention["rows_dense"] == (DECODED - sparse_rows) * LAYERS * KV_HEADS
    (expected,) = score(dense, length)
    assert expected.logprobs is not None and found.logprobs is not None
    first = len(found.logprobs) - sparse_rows + 1  # the last token's row predicts nothing
    assert np.array_equal(expected.logprobs[:first], found.logprobs[:first])
    assert not (expected.logprobs[first:] == found.logprobs[first:]).all(axis=1).any()


@pytest.mark.parametrize("method", BUDGETED)
def test_sampling_under_a_covering_budget_draws_the_dense_tokens(path: Path, dense: LLM, method: str) -> None:
    prompts = [random_tokens(length, seed=length) for length in (40, 90, 5)]
    params = SamplingParams(temperature=1.2, top_p=0.95, seed=7, max_tokens=30, n=1, logprobs=0, ignore_eos=True)
    with sparse_llm(path, method, 128) as llm:
        found = llm.generate(prompts, params, use_tqdm=False)
        assert llm.stats()["attention"]["rows_sparse"] == 0
    for expected, output in zip(dense.generate(prompts, params, use_tqdm=False), found):
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids
        assert output.outputs[0].cumulative_logprob == expected.outputs[0].cumulative_logprob


ADAPTIVE: dict[str, dict[str, Any]] = {
    "sketch": {"min_tokens": 64},
    "twilight": {"p": 0.5, "candidate_fraction": 0.5, "min_candidates": 32},
    "vattention": {"epsilon": 0.5, "delta": 0.5, "sink_tokens": 16, "window_tokens": 16, "guarantee": "denominator"},
}
COVERING: list[tuple[str, dict[str, Any], int]] = [
    ("sketch", {"min_tokens": 704}, 700),
    ("sketch", {"tau": 0.0}, 700),
    ("sketch", {"sink_pages": 43}, 700),
    ("twilight", {"p": 1.0, "selector": "full"}, 700),
    ("twilight", {"p": 1.0, "candidate_fraction": 1.0, "min_candidates": 1}, 700),
    ("twilight", {"p": 1.0, "min_candidates": 705}, 700),
    ("twilight", {"p": 0.1, "sink_pages": 43, "recent_pages": 1}, 700),
    ("vattention", {}, 560),
    ("vattention", {"max_sample": 256, "epsilon": 0.01}, 700),
    ("vattention", {"epsilon": 0.0001}, 700),
    ("vattention", {"sink_tokens": 700}, 700),
]
"""Settings of the adaptive methods under which a context of so many tokens is read whole, for one reason each."""


@pytest.mark.parametrize(("method", "settings", "length"), COVERING)
def test_settings_that_cover_the_context_are_bitwise_dense(
    path: Path, dense: LLM, method: str, settings: dict[str, Any], length: int
) -> None:
    with adaptive_llm(path, method, **settings) as llm:
        (found,) = score(llm, length)
        assert llm.stats()["attention"]["rows_sparse"] == 0
    assert_same_bits(score(dense, length)[0], found)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_rows_that_are_covered_stay_bitwise_dense_beside_rows_that_are_not(
    path: Path, dense: LLM, method: str
) -> None:
    lengths = (30, 1500, 17, 1100)
    expected = score(dense, *lengths)
    with adaptive_llm(path, method) as llm:
        found = score(llm, *lengths)
        assert llm.stats()["attention"]["rows_sparse"] > 0
    for place in (0, 2):
        assert_same_bits(expected[place], found[place])
    for place in (1, 3):
        assert (expected[place].token_logprobs[-DECODED + 1 :] != found[place].token_logprobs[-DECODED + 1 :]).any()


@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_rows_below_min_context_are_bitwise_dense(path: Path, dense: LLM, method: str) -> None:
    """Of the last 12 contexts of 1205 the first seven are below 1201; alone, the host knows it, beside 1500 the device."""
    expected = score(dense, 1205, 1500)
    with adaptive_llm(path, method, min_context=1201) as llm:
        together = score(llm, 1205, 1500)
        (alone,) = score(llm, 1200)
        assert llm.stats()["attention"]["rows_sparse"] > 0
    assert_same_bits(score(dense, 1200)[0], alone)
    assert expected[0].logprobs is not None and together[0].logprobs is not None
    assert (expected[0].logprobs == together[0].logprobs).all(axis=1)[:1200].all()


def adaptive_llm(path: Path, method: str, **settings: Any) -> LLM:
    """All layers follow the method."""
    return make_llm(path, max_num_seqs=4, sparse={"method": method, "dense_layers": 0, **ADAPTIVE[method], **settings})


# ---- a budget that is kept


@pytest.mark.parametrize("token_budget", [32, 48, 90, 96])
@pytest.mark.parametrize("method", BUDGETED)
def test_density_is_the_budget_in_whole_pages_over_the_context(path: Path, method: str, token_budget: int) -> None:
    with sparse_llm(path, method, token_budget) as llm:
        score(llm, 150, decoded=70)  # contexts 81 to 150: some of them are covered by the larger budgets
        attention = llm.stats()["attention"]
    lengths = contexts(150, 70)
    assert attention["density"] == [[density(method, lengths, token_budget)] * KV_HEADS] * LAYERS
    sparse_rows = sum(attended(method, context, token_budget) < context for context in lengths)
    assert attention["rows_sparse"] == sparse_rows * LAYERS * KV_HEADS
    assert attention["rows_dense"] == (70 - sparse_rows) * LAYERS * KV_HEADS


@pytest.mark.parametrize("method", BUDGETED)
def test_bytes_read_are_those_of_the_attended_tokens_and_of_the_scored_metadata(path: Path, method: str) -> None:
    with sparse_llm(path, method, 48, dense_layers=1) as llm:
        score(llm, 150, decoded=20)
        attention = llm.stats()["attention"]
    lengths = contexts(150, 20)
    read = sum(context + (LAYERS - 1) * attended(method, context, 48) for context in lengths) * KV_HEADS * TOKEN_BYTES
    pages = sum(-(-context // PAGE) for context in lengths)
    per_head = {
        "quest": pages * 2 * HEAD_DIM * 4,  # two bounds per page
        "oracle_topk": sum(lengths) * HEAD_DIM * 4,  # every key
        "hash": sum(lengths) * 2 * 4,  # one word per token and query head
    }
    assert attention["bytes_read"] == read + per_head.get(method, 0) * (LAYERS - 1) * KV_HEADS


@pytest.mark.parametrize("dense_layers", [0, 1, 3, 4])
@pytest.mark.parametrize("method", BUDGETED)
def test_the_first_dense_layers_stay_dense(path: Path, method: str, dense_layers: int) -> None:
    with sparse_llm(path, method, 48, dense_layers=dense_layers) as llm:
        score(llm, 200)
        attention = llm.stats()["attention"]
    kept = density(method, contexts(200), 48)
    assert attention["density"] == [[1.0 if layer < dense_layers else kept] * KV_HEADS for layer in range(LAYERS)]
    assert attention["rows_sparse"] == DECODED * (LAYERS - dense_layers) * KV_HEADS


@pytest.mark.parametrize("method", BUDGETED)
def test_dense_layers_in_all_layers_are_bitwise_dense(path: Path, dense: LLM, method: str) -> None:
    with sparse_llm(path, method, 48, dense_layers=LAYERS) as llm:
        assert_same_bits(score(dense, 200)[0], score(llm, 200)[0])


@pytest.mark.parametrize("method", BUDGETED)
def test_below_min_context_rows_are_bitwise_dense(path: Path, dense: LLM, method: str) -> None:
    """200 tokens are below, 700 above, and of the last 12 contexts of 305 the first seven are below 301."""
    lengths = (200, 305, 700)
    expected = score(dense, *lengths)
    with sparse_llm(path, method, 48, min_context=301) as llm:
        together = score(llm, *lengths)
        attention = llm.stats()["attention"]
        (alone,) = score(llm, 200)
    assert attention["rows_sparse"] == (DECODED + 5) * LAYERS * KV_HEADS
    assert_same_bits(expected[0], together[0])
    assert_same_bits(score(dense, 200)[0], alone)
    assert expected[1].logprobs is not None and together[1].logprobs is not None
    same = (expected[1].logprobs == together[1].logprobs).all(axis=1)
    assert same[:300].all() and not same[300:].any()  # row i predicts from a context of i + 1 tokens


@pytest.mark.parametrize("method", BUDGETED)
def test_layers_have_budgets_of_their_own(path: Path, method: str) -> None:
    layers = [{"range": "1-2", "token_budget": 64}, {"range": "2", "min_context": 1000}]
    with sparse_llm(path, method, 32, layers=layers) as llm:
        score(llm, 200)
        found = llm.stats()["attention"]["density"]
    lengths = contexts(200)
    expected = [density(method, lengths, 32), density(method, lengths, 64), 1.0, density(method, lengths, 32)]
    assert found == [[kept] * KV_HEADS for kept in expected]


def test_layers_of_one_setting_are_computed_as_if_it_were_set_for_all(path: Path) -> None:
    with sparse_llm(path, "quest", 48) as llm:
        (expected,) = score(llm, 200)
    with sparse_llm(path, "quest", 32, layers=[{"range": "0-3", "token_budget": 48, "recent_pages": 1}]) as llm:
        assert_same_bits(expected, score(llm, 200)[0])


# ---- the engine's seed


def test_requests_without_a_seed_repeat_with_the_engines_seed(path: Path) -> None:
    prompts = [random_tokens(20, seed=1)] * 3
    params = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)

    def draw(seed: int, params: SamplingParams) -> list[list[int]]:
        with make_llm(path, max_num_seqs=4, seed=seed) as llm:
            return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]

    first = draw(5, params)
    assert draw(5, params) == first
    assert len({str(tokens) for tokens in first}) == 3  # each request has a seed of its own
    assert not any(tokens in first for tokens in draw(6, params))
    seeded = replace(params, seed=3)
    assert draw(5, seeded) == draw(6, seeded) == [draw(5, seeded)[0]] * 3
