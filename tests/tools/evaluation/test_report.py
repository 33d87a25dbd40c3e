"""The report puts every method beside its controls and says where it loses; plots are made of the same records."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from distributed_sparse.tools.evaluation.evaluation_plots import write_plots
from distributed_sparse.tools.evaluation.evaluation_report import report
from distributed_sparse.tools.evaluation.evaluation_summary import attended_of, dense_failures, summarise_run
from distributed_sparse.tools.evaluation.methods import parse_methods
from distributed_sparse.tools.evaluation.profile_report import layer_budgets, tokens_needed, write_layers
from distributed_sparse.tools.evaluation.suites.agreement import AgreementSuite
from distributed_sparse.tools.evaluation.suites.needle import NeedleSuite
from distributed_sparse.tools.evaluation.suites.profile import ProfileSuite
from distributed_sparse.tools.evaluation.suites.recall import RecallSuite
from tests.support.evaluation_records import answers_record, trace_record

DENSE: dict[str, Any] = {"method": "dense"}
QUEST: dict[str, Any] = {"method": "quest", "token_budget": 48}
TWILIGHT: dict[str, Any] = {"method": "twilight", "p": 0.9}
ENGINE = {"model": "m", "tensor_parallel_size": 1, "dtype": "auto", "device": "cpu", "page_size": 16, "seed": 0}


def control(method: str, budget: int) -> dict[str, Any]:
    return {"method": method, "token_budget": budget}


RECORDS = [
    answers_record(DENSE, [1.0, 1.0], 100, layers=(0, 1), kl=(0.0, 0.0)),
    trace_record(DENSE, 1.0, 1e-6, layers=(0, 1)),
    answers_record(QUEST, [1.0, 0.0], 27),
    trace_record(QUEST, 0.75, 0.5),
    answers_record(control("window", 48), [0.0, 0.0], 30),
    answers_record(control("oracle_topk", 48), [1.0, 0.95], 32),
    answers_record(TWILIGHT, [0.5, 0.25], 60),
    answers_record(control("quest", 64), [0.5, 0.5], 59),
]


def text_of(suite: Any, methods: list[dict[str, Any]], records: list[dict[str, Any]]) -> str:
    return report({"engine": ENGINE, suite.name: suite.options()}, suite, methods, records)


def rows_of(text: str) -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {cells[0]: cells[1:] for cells in reversed(lines)}  # the first table's rows win


def test_a_summary_counts_the_layers_that_select() -> None:
    run = summarise_run(RECORDS, RECORDS[2]["run"], "g")
    assert run is not None
    assert (run.score.mean, run.density, run.attended, run.sparse_share) == (0.5, 0.27, 27, 1.0)
    assert run.layer_density is not None and run.layer_density.tolist() == [[1.0, 1.0], [0.27, 0.27]]
    assert (run.held_kv, run.held_metadata, run.read_per_step) == (8 * 64, 8 * 4, 1000)
    assert (run.mass, run.error, run.kl.mean, run.top1.mean, run.compared) == (0.75, 0.5, 0.375, 0.5, 4)
    assert run.question_tokens == 3


def test_the_score_is_the_mean_over_tasks() -> None:
    record = answers_record(QUEST, [1.0, 1.0, 0.0], 27, tasks=["a", "a", "b"])
    run = summarise_run([record], record["run"], "g")
    assert run is not None and run.score.mean == 0.5
    assert {task: score.mean for task, score in run.task_scores.items()} == {"a": 1.0, "b": 0.0}


def test_an_infinite_divergence_is_not_forgotten() -> None:
    record = answers_record(QUEST, [1.0], 27, kl=(0.5, None))
    run = summarise_run([record], record["run"], "g")
    assert run is not None and math.isinf(run.kl.mean)


def test_heads_without_an_output_have_no_error() -> None:
    """A head that attends to a token without a value: its relative error is rounding over rounding, in the dense run, too."""
    noise = trace_record(DENSE, 1.0, 1e-6, layers=(0, 1))
    noise["trace"]["relative_error"][0][1] = [1e-6, 0.9, None, 1e-6]
    sparse = trace_record(QUEST, 0.75, 0.5)
    sparse["trace"]["relative_error"][0][1] = [0.2, 7.0, 7.0, 0.4]
    run = summarise_run([noise, sparse], sparse["run"], "g")
    assert run is not None and run.error == pytest.approx(0.3)


def test_a_dense_run_has_no_controls() -> None:
    record = answers_record(QUEST, [1.0], 100)
    assert attended_of([record], record["run"], "g") is None
    assert attended_of(RECORDS, RECORDS[2]["run"], "g") == 27


def tables_of(text: str) -> dict[str, dict[str, dict[str, str]]]:
    """Column of the head's second cell -> run -> column -> cell."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for part in text.split("\n\n"):
        lines = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("|")]
        if lines:
            found.setdefault(lines[0][-1], {row[0]: dict(zip(lines[0], row)) for row in lines[2:]})
    return found


