"""needle and passkey: each question has just the answers that it counts, in prompts of the asked length."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from distributed_sparse.tools.evaluation.suite import Answer, EvaluatedModel, Example
from distributed_sparse.tools.evaluation.suites.needle import NeedleSuite
from distributed_sparse.tools.evaluation.suites.needle_tasks import TASKS
from distributed_sparse.tools.evaluation.suites.passkey import PasskeySuite
from tests.support.text_checkpoint import byte_level_bos_tokenizer

TOKENIZER = byte_level_bos_tokenizer()
MODEL = EvaluatedModel("tiny", 331, 8192, TOKENIZER)
LENGTH = 6000


def text_of(example: Example) -> str:
    return TOKENIZER.decode(example.token_ids, skip_special_tokens=True)


def one(task: str, depth: float = 0.5, **settings: Any) -> tuple[Example, str, str]:
    """An example, and its text before and from the question on."""
    (example,) = NeedleSuite(tasks=(task,), lengths=(LENGTH,), depths=(depth,), **settings).examples(MODEL)
    question = TOKENIZER.decode(example.token_ids[-example.num_question_tokens :])
    text = text_of(example)
    assert text.endswith(question)
    return example, text[: -len(question)], question


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_is_as_long_as_asked_and_no_longer(task: str) -> None:
    example, _, question = one(task)
    assert LENGTH - 250 < len(example.token_ids) <= LENGTH  # a word of the common-words list stands three times
    assert question.lstrip().startswith("Wh")


@pytest.mark.parametrize("task", TASKS)
def test_the_right_answer_scores_100_and_silence_0(task: str) -> None:
    example, before, question = one(task)
    suite = NeedleSuite()
    assert suite.score(example, Answer(" and ".join(example.references).upper()))["score"] == 100
    assert suite.score(example, Answer("nothing of the kind"))["score"] == 0
    half = example.references[: len(example.references) // 2]
    assert suite.score(example, Answer(", ".join(half)))["score"] == pytest.approx(100 * len(half) / len(example.references))
    assert all(reference in before and reference not in question for reference in example.references)


@pytest.mark.parametrize(
    ("task", "asked", "answers", "needles"),
    [("single", 1, 1, 1), ("multikey", 1, 1, 8), ("multivalue", 1, 4, 4), ("multiquery", 4, 4, 4)],
)
def test_secret_numbers_of_the_asked_names_are_the_answers(task: str, asked: int, answers: int, needles: int) -> None:
    example, before, question = one(task)
    pairs = re.findall(r"one secret number of (\w+) is (\d+)\.", before)
    assert len(pairs) == needles
    names = [name for name in dict(pairs) if name in question]
    assert len(names) == asked and len(example.references) == answers
    assert {number for name, number in pairs if name in names} == set(example.references)
    assert len(re.findall(r"\d{7}", before)) == needles


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_the_needle_stands_at_its_depth(depth: float) -> None:
    example, before, _ = one("single", depth)
    body = before.split("\n\n", 1)[1]
    start = body.index("Note this down")
    needle = len(body[start:].split(". ")[0])
    assert start / (len(body) - needle) == pytest.approx(depth, abs=0.02)
    assert example.meta == {"task": "single", "depth": depth}


def test_a_chain_of_variables_is_set_in_order_and_ends_in_its_value() -> None:
    example, before, question = one("variable-tracking", depth=0.2)
    assert len(re.findall("Set variable", before)) == 10
    (value,) = re.findall(r"hold the value (\d+)", question)
    holders: dict[str, str] = {}
    for name, source in re.findall(r"Set variable (\w+) = (\w+)\.", before):  # in the order of reading
        holders[name] = holders.get(source, source)
    assert {name for name, held in holders.items() if held == value} == set(example.references)
    assert len(set(holders.values())) == 2 and len(holders) == 10


def test_common_words_lead_clearly() -> None:
    example, before, _ = one("common-words")
    counted = Counter(re.findall(r"\d+\. (\w+)", before)).most_common()
    assert {word for word, _ in counted[:10]} == set(example.references)
    assert {times for _, times in counted[:10]} == {30} and {times for _, times in counted[10:]} == {3}


def test_frequent_words_lead_in_their_order() -> None:
    example, before, _ = one("frequent-words")
    (first, a), (second, b), (third, c), (_, d) = Counter(before.split("\n\n", 1)[1].split()).most_common(4)
    assert (first, second, third) == example.references
    assert a > b > c > 1.3 * d


def test_real_text_takes_the_place_of_the_filler(tmp_path: Path) -> None:
    path = tmp_path / "essay.txt"
    path.write_text(" ".join(f"The committee met on day {word}." for word in "abcdefghijklmno"))
    _, before, _ = one("single", haystack_file=str(path))
    assert before.count("The committee met") > 100


def test_examples_repeat_and_differ_from_each_other() -> None:
    suite = NeedleSuite(tasks=("single",), lengths=(600,), depths=(0.5,), samples=3)
    first = suite.examples(MODEL)
    assert first == suite.examples(MODEL)
    assert len({example.references for example in first}) == 3
    assert first != NeedleSuite(tasks=("single",), lengths=(600,), depths=(0.5,), samples=3, seed=1).examples(MODEL)


@pytest.mark.parametrize("task", TASKS)
def test_in_a_chat_the_cue_begins_the_assistants_answer(task: str) -> None:
    """The model goes on with `The secret number is`; in the user's turn it would be a half sentence of the user's."""
    example, _, question = one(task, chat=True)
    asked, _, cue = one(task)[2].lstrip().partition("? ")
    assert cue and question.endswith(f"{asked}?\n[assistant]{cue}")
    assert text_of(example).startswith("[user]") and text_of(example).count("[assistant]") == 1
    assert example.token_ids.count(TOKENIZER.bos_token_id) == 1 and len(example.token_ids) <= LENGTH


def test_the_cue_of_a_pass_key_stands_in_the_assistants_turn() -> None:
    for chat, end in (
        (False, "What is the pass key? The pass key is"),
        (True, "What is the pass key?\n[assistant]The pass key is"),
    ):
        (example,) = PasskeySuite(lengths=(400,), depths=(0.5,), samples=1, chat=chat).examples(MODEL)
        question = TOKENIZER.decode(example.token_ids[-example.num_question_tokens :], skip_special_tokens=True)
        assert question.endswith(end) and "Remember it" not in question


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ("haystack",)}, "tasks='haystack' is not known; use one of 'single'"),
        ({"tasks": ()}, r"tasks=\(\) is empty"),
        ({"lengths": (9000,)}, "length=9000 and 96 tokens of answer are over max_model_len=8192"),
        ({"lengths": (60,)}, "length=60 has no room for its"),
        ({"depths": (1.5,)}, r"depths=\(1.5,\) must be numbers in 0..1"),
        ({"samples": 0}, "samples=0 must be >= 1"),
    ],
)
def test_wrong_options_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeedleSuite(**settings).examples(MODEL)


def test_text_needs_a_tokenizer() -> None:
    for suite in (NeedleSuite(), PasskeySuite()):
        with pytest.raises(ValueError, match=r"'bare' has no tokenizer; give one with --set tokenizer=FOLDER"):
            suite.examples(EvaluatedModel("bare", 331, 8192))


def test_a_pass_key_is_in_its_text_alone_and_at_its_depth() -> None:
    examples = PasskeySuite(lengths=(1000, 2000), depths=(0.0, 0.5, 1.0), samples=2).examples(MODEL)
    assert len(examples) == 12 and len({example.references for example in examples}) == 12
    for example in examples:
        text, (key,) = text_of(example), example.references
        length = int(example.group.split()[0])
        assert length - 60 < len(example.token_ids) <= length
        assert re.findall(r"\d{5}", text) == [key, key]
        body = text.split("\n\n", 1)[1].rsplit("\n\n", 1)[0]
        start = body.index("The pass key is")
        assert start / (len(body) - 60) == pytest.approx(example.meta["depth"], abs=0.05)
        assert PasskeySuite().score(example, Answer(f" {key}."))["score"] == 100
        assert PasskeySuite().score(example, Answer(f" {int(key) + 1}."))["score"] == 0
