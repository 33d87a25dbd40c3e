"""longbench: files of the benchmark's form become prompts with whole questions, judged by each dataset's own metric."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distributed_sparse.tools.evaluation.suite import Answer, EvaluatedModel
from distributed_sparse.tools.evaluation.suites.longbench import LongBenchSuite
from distributed_sparse.tools.evaluation.suites.longbench_datasets import DATASETS
from tests.support.text_checkpoint import byte_level_bos_tokenizer

TOKENIZER = byte_level_bos_tokenizer()
MODEL = EvaluatedModel("tiny", 331, 3000, TOKENIZER)


def write(folder: Path, dataset: str, *rows: dict[str, Any]) -> None:
    base = {"input": "Who came?", "context": "Ann came. " * 20, "answers": ["Ann"], "all_classes": None, "length": 40}
    (folder / f"{dataset}.jsonl").write_text("".join(json.dumps({**base, "dataset": dataset, **row}) + "\n" for row in rows))


def score(folder: Path, dataset: str, text: str, **row: Any) -> float:
    write(folder, dataset, row)
    suite = LongBenchSuite(data=str(folder), datasets=(dataset,))
    (example,) = suite.examples(MODEL)
    return suite.score(example, Answer(text))["score"]


@pytest.mark.parametrize(
    ("dataset", "row", "text", "wanted"),
    [
        ("hotpotqa", {"answers": ["Ann Lee", "Bo"]}, "Ann", 100 * 2 / 3),  # the best of the references counts
        ("triviaqa", {"answers": ["Ann"]}, "\nAnn\nPassage: Bo came", 100),  # of the first line alone
        ("multifieldqa_zh", {"answers": ["你好"]}, "你 好。", 100),
        ("gov_report", {"answers": ["a c d"]}, "A b c d", 100 * 6 / 7),
        ("trec", {"answers": ["City"], "all_classes": ["City", "Country"]}, "City\nCountry", 100),
        ("passage_retrieval_en", {"answers": ["Paragraph 3"]}, "Paragraph 3, not 4", 50),
        ("passage_count", {"answers": ["7"]}, "7", 100),
        ("lcc", {"answers": ["x = 1"]}, "x = 1\ny", 100),
    ],
)
def test_each_dataset_has_its_metric(tmp_path: Path, dataset: str, row: dict[str, Any], text: str, wanted: float) -> None:
    assert score(tmp_path, dataset, text, **row) == pytest.approx(wanted)


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_dataset_makes_a_prompt_that_ends_in_its_question(tmp_path: Path, dataset: str) -> None:
    write(tmp_path, dataset, {})
    (example,) = LongBenchSuite(data=str(tmp_path)).examples(MODEL)
    text = TOKENIZER.decode(example.token_ids, skip_special_tokens=True)
    question = TOKENIZER.decode(example.token_ids[-example.num_question_tokens :])
    assert text.count("Ann came.") == 20 and "Ann came." not in question and text.endswith(question)
    asked = DATASETS[dataset].template.split("{context}")[1]
    assert ("Who came?" in question) == ("{input}" in asked)


def test_the_benchmarks_own_prompts_are_used_where_they_are(tmp_path: Path) -> None:
    write(tmp_path, "hotpotqa", {})
    suite = LongBenchSuite(data=str(tmp_path))
    assert suite.options()["templates"] == "own words"
    (tmp_path / "dataset2prompt.json").write_text(json.dumps({"hotpotqa": "Given: {context}\nAsked: {input}\nSaid:"}))
    (example,) = suite.examples(MODEL)
    text = TOKENIZER.decode(example.token_ids, skip_special_tokens=True)
    assert text.startswith("Given: Ann came.") and text.endswith("\nAsked: Who came?\nSaid:")
    assert suite.options()["templates"] == "the benchmark's"


def test_a_long_prompt_loses_its_middle(tmp_path: Path) -> None:
    context = "".join(f"<{i}>" for i in range(2000))
    write(tmp_path, "hotpotqa", {"context": context})
    (example,) = LongBenchSuite(data=str(tmp_path), max_length=600).examples(MODEL)
    text = TOKENIZER.decode(example.token_ids, skip_special_tokens=True)
    assert 560 <= len(example.token_ids) <= 600
    assert text.startswith(DATASETS["hotpotqa"].template.split("{context}")[0] + "<0><1>")
    assert "<1999>\n\nQuestion: Who came?\nAnswer:" in text and "<1000>" not in text


def test_without_a_length_a_prompt_fits_the_model(tmp_path: Path) -> None:
    write(tmp_path, "hotpotqa", {"context": "x" * 9000})
    (example,) = LongBenchSuite(data=str(tmp_path)).examples(MODEL)
    assert 2900 < len(example.token_ids) + example.max_tokens <= 3000


def test_long_questions_are_decoded_in_part_and_examples_can_be_limited(tmp_path: Path) -> None:
    write(tmp_path, "repobench-p", *({"input": "y = 2\n" * 50, "context": f"# {i}\n" * 10} for i in range(5)))
    examples = LongBenchSuite(data=str(tmp_path), limit=2, max_question_tokens=40).examples(MODEL)
    assert [example.id for example in examples] == ["repobench-p-0", "repobench-p-1"]
    assert all(example.num_question_tokens == 40 and example.group == "LongBench" for example in examples)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "missing"}, r"data='missing' is no folder; give --data DIR"),
        ({"datasets": ("qasper",)}, r"has no qasper.jsonl; it has hotpotqa"),
        ({"datasets": ("squad",)}, r"datasets='squad' is not known"),
        ({"max_length": 2990}, r"max_length=2990 and 32 tokens of answer \(hotpotqa\) are over max_model_len=3000"),
        ({"max_length": 20}, r"hotpotqa 0: the question and its instructions have \d+ tokens, over max_length=20"),
        ({"templates": "missing.json"}, r"templates='missing.json' cannot be read"),
    ],
)
def test_what_does_not_hold_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    write(tmp_path, "hotpotqa", {})
    with pytest.raises(ValueError, match=message):
        LongBenchSuite(**{"data": str(tmp_path), **settings}).examples(MODEL)


def test_longbench_e_is_taken_only_where_longbench_is_not(tmp_path: Path) -> None:
    for file in ("qasper", "qasper_e", "trec_e"):
        write(tmp_path, file, {"input": file, "answers": ["a"]})
    suite = LongBenchSuite(data=str(tmp_path))
    assert {name: path.name for name, path in suite._files().items()} == {"qasper": "qasper.jsonl", "trec": "trec_e.jsonl"}
    assert list(suite.options()["data_sha256"]) == ["qasper.jsonl", "trec_e.jsonl"]


def test_a_row_without_answers_is_refused_by_line(tmp_path: Path) -> None:
    write(tmp_path, "hotpotqa", {}, {"answers": []})
    with pytest.raises(ValueError, match=r"hotpotqa.jsonl, line 2: .* has not all of input, context, answers"):
        LongBenchSuite(data=str(tmp_path)).examples(MODEL)