def test_controls_stand_below_their_method_at_its_density() -> None:
    text = text_of(RecallSuite(), [QUEST, TWILIGHT], RECORDS)
    tables = tables_of(text)
    quality, attention, rows = tables["KL"], tables["mass"], tables["dense: whole context read"]
    assert list(quality) == ["dense", "quest 48", "= window 48", "= oracle_topk 48", "twilight p=0.9", "= quest 64"]
    assert list(quality) == list(attention) == list(rows)
    assert quality["quest 48"] | {"against dense": ""} == {
        "run": "quest 48", "examples": "2", "tokens": "4", "right answers (0-1)": "0.500 [0.000, 1.000]", "against dense": "",
        "bytes / dense": "1.000", "top-1": "0.500", "KL": "0.3750",
    }  # fmt: skip
    assert attention["quest 48"] == {
        "run": "quest 48", "examples": "2", "density": "0.270", "attended": "27", "held KV MB": "0.001",
        "held metadata MB": "0.000", "read MB / step": "0.001", "error": "0.5000 / 0.5000", "mass": "0.750 / 0.750",
    }  # fmt: skip
    assert (attention["= window 48"]["error"], attention["= window 48"]["mass"]) == ("- / -", "- / -")  # it was not traced
    assert "the question's tokens (at most\n3)" in text and "so the method read the question too" in text


def test_intervals_and_differences_from_dense_stand_beside_the_means() -> None:
    scores = [float(i % 2) for i in range(40)]
    records = [
        answers_record(DENSE, [1.0] * 40, 100, layers=(0, 1), kl=(0.0, 0.0)),
        answers_record(QUEST, scores, 27, kl=(0.25, 0.75)),
    ]
    cells = tables_of(text_of(NeedleSuite(), [QUEST], records))["KL"]["quest 48"]
    found = re.fullmatch(r"(.*) \[(.*), (.*)\]", cells["references found (0-100)"])
    assert found is not None
    mean, low, high = map(float, found.groups())
    assert mean == 0.5 and low == pytest.approx(0.5 - 0.157, abs=0.03) and high == pytest.approx(0.5 + 0.157, abs=0.03)
    assert cells["against dense"].startswith("-0.500 [-0.6") and cells["tokens"] == "80"
    # every example has the same two divergences: over whole examples there is no spread
    assert cells["KL"] == "0.5000"


def test_perplexities_are_exponentials_and_compared_as_ratios() -> None:
    suite = AgreementSuite(text=("t",))
    records = [
        answers_record(DENSE, [2.0, 4.0], 100, layers=(0, 1), kl=(0.0, 0.0)),
        answers_record(QUEST, [2.1, 4.3], 27, bytes_read=250),
    ]
    cells = tables_of(text_of(suite, [QUEST], records))["KL"]
    assert cells["dense"]["perplexity"].startswith(f"{math.exp(3):.2f}")
    assert cells["quest 48"]["against dense"].startswith(f"+{100 * math.expm1(0.2):.1f}%")
    assert cells["quest 48"]["bytes / dense"] == "0.250"


