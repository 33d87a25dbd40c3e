"""An evaluation through the real engine: what it measures, one engine at a time, and that it goes on where it was stopped."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distributed_sparse import SamplingParams
from distributed_sparse.config import EngineConfig
from distributed_sparse.llm import LLM
from distributed_sparse.tools.common.results import Results
from distributed_sparse.tools.evaluation.evaluation_summary import summarise_run
from distributed_sparse.tools.evaluation.meter import Meter, decode_contexts, page_bytes, pages_held
from distributed_sparse.tools.evaluation.methods import parse_methods, settings_key
from distributed_sparse.tools.evaluation.recall import make_quiz, score_quiz
from distributed_sparse.tools.evaluation.recall_model import save_recall_checkpoint
from distributed_sparse.tools.evaluation.run_suite import Evaluation, RunOptions
from distributed_sparse.tools.evaluation.suites.agreement import AgreementSuite
from distributed_sparse.tools.evaluation.suites.passkey import PasskeySuite
from distributed_sparse.tools.evaluation.suites.recall import RecallSuite
from tests.support.checkpoints import tiny_checkpoint
from tests.support.engine import make_llm
from tests.support.prompts import random_tokens
from tests.support.text_checkpoint import text_checkpoint

ENGINE: dict[str, Any] = {"device": "cpu", "max_model_len": 480, "max_num_seqs": 4, "kv_cache_memory_bytes": 32 << 20}
RECALL = RecallSuite(lengths=(400,), facts=24, questions=4, majority_questions=2, mentions=12, tasks=("one-hop", "majority"))
OPTIONS = RunOptions(trace_examples=1, trace_steps=4, batch=1)


@pytest.fixture(scope="module")
def recall(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("recall")
    save_recall_checkpoint(folder)
    return str(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(text_checkpoint(tmp_path_factory.mktemp("text")))


class Engines:
    """Opens engines, and counts how many were opened and how many are open at once."""

    def __init__(self) -> None:
        self.open = self.most_open = 0
        self.methods: list[tuple[str, bool]] = []
        self.prefilled: list[dict[str, int]] = []

    @contextmanager
    def __call__(self, config: EngineConfig) -> Iterator[LLM]:
        assert config.sparse is not None
        self.methods.append((config.sparse["method"], config.trace))
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        settings = {name: getattr(config, name) for name in ("sparse", "trace", "prefill_store", *ENGINE)}
        try:
            with make_llm(config.model, config.tensor_parallel_size, **settings) as llm:
                yield llm
                self.prefilled.append(llm.stats()["prefill_tokens"])
        finally:
            self.open -= 1


def evaluation(model: str, suite: Any, methods: list[dict[str, Any]], options: RunOptions = OPTIONS, **engine: Any) -> Any:
    config = EngineConfig(model=model, **{**ENGINE, **engine})
    return Evaluation(config, suite, methods, options, Engines())


def run(directory: Path, given: Evaluation) -> dict[str, Any]:
    with Results(directory, given.configuration()) as results:
        given.run(results)
        return results.records


@pytest.fixture(scope="module")
def recall_records(recall: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("results"), evaluation(recall, RECALL, parse_methods(["quest", "twilight"], [64])))


@pytest.mark.slow
def test_a_run_measures_what_the_engine_says(recall: str, recall_records: dict[str, Any]) -> None:
    quest = {"method": "quest", "token_budget": 64}
    quiz = make_quiz(24, 400, 4, seed=0)
    params = SamplingParams(
        temperature=0.0, max_tokens=1, prompt_logprobs=1, decode_last_prompt_tokens=quiz.num_quiz_tokens, ignore_eos=True
    )
    with make_llm(recall, sparse=quest, **ENGINE) as llm:
        (output,) = llm.generate([quiz.token_ids], params, use_tqdm=False)
        stats = llm.stats()
    assert output.prompt_logprobs is not None
    record = recall_records[f"{settings_key(quest)}/answers/one-hop, 400 tokens/0"]
    summary = summarise_run(list(recall_records.values()), settings_key(quest), "one-hop, 400 tokens")
    assert summary is not None and summary.layer_density is not None
    assert summary.score.mean == score_quiz(quiz, output.prompt_logprobs).accuracy
    assert summary.layer_density == pytest.approx(np.array(stats["attention"]["density"]), rel=1e-9)
    assert summary.sparse_share == 1.0 and summary.density == pytest.approx(summary.layer_density[2:].mean())
    assert record["counters"]["bytes_read"] == stats["attention"]["bytes_read"]
    assert record["counters"]["steps"] == 12
    ranks = stats["ranks"][0]
    per_page = (ranks["cache_bytes"] + ranks["metadata_bytes"]) / (stats["pages"]["total"] + 1)
    assert summary.held_kv + summary.held_metadata == pytest.approx(25 * per_page)  # 400 tokens
    assert summary.held_metadata == pytest.approx(summary.held_kv / 32)  # 2 vectors per 16 tokens, in 2 of 4 layers


def test_every_method_has_its_controls_at_its_density(recall_records: dict[str, Any]) -> None:
    group = "one-hop, 400 tokens"
    runs = {r["run"]: r["settings"] for r in recall_records.values() if r["group"] == group and r["kind"] == "answers"}
    twilight = summarise_run(list(recall_records.values()), settings_key({"method": "twilight"}), group)
    assert twilight is not None
    budget = max(math.ceil(twilight.attended / 16), 2) * 16
    at = {(s["method"], s.get("token_budget")) for s in runs.values()}
    controls = {(method, size) for method in ("window", "random", "oracle_topk") for size in (64, budget)}
    assert at == {("dense", None), ("quest", 64), ("twilight", None), ("quest", budget), *controls}


def test_dense_is_its_own_reference_and_a_blind_window_is_far_from_it(recall_records: dict[str, Any]) -> None:
    records, group = list(recall_records.values()), "one-hop, 400 tokens"
    dense, quest, window = (
        summarise_run(records, settings_key(settings), group)
        for settings in (
            {"method": "dense"},
            {"method": "quest", "token_budget": 64},
            {"method": "window", "token_budget": 64},
        )
    )
    assert dense is not None and quest is not None and window is not None
    assert (dense.score.mean, dense.kl.mean, dense.top1.mean, dense.density, dense.mass) == (1.0, 0.0, 1.0, 1.0, 1.0)
    assert max(dense.error, quest.error) < 1e-3 < window.error
    assert quest.score.mean > window.score.mean and quest.kl.mean < window.kl.mean and quest.mass > window.mass
    assert dense.compared == quest.compared == 4


def test_one_engine_is_open_at_a_time_and_units_that_are_there_open_none(recall: str, tmp_path: Path) -> None:
    suite = RecallSuite(lengths=(400,), facts=24, questions=4, tasks=("one-hop",))
    methods = parse_methods(["quest"], [64])
    first = evaluation(recall, suite, methods, RunOptions(trace_examples=1, trace_steps=1, controls=False))
    records = run(tmp_path, first)
    assert first._open_engine.most_open == 1
    assert first._open_engine.methods == [("dense", True), ("quest", True)]
    again = evaluation(recall, suite, methods, RunOptions(trace_examples=1, trace_steps=1, controls=False))
    assert run(tmp_path, again) == records and again._open_engine.methods == []
    more = evaluation(
        recall, suite, parse_methods(["quest"], [64, 48]), RunOptions(trace_examples=1, trace_steps=1, controls=False)
    )
    assert run(tmp_path, more).items() > records.items()
    assert more._open_engine.methods == [("quest", True)]


@pytest.mark.slow
def test_an_interrupted_evaluation_goes_on_and_ends_as_an_uninterrupted_one(
    recall: str, recall_records: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = 7  # within the second run
    append, left = Results.append, [units]

    def interrupted(self: Results, record: dict[str, Any]) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        append(self, record)

    methods = parse_methods(["quest", "twilight"], [64])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Results, "append", interrupted)
        run(tmp_path, evaluation(recall, RECALL, methods))
    path = tmp_path / "results.jsonl"
    assert len(path.read_text().splitlines()) == units
    path.write_text(path.read_text() + '{"key": "half a li')
    assert run(tmp_path, evaluation(recall, RECALL, methods)) == recall_records
    assert {json.loads(line)["key"] for line in path.read_text().splitlines()} == set(recall_records)


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(recall: str, tmp_path: Path) -> None:
    suite = RecallSuite(lengths=(400,), facts=24, questions=4, tasks=("two-hop",))
    methods = parse_methods(["quest"], [64])
    options = RunOptions(trace_examples=0, controls=False)
    of_ranks = []
    for ranks in (1, 2):
        records = run(tmp_path / str(ranks), evaluation(recall, suite, methods, options, tensor_parallel_size=ranks))
        of_ranks.append(summarise_run(list(records.values()), settings_key(methods[0]), "two-hop, 400 tokens"))
    one, two = of_ranks
    assert one is not None and two is not None
    assert one.layer_density is not None and two.layer_density is not None
    assert np.array_equal(one.layer_density, two.layer_density)
    assert (two.score.mean, two.top1.mean) == (one.score.mean, one.top1.mean)
    for name in ("density", "held_kv", "held_metadata", "read_per_step", "read_share"):
        assert getattr(two, name) == pytest.approx(getattr(one, name), rel=1e-4), name
    assert two.kl.mean == pytest.approx(one.kl.mean, rel=1e-2, abs=1e-4)


@pytest.mark.slow
def test_generated_answers_are_compared_at_the_dense_runs_tokens(text: str, tmp_path: Path) -> None:
    suite = PasskeySuite(lengths=(300,), depths=(0.5,), samples=2, max_tokens=6)
    methods = parse_methods(["quest"], [48])
    given = evaluation(text, suite, methods, RunOptions(trace_examples=1, trace_steps=3, controls=False, kl_tokens=4))
    records = run(tmp_path, given)
    key = "/answers/300 tokens/0"
    dense, quest = (records[settings_key(s) + key]["examples"] for s in ({"method": "dense"}, methods[0]))
    example = given.groups["300 tokens"][0]
    said = dense[0]["token_ids"][:4]
    rows = []
    for sparse in ({"method": "dense"}, methods[0]):
        with make_llm(text, sparse=sparse, **ENGINE) as llm:
            (scored,) = llm.score(
                example.token_ids + said,
                whole_vocabulary=True,
                decode_last_prompt_tokens=example.num_question_tokens + len(said),
            )
            assert scored.logprobs is not None
            rows.append(scored.logprobs[len(example.token_ids) - 1 :].astype(np.float64))
            params = SamplingParams(temperature=0.0, max_tokens=6, decode_last_prompt_tokens=example.num_question_tokens)
            own = dense if sparse["method"] == "dense" else quest
            assert llm.generate(example.token_ids, params, use_tqdm=False)[0].outputs[0].token_ids == own[0]["token_ids"]
    kl = (np.exp(rows[0]) * (rows[0] - rows[1])).sum(-1)
    assert quest[0]["kl"] == pytest.approx(kl, rel=1e-3)
    assert quest[0]["top1"] == (rows[0].argmax(-1) == rows[1].argmax(-1)).tolist()
    assert dense[0]["kl"] == [0.0] * len(said)
    trace = records[f"{settings_key(methods[0])}/trace/300 tokens/{example.id}"]["trace"]
    last = len(example.token_ids) + len(dense[0]["token_ids"]) - 2
    assert trace["positions"][-1] == last and len(trace["positions"]) == 3
    assert trace["positions"][0] >= len(example.token_ids) - 1  # the steps that say the answer


def test_every_prompt_is_prefilled_by_the_dense_run_alone(text: str, tmp_path: Path) -> None:
    """Answered in batches, compared one by one and traced: the other engines find all of it, and nothing is left behind."""
    suite = PasskeySuite(lengths=(300,), depths=(0.2, 0.8), samples=2, max_tokens=3)
    given = evaluation(text, suite, parse_methods(["quest,tova"], [48]), RunOptions(trace_examples=1, batch=3, controls=False))
    run(tmp_path, given)
    dense, *others = given._open_engine.prefilled
    assert dense["computed"] > 4 * 200
    assert [engine["computed"] for engine in others] == [0, 0]
    assert others[0]["from_store"] == others[1]["from_store"] == sum(dense.values())
    assert not list(tmp_path.glob("prefill-*"))


def test_a_table_that_is_too_large_is_not_made_but_the_text_is_still_scored(text: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 30)
    suite = AgreementSuite(text=(str(path),), lengths=(200,), decoded=6)
    found = []
    for limit in (1000, 1 << 30):
        options = RunOptions(trace_examples=0, controls=False, table_bytes=limit)
        records = run(tmp_path / str(limit), evaluation(text, suite, parse_methods(["quest"], [48]), options))
        found.append(next(r["examples"][0] for r in records.values() if r["settings"]["method"] == "quest"))
    assert found[0]["kl"] == [] and len(found[1]["kl"]) == 6 and max(found[1]["kl"]) > 0
    assert found[0]["scores"] == found[1]["scores"]


def test_evicted_pages_are_not_traced_but_counted_as_freed(text: str, tmp_path: Path) -> None:
    methods = parse_methods(["{method: window, token_budget: 64, dense_layers: 0, evict: true}"])
    suite = PasskeySuite(lengths=(300,), depths=(0.5,), samples=1, max_tokens=3)
    records = run(tmp_path, evaluation(text, suite, methods, RunOptions(controls=False)))
    (window,) = (r for r in records.values() if r["settings"]["method"] == "window")
    assert window["kind"] == "answers" and window["examples"][0]["pages"] == 4
    assert {r["kind"] for r in records.values() if r["settings"]["method"] == "dense"} == {"answers", "trace"}


@pytest.mark.parametrize(("question", "outputs"), [(0, 9), (5, 1), (5, 9)])
def test_pages_and_contexts_are_the_engines(tmp_path: Path, question: int, outputs: int) -> None:
    """What is derived from lengths equals the allocator's peak and the counted rows."""
    path = tiny_checkpoint(tmp_path, max_position_embeddings=480)
    params = SamplingParams(temperature=0.0, max_tokens=outputs, ignore_eos=True, decode_last_prompt_tokens=question)
    with make_llm(path, sparse={"method": "quest", "token_budget": 48, "recent_pages": 1, "dense_layers": 1}, **ENGINE) as llm:
        meter, peak, done = Meter(llm), [0], threading.Event()

        def watch() -> None:
            while not done.is_set():
                peak[0] = max(peak[0], llm.stats()["pages"]["used"])

        watcher = threading.Thread(target=watch)
        watcher.start()
        llm.generate([random_tokens(124, seed=1)], params, use_tqdm=False)
        done.set()
        watcher.join()
        contexts = decode_contexts(124, question, outputs)
        counters = meter.measure(contexts)  # which compares the steps with the engine's rows
        assert len(contexts) == question + outputs - 1
        assert peak[0] <= pages_held(124 + outputs - 1, 16, None) <= peak[0] + 1  # the last step may pass unseen
        assert counters.attended[0].tolist() == [sum(contexts)] * 4
        sizes = page_bytes(llm.stats()["ranks"])
        assert sizes["metadata"] == pytest.approx(sizes["kv"] / 16 * 2 / 3)  # 2 of 3 layers keep min and max
    assert pages_held(1000, 16, (1, 3)) == 4


def test_what_cannot_run_is_refused_before_any_engine(recall: str, text: str) -> None:
    with pytest.raises(ValueError, match="token_budget=16 is below the 3 forced pages"):
        evaluation(recall, RECALL, [{"method": "quest", "token_budget": 16}])
    with pytest.raises(ValueError, match=r"recall needs the checkpoint that is built for it.*make_demo_checkpoint"):
        evaluation(text, RECALL, [])
    with pytest.raises(ValueError, match=r"two examples are called '.*'; give each length, task, depth and text once"):
        evaluation(text, PasskeySuite(lengths=(300, 300), depths=(0.5,), samples=1), [])
    with pytest.raises(ValueError, match="batch=0 must be >= 1"):
        RunOptions(batch=0)


def test_an_example_that_the_engine_refuses_ends_the_evaluation_with_its_reason(text: str, tmp_path: Path) -> None:
    given = evaluation(text, PasskeySuite(lengths=(300,), depths=(0.5,), samples=1), [])
    given._open_engine = lambda config: make_llm(text, **{**ENGINE, "max_model_len": 256}, sparse=config.sparse)
    with pytest.raises(ValueError, match=r"refused or failed an example: prompt of \d+ tokens .* over max_model_len=256"):
        run(tmp_path, given)
