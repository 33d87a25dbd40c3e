"""ruler beside lm_eval's implementation (pip install 'lm_eval[ruler]'): of the same random draws both make the same prompts."""

from __future__ import annotations

import importlib
import json
import random
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from distributed_sparse.tools.evaluation.haystack import split_sentences
from distributed_sparse.tools.evaluation.suite import Answer, Example
from distributed_sparse.tools.evaluation.suites import ruler_tasks
from distributed_sparse.tools.evaluation.suites.ruler import RulerSuite
from distributed_sparse.tools.evaluation.suites.ruler_tasks import TASKS, Sample
from distributed_sparse.tools.evaluation.suites.ruler_texts import RulerTexts
from tests.tools.evaluation.test_ruler import HOTPOTQA, MADE, SQUAD, TOKENIZER

NIAH = [task for task in MADE if task.startswith("niah")]
SEED = 42
pytestmark = pytest.mark.slow  # they make a list of all six million pairs of words


class Drawn(Sample):
    """A sample whose draws are those of `random.seed(name)`, which lm_eval draws from."""

    def rng(self) -> random.Random:
        return random.Random(self.name)


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """lm_eval's modules of RULER, without the rest of its tasks, and without nltk's download of sentence models."""
    spec = find_spec("lm_eval")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("lm_eval is not installed")
    tasks: Any = types.ModuleType("lm_eval.tasks")
    tasks.__path__ = [f"{spec.submodule_search_locations[0]}/tasks"]
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    monkeypatch.setattr(pytest.importorskip("nltk").data, "find", lambda name: name)
    names = ("prepare_niah", "niah_utils", "vt_utils", "cwe_utils", "fwe_utils", "qa_utils", "common_utils")
    try:
        found = {name: importlib.import_module(f"lm_eval.tasks.ruler.{name}") for name in names}
    except ImportError as error:
        pytest.skip(f"lm_eval's extra ruler is not installed: {error}")
    return types.SimpleNamespace(**found)


@pytest.fixture
def texts(tmp_path: Path) -> RulerTexts:
    (tmp_path / "essay.txt").write_text(" ".join(f"Word {i}." for i in range(400)))
    (tmp_path / "squad.json").write_text(json.dumps(SQUAD))
    (tmp_path / "hotpotqa.json").write_text(json.dumps(HOTPOTQA))
    return RulerTexts(*(str(tmp_path / name) for name in ("essay.txt", "squad.json", "hotpotqa.json")))


@pytest.mark.parametrize("task", NIAH)
def test_needles(task: str, theirs: Any, texts: RulerTexts, monkeypatch: pytest.MonkeyPatch) -> None:
    own = TASKS[task].make.keywords  # type: ignore[attr-defined]
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        theirs.niah_utils, "generate_samples", lambda haystack, **settings: given.update(settings) or iter([[]])
    )
    monkeypatch.setattr(theirs.niah_utils, "get_haystack", lambda type_haystack: None)
    monkeypatch.setattr(theirs.niah_utils, "get_tokenizer", lambda *_, **__: None)
    monkeypatch.setattr(theirs.niah_utils, "download_dataset", list)
    getattr(theirs.niah_utils, task)(max_seq_lengths=[4096], pretrained="x")
    numbers = {name: given.get(f"num_needle_{name}", 1) for name in "kvq"}
    numbers["k"] = max(numbers["k"], numbers["q"])
    kinds = {name: given[f"type_needle_{name}"] for name in "kv"}
    assert numbers == {name: own[f"num_{name}"] for name in "kvq"}
    assert kinds == {"k": own["keys"], "v": own["values"]}
    assert given["type_haystack"] == own["haystack"].replace("noise", "repeat")

    prepare = theirs.prepare_niah
    monkeypatch.setattr(
        prepare, "generate_random_word", lambda: f"{random.choice(texts.adjectives)}-{random.choice(texts.nouns)}"
    )
    monkeypatch.setattr(prepare, "cached_sent_tokenize", split_sentences)
    essay = own["haystack"] == "essay"
    haystack = texts.essay_words if essay else prepare.get_haystack(given["type_haystack"])
    for number in range(5):
        mine = TASKS[task].make(Drawn(texts, f"{task} {number}", 4096, 0, SEED), 300)
        random.seed(f"{task} {number}")
        text, answers, query = prepare.generate_input_output(
            300 if essay else 300 + own["num_k"] * own["num_v"], haystack,
            type_haystack=given["type_haystack"], template=given["template"],
            **{f"num_needle_{name}": value for name, value in numbers.items()},
            **{f"type_needle_{name}": value for name, value in kinds.items()},
        )  # fmt: skip
        assert (mine.before + mine.question, list(mine.references)) == (text, answers)
        assert f" for {query} mentioned in the provided text " in mine.cue


