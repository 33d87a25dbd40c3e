"""Scores of texts, against values worked out by hand."""

from __future__ import annotations

import pytest

from distributed_sparse.tools.evaluation import text_metrics as metrics


@pytest.mark.parametrize(
    ("text", "references", "share"),
    [
        ("It is 1234 and Blue.", ["1234", "blue"], 1.0),
        ("It is 1234.", ["1234", "blue"], 0.5),
        ("", ["1234"], 0.0),
    ],
)
def test_substring_share(text: str, references: list[str], share: float) -> None:
    assert metrics.substring_share(text, references) == share


def test_words_lose_case_punctuation_and_articles() -> None:
    assert metrics.english_words("The cat, a DOG; an 'ant'!") == ["cat", "dog", "ant"]
    assert metrics.chinese_characters("你好，World 。") == ["你", "好", *"world"]


@pytest.mark.parametrize(
    ("predicted", "wanted", "value"),
    [
        ("red green blue", "green blue", 0.8),  # precision 2/3, recall 1
        ("red red", "red", 2 / 3),  # the second red is not counted again
        ("red", "blue", 0.0),
        ("", "blue", 0.0),
        ("", "", 0.0),
    ],
)
def test_f1(predicted: str, wanted: str, value: float) -> None:
    assert metrics.f1(predicted.split(), wanted.split()) == pytest.approx(value)


@pytest.mark.parametrize(
    ("predicted", "wanted", "value"),
    [
        ("a b c d", "a c d", 6 / 7),  # a c d: precision 3/4, recall 1
        ("d c b a", "a b c d", 0.25),  # one word in order
        ("a b c", "a b c", 1.0),
        ("a", "b", 0.0),
        ("", "b", 0.0),
    ],
)
def test_rouge_l(predicted: str, wanted: str, value: float) -> None:
    assert metrics.rouge_l(predicted.split(), wanted.split()) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Type: City", 1.0),
        ("City or Country", 0.5),
        ("Country", 0.0),
        ("Other location", 0.0),
    ],
)
def test_classification_counts_the_classes_named(text: str, value: float) -> None:
    assert metrics.classification(text, "City", ["City", "Country", "Other location"]) == value


def test_a_class_within_the_wanted_one_is_no_other() -> None:
    assert metrics.classification("Other location", "Other location", ["Other location", "location"]) == 1.0
    assert metrics.classification("Other location", "location", ["Other location", "location"]) == 0.5


@pytest.mark.parametrize(
    ("text", "value"), [("Paragraph 12", 1.0), ("Paragraph 12 or 3", 0.5), ("Paragraph 1, 2", 0.0), ("none", 0.0)]
)
def test_retrieval_counts_the_numbers_named(text: str, value: float) -> None:
    assert metrics.retrieval(text, "Paragraph 12") == value
    assert metrics.retrieval(text, "段落12") == value


def test_retrieval_of_no_paragraph_is_an_error() -> None:
    with pytest.raises(ValueError, match="'twelve' names no paragraph"):
        metrics.retrieval("12", "twelve")


def test_count() -> None:
    assert metrics.count("There are 7, no 8", "7") == 0.5
    assert metrics.count("none", "7") == 0.0


def test_code_similarity_looks_at_the_first_line_of_code() -> None:
    assert metrics.code_similarity("\n# a comment\nx = 1\ny = 2", "x = 1") == 1.0
    assert metrics.code_similarity("x = 2\n", "x = 1") == pytest.approx(0.8)  # 4 of 5 characters each
    assert metrics.code_similarity("# nothing", "x = 1") == 0.0