def test_a_run_that_read_everything_is_dense_and_no_estimate() -> None:
    records = [
        answers_record(DENSE, [50.0] * 4, 100, layers=(0, 1), kl=(0.0, 0.0)),
        answers_record(QUEST, [50.0] * 4, 100, kl=(0.0, 0.0), top1=(True, True)),
    ]
    text = text_of(NeedleSuite(), [QUEST], records)
    cells = tables_of(text)["KL"]["quest 48"]
    assert (cells["top-1"], cells["KL"], cells["against dense"]) == ("1.000", "0.0000", "+0.000")
    assert "quest 48: no controls, since all of its rows read the whole context" in text
    nearly = [records[0], answers_record(QUEST, [50.0] * 4, 27, kl=(0.0, 0.0), top1=(True, True))]
    assert tables_of(text_of(NeedleSuite(), [QUEST], nearly))["KL"]["quest 48"]["top-1"] == "1.000 [0.688, 1.000]"


def test_why_rows_were_dense_and_which_controls_are_missing_is_said_apart() -> None:
    record = answers_record(QUEST, [1.0] * 4, 27)
    record["counters"]["rows_sparse"] = 4  # of 4 steps x 2 heads x 1 layer that selects
    record["short_rows"] = 2
    dense = answers_record(DENSE, [1.0] * 4, 100, layers=(0, 1))
    text = text_of(NeedleSuite(), [QUEST, TWILIGHT], [dense, record, answers_record(TWILIGHT, [1.0], 60)])
    cells = tables_of(text)["dense: whole context read"]["quest 48"]
    assert list(cells.values())[2:] == ["0.250", "0.500", "0.125", "0.125"]
    assert "- quest 48: window 48, random 48, oracle_topk 48 not run (--no-controls" in text
    assert "- twilight p=0.9: quest 64, window 64, random 64, oracle_topk 64 not run (--no-controls" in text


def test_groups_and_tasks_in_which_dense_itself_fails_are_named() -> None:
    rows = answers_record(DENSE, [100.0, 0.0, 0.0], 100, layers=(0, 1), tasks=["single", "multikey", "multikey"], needed=50.0)
    text = text_of(NeedleSuite(), [], [rows])
    (failure,) = dense_failures(NeedleSuite(), [rows], ["g"])
    assert f"**{failure}**" in text
    assert failure.startswith(
        "needle, g, multikey: dense attention itself has references found (0-100) 0 over 2 examples, below 50"
    )
    agreement = AgreementSuite(text=("t",))
    for score, fails in ((8.0, True), (3.0, False)):
        records = [answers_record(DENSE, [score], 100, layers=(0, 1), needed=7.0)]
        assert bool(dense_failures(agreement, records, ["g"])) is fails


def test_a_loss_at_equal_density_is_printed() -> None:
    text = text_of(RecallSuite(), [TWILIGHT], RECORDS)
    assert "- twilight p=0.9: gain over quest at equal density: -0.12 (a loss) (0.375 at density 0.600, quest 64 0.500" in text
    better = [*RECORDS[:-1], answers_record(control("quest", 64), [0.0, 0.0], 59)]
    assert "gain over quest at equal density: +0.38 (0.375" in text_of(RecallSuite(), [TWILIGHT], better)


def test_a_lower_perplexity_is_a_gain() -> None:
    text = text_of(AgreementSuite(text=("t",)), [TWILIGHT], RECORDS)
    gain = math.exp(0.5) - math.exp(0.375)
    assert f"gain over quest at equal density: +{gain:.2f} ({math.exp(0.375):.3f}" in text


