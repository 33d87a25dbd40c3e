"""A window that evicts frees memory while it decodes, and no token is another for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distributed_sparse import SamplingParams
from tests.support.checkpoints import decisive_checkpoint, tiny_checkpoint
from tests.support.engine import make_llm
from tests.support.prompts import random_tokens
from tests.support.stepped_engine import SteppedEngine

PAGE = 16
WINDOW: dict[str, Any] = {"method": "window", "token_budget": 64, "dense_layers": 0}
EVICT = {**WINDOW, "evict": True}
SETTINGS: dict[str, Any] = {"max_model_len": 512, "device": "cpu"}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


def greedy(max_tokens: int, **params: Any) -> dict[str, Any]:
    return {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **params}


def test_a_long_decode_holds_a_bounded_number_of_pages(path: Path) -> None:
    used = {}
    for sparse in (EVICT, WINDOW):
        with SteppedEngine(path, sparse=sparse, max_num_batched_tokens=64, **SETTINGS) as engine:
            output = engine.add(random_tokens(150, seed=1), **greedy(300))
            counts = []
            while engine.driver.has_work:
                counts.append(engine.driver.allocator.used)
                engine.step()
            pages = engine.driver.stats()["pages"]
            assert (pages["used"], pages["reserved"]) == (0, 0)
            used[sparse.get("evict", False)] = counts, output.outputs[0].token_ids
    evicting, keeping = used[True][0], used[False][0]
    assert evicting[:4] == keeping[:4] == [0, 4, 8, 10], "the prompt is held until it has been read"
    assert set(evicting[4:]) == {4}
    assert keeping[-1] == 28, "before the last step: 448 tokens"
    assert used[True][1] == used[False][1]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_tokens_and_log_probabilities_are_those_of_the_window_that_evicts_nothing(path: Path, ranks: int) -> None:
    prompts = [random_tokens(length, seed=length) for length in (150, 1, 64, 97, 33, 200)]
    params = [
        SamplingParams(temperature=0.0, max_tokens=90, ignore_eos=True, logprobs=1),
        SamplingParams(temperature=1.0, seed=1, n=3, max_tokens=120, ignore_eos=True, logprobs=1),
        SamplingParams(temperature=1.0, seed=2, n=2, max_tokens=60, ignore_eos=True, logprobs=1, decode_last_prompt_tokens=20),
        SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True, logprobs=1, decode_last_prompt_tokens=90),
        SamplingParams(temperature=0.8, seed=4, max_tokens=150, ignore_eos=True, logprobs=1),
        SamplingParams(temperature=1.0, seed=5, n=3, max_tokens=70, ignore_eos=True, logprobs=1),
    ]
    found = []
    for sparse in (EVICT, WINDOW):
        # every sequence at once, in the same batches: equal bits, though pages are recycled within them
        with make_llm(path, ranks, sparse=sparse, max_num_batched_tokens=600, max_num_seqs=16, **SETTINGS) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            assert llm.stats()["pages"]["used"] == 0
            assert llm.stats()["attention"]["rows_sparse"] > 0
        found.append([(sample.token_ids, sample.logprobs) for output in outputs for sample in output.outputs])
    assert found[0] == found[1]


@pytest.mark.slow
def test_two_requests_decode_together_that_only_fit_because_of_eviction(tmp_path: Path) -> None:
    # alone, a row is another shape for the model's matrix products than beside another: no two logits may be that close
    path = decisive_checkpoint(tmp_path)
    prompts = [random_tokens(40, seed=seed) for seed in (3, 4)]
    found = {}
    for evict in (True, False):
        sparse = {**WINDOW, "evict": evict}
        with SteppedEngine(path, sparse=sparse, kv_cache_memory_bytes=33 * page_bytes(), **SETTINGS) as engine:
            assert engine.driver.allocator.total == 32  # one request of max_model_len, and no page more
            outputs = [engine.add(prompt, **greedy(400)) for prompt in prompts]  # 28 pages each
            engine.step()
            engine.step()
            stats = engine.driver.stats()
            assert stats["requests"]["running"] == (2 if evict else 1)
            assert stats["pages"]["reserved"] == (2 * (2 + 4) if evict else 28)
            engine.finish()
            found[evict] = [output.outputs[0].token_ids for output in outputs]
            assert all(len(tokens) == 400 for tokens in found[evict])
    assert found[True] == found[False]


def page_bytes() -> int:
    """Of one page of the tiny checkpoint: 3 layers, K and V, 4 heads, 16 channels, float32."""
    return 3 * 2 * 4 * PAGE * 16 * 4


def test_aborted_and_finished_requests_give_back_what_they_still_hold(path: Path) -> None:
    with SteppedEngine(path, sparse=EVICT, **SETTINGS) as engine:
        outputs = [engine.add(random_tokens(100 + i, seed=i), **greedy(200, n=2, seed=i)) for i in range(3)]
        for _ in range(30):
            engine.step()
        assert engine.driver.allocator.used == 3 * 2 * 4 - 3  # each pair shares its sink page
        engine.abort(outputs[0])
        assert engine.driver.allocator.used == 2 * 2 * 4 - 2
        engine.finish()
        assert engine.driver.stats()["pages"]["used"] == 0


def test_a_trace_is_refused_where_there_is_no_whole_cache_to_compare_with(path: Path) -> None:
    with pytest.raises(ValueError, match=r"trace=True needs every page .*sparse\.evict=true frees pages"):
        make_llm(path, sparse=EVICT, trace=True, **SETTINGS)


@pytest.mark.slow
def test_ranks_report_what_they_keep(path: Path) -> None:
    with make_llm(path, 2, sparse=EVICT, **SETTINGS) as llm:
        assert [tuple(rank["evict_window"]) for rank in llm.stats()["ranks"]] == [(1, 3)] * 2