def test_variables(theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = types.SimpleNamespace(random=types.SimpleNamespace(randint=random.randrange))
    monkeypatch.setattr(theirs.vt_utils, "np", draws)
    for number in range(5):
        rng = random.Random(number)
        mine = ruler_tasks._tracking(rng, rng, 5, 30)
        random.seed(number)
        text, names = theirs.vt_utils.generate_input_output(35, 1, 4)
        assert list(mine.references) == names
        # they join the lines by blanks, and have a slip that RULER has mended since
        assert mine.text.split() == text.replace("assgined", "assigned").split()


@pytest.mark.parametrize("length", [2048, 4096])
def test_common_words(length: int, theirs: Any, texts: RulerTexts, monkeypatch: pytest.MonkeyPatch) -> None:
    cwe = theirs.cwe_utils
    assert sorted(cwe.WORDS) == texts.words
    monkeypatch.setattr(cwe, "WORDS", texts.words)
    # RULER shuffles each list by its seed, they by one stream
    monkeypatch.setattr(cwe, "RNG", types.SimpleNamespace(shuffle=lambda words: random.Random(SEED).shuffle(words)))
    for number in range(5):
        mine = ruler_tasks.common_words(Drawn(texts, str(number), length, 0, SEED), 50)
        random.seed(str(number))
        shot, text, answer = cwe.generate_input_output(60, length)
        assert list(mine.references) == answer
        assert mine.text == f"{shot.replace('list are:1.', 'list are: 1.')}\n{text}"  # RULER has that blank


@pytest.mark.parametrize("length", [1024, 4096])
def test_frequent_words(length: int, theirs: Any, texts: RulerTexts) -> None:
    for number in range(5):
        mine = ruler_tasks.frequent_words(Drawn(texts, str(number), length, 0, SEED), 220)
        random.seed(str(number))
        vocabulary = (length - TASKS["fwe"].max_tokens) // 50
        text, answer, _ = theirs.fwe_utils.generate_input_output(10**6, TOKENIZER, num_words=300, vocab_size=vocabulary)
        assert (mine.text, list(mine.references)) == (text, answer)


@pytest.mark.parametrize("task", ["qa_1", "qa_2"])
def test_questions(task: str, theirs: Any, texts: RulerTexts, monkeypatch: pytest.MonkeyPatch) -> None:
    qa = theirs.qa_utils
    monkeypatch.setattr(qa, "download_json", lambda url: SQUAD if "dev-v2" in url else HOTPOTQA)
    questions, documents = (qa.read_squad if task == "qa_1" else qa.read_hotpotqa).__wrapped__()
    for number, count in ((0, 0), (0, 1), (1, 20), (5, 40)):
        mine = TASKS[task].make(Drawn(texts, str(number), 4096, number, SEED), count)
        random.seed(str(number))
        own = len(questions[number]["context"])
        text, answers = qa.generate_input_output(number, count + own, questions, documents)
        assert (mine.before + mine.question, list(mine.references)) == (text, answers)
        assert mine.cue.strip() == qa.CONFIG["answer_prefix"]


def test_answer_lengths_and_scores(theirs: Any) -> None:
    assert TASKS["vt"].max_tokens == theirs.vt_utils.CONFIG["variable_tracking"]["tokens_to_generate"]
    for task, module in (("cwe", theirs.cwe_utils), ("fwe", theirs.fwe_utils), ("qa_1", theirs.qa_utils)):
        assert TASKS[task].max_tokens == module.CONFIG["tokens_to_generate"]
    rng, suite = random.Random(0), RulerSuite()
    for task in MADE:  # of qa, they count a share of one question's answers, RULER whether one is there
        for _ in range(20):
            references = [str(rng.randrange(100, 1000)) for _ in range(rng.choice([1, 3, 4, 5]))]
            said = "\t".join([*rng.sample(references, rng.randrange(len(references) + 1)), str(rng.randrange(100, 1000))])
            example = Example("x", "x", [1, 2, 3], 1, 5, references=tuple(references), meta={"task": task})
            wanted = theirs.common_utils.process_results({"max_length": 4096, "outputs": references}, [said])["4096"]
            assert suite.score(example, Answer(said))["score"] == pytest.approx(100 * wanted)