def test_the_smallest_budget_that_is_enough_is_named() -> None:
    rows = rows_of(text_of(RecallSuite(), [QUEST, TWILIGHT], RECORDS))
    assert "by the mean score over 4 questions" in text_of(RecallSuite(), [QUEST, TWILIGHT], RECORDS)
    assert rows["oracle_topk"] == ["48", "48"]  # .975
    assert rows["quest"] == ["none of them", "48, 64"]


def test_scores_by_task_have_a_table_of_their_own() -> None:
    records = [answers_record(DENSE, [50.0, 100.0], 100, layers=(0, 1), tasks=["single", "multikey"])]
    text = text_of(NeedleSuite(), [], records)
    assert "references found (0-100) by task, 2 examples and 4 tokens in all" in text
    assert "| task | single | multikey |" in text and "| dense | 50.0 | 100.0 |" in text


PROFILE = [
    trace_record(DENSE, 1.0, 1e-6, layers=(0, 1)),
    trace_record(control("oracle_topk", 16), 0.75, 0.5, layers=(0, 1)),
]


def test_a_profile_tells_tokens_overlap_and_error_by_entropy() -> None:
    text = text_of(ProfileSuite(), [control("oracle_topk", 16)], PROFILE)
    rows = text.splitlines()
    assert "1 texts, 1 decode steps in all" in text
    assert "| 1 | 10 | 20 | 40 | 60 | 60 | 2.50 |" in rows  # layer 1: tokens for .5, .9, .95, .99, most, entropy
    assert "| 1 | 40 | 40 | 40 | 40 |" in rows  # by query head
    assert "| oracle_topk 16 | 0.250 | 0.500 | 0.250 | 0.500 |" in rows
    first = "0.2500 (H 1.00)"  # both layers' rows: one without an error, one with .5
    assert any(row.startswith(f"| oracle_topk 16 | 0.580 | {first} | ") and row.endswith("(H 4.00) | 0.2500 |") for row in rows)


def test_overrides_hold_95_percent_in_whole_pages(tmp_path: Path) -> None:
    needed = tokens_needed(PROFILE, "g")
    assert needed is not None
    assert layer_budgets(needed, 16, dense_layers=0, forced_pages=2) == [
        {"range": "0", "token_budget": 32},  # 20 tokens
        {"range": "1", "token_budget": 48},  # 40 tokens
    ]
    assert layer_budgets(needed, 64, dense_layers=0, forced_pages=2) == [{"range": "0-1", "token_budget": 128}]
    overrides = layer_budgets(needed, 16, dense_layers=1, forced_pages=2)
    write_layers(tmp_path / "layers.yaml", overrides, "g")
    read = yaml.safe_load((tmp_path / "layers.yaml").read_text())
    (quest,) = parse_methods(["quest"], [64], base={"method": "quest", "dense_layers": 1, **read})
    assert quest["layers"] == [{"range": "1", "token_budget": 48}]


def test_plots_are_png_files(tmp_path: Path) -> None:
    written = write_plots(tmp_path, RecallSuite(), [QUEST, TWILIGHT], RECORDS, 16)
    assert [path.name for path in written] == ["agreement-g.png", "score-g.png", "density-g.png", "mass-g.png", "tokens-g.png"]
    profile = write_plots(tmp_path / ".", ProfileSuite(), [control("oracle_topk", 16)], PROFILE, 16)
    assert [path.name for path in profile] == ["mass-g.png", "tokens-g.png", "error-g.png"]
    for path in (*written, *profile):
        assert path.read_bytes().startswith(b"\x89PNG\r\n") and path.stat().st_size > 5000


def test_numbers_that_were_not_measured_are_dashes() -> None:
    record = answers_record(QUEST, [1.0], 27, kl=())
    text = text_of(RecallSuite(), [QUEST], [record])
    tables = tables_of(text)
    assert tables["mass"]["quest 48"]["error"] == "- / -" and tables["KL"]["quest 48"]["KL"] == "-"
    assert np.isnan(summarise_run([record], record["run"], "g").kl.mean)  # type: ignore[union-attr]
