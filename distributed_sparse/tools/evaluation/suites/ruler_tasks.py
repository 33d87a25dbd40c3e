"""ruler_tasks: the thirteen tasks of RULER (Hsieh et al., arXiv 2404.06654), prompts of any size with the right answers.

Templates, parameters and the order of random draws are those of github.com/NVIDIA/RULER (scripts/synthetic.yaml and
scripts/data/synthetic/). The templates are verbatim, so that scores are comparable.
"""

from __future__ import annotations

import itertools
import math
import random
import string
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from distributed_sparse.tools.evaluation.haystack import different, split_sentences
from distributed_sparse.tools.evaluation.suites.ruler_texts import Question, RulerTexts

NIAH = (
    "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {type_needle_v} afterwards.\n{context}\nWhat are all the special magic {type_needle_v} for {query} mentioned in the "
    "provided text?",
    " The special magic {type_needle_v} for {query} mentioned in the provided text are",
)
VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find all "
    "variables that are assigned the value {query} in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are assigned the value "
    "{query}, they are: ",
)
CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most "
    "often.\n{context}\nQuestion: What are the 10 most common words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
)
FWE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded "
    "words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
    "frequently appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
)
QA = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\nThe "
    "following are given documents.\n\n{context}\n\nAnswer the question based on the given documents. Only give me the answer "
    "and do not output any other words.\n\nQuestion: {query}",
    " Answer:",
)
"""(template, answer prefix) of each kind of task."""

NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = [round(100 * i / 39) for i in range(40)]
"""Needle depths to draw from, in per cent of an essay haystack's sentences."""

NUM_HOPS = 4
SHOT_LENGTH = 500
"""Tokens of vt's example of an answer, at most."""
FWE_TOKENS = 50
SHORT = 4096
"""Below this length in tokens, cwe's words occur less often."""


@dataclass(frozen=True)
class Prompt:
    """The model continues `before + question + cue`; the cue begins its answer."""

    before: str
    question: str
    cue: str
    references: tuple[str, ...]

    @property
    def text(self) -> str:
        return self.before + self.question + self.cue


@dataclass(frozen=True)
class Sample:
    """One example of a task, without the size of its haystack.

    Attributes:
        name: seeds the random draws, together with `seed`.
        length: tokens of prompt and answer, at most.
        number: index of the example.
        shot_noises: size of vt's example of an answer; see `tracking_shot`.
    """

    texts: RulerTexts
    name: str
    length: int
    number: int
    seed: int
    shot_noises: int = 0

    def rng(self) -> random.Random:
        return random.Random(f"{self.seed} {self.name}")

    def shuffle(self, values: list[str]) -> list[str]:
        """Shuffle in place, with the same generator state in all samples."""
        random.Random(self.seed).shuffle(values)
        return values


@dataclass(frozen=True)
class RulerTask:
    """A task.

    Attributes:
        make: (sample, count) -> prompt. It grows with `count`, and is smallest at 0.
        max_tokens: tokens of an answer.
        most: the largest count for which the texts suffice.
        needs: the attributes of `RulerTexts` that it reads.
        any_reference: one right answer scores 1; otherwise the score is the share of right answers.
        most_samples: the number of samples available.
    """

    make: Callable[[Sample, int], Prompt]
    max_tokens: int
    most: Callable[[RulerTexts], int] = lambda texts: sys.maxsize
    needs: tuple[str, ...] = ()
    any_reference: bool = False
    most_samples: Callable[[RulerTexts], int] = lambda texts: sys.maxsize


def _filled(kind: tuple[str, str], context: str, references: Sequence[str], **values: object) -> Prompt:
    before, _, question = kind[0].partition("{context}")
    return Prompt(before.format(**values) + context, question.format(**values), kind[1].format(**values), tuple(references))


# ---- niah: needles in a haystack


def niah(sample: Sample, count: int, *, haystack: str, keys: str, values: str, num_k: int, num_v: int, num_q: int) -> Prompt:
    """Hide `num_k` keys with `num_v` values each in noise, in essays, or among other needles; ask for `num_q` keys."""
    rng, used = sample.rng(), set[str]()

    def draw(kind: str) -> str:
        drawn = _KINDS[kind](rng, sample.texts)
        while drawn in used:
            drawn = _KINDS[kind](rng, sample.texts)
        used.add(drawn)
        return drawn

    def needle(key: str, value: str) -> str:
        return NEEDLE.format(type_needle_v=values, key=key, value=value)

    hidden: dict[str, list[str]] = {}
    for _ in range(num_k):
        key = draw(keys)
        hidden[key] = [draw(values) for _ in range(num_v)]
    needles = sample.shuffle([needle(key, value) for key, of_key in hidden.items() for value in of_key])

    if haystack == "essay":
        context = _in_essays(rng, sample.texts.essay_words, count, needles)
    else:
        count += len(needles)  # so that each needle precedes a sentence of its own
        hay = [NOISE] * count if haystack == "noise" else [needle(draw(keys), draw(values)) for _ in range(count)]
        for place, one in zip(sorted(rng.sample(range(count), len(needles)), reverse=True), needles, strict=True):
            hay.insert(place, one)
        context = "\n".join(hay)

    asked = [list(hidden)[i] for i in rng.sample(range(num_k), num_q)]
    query = ", ".join(asked[:-1]) + ", and " + asked[-1] if num_q > 1 else asked[0]
    kind, what = NIAH, values
    if num_q * num_v == 1:
        template, prefix = (text.replace("Some", "A").replace("are all", "is").replace("are", "is") for text in NIAH)
        kind, what = (template, prefix), values.removesuffix("s")
    return _filled(kind, context, [value for key in asked for value in hidden[key]], type_needle_v=what, query=query)


_KINDS: dict[str, Callable[[random.Random, RulerTexts], str]] = {
    "words": lambda rng, texts: f"{rng.choice(texts.adjectives)}-{rng.choice(texts.nouns)}",
    "numbers": lambda rng, texts: str(rng.randint(1_000_000, 9_999_999)),
    "uuids": lambda rng, texts: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
}


def _in_essays(rng: random.Random, words: Sequence[str], count: int, needles: Sequence[str]) -> str:
    """The first `count` words of the essays, repeated when they run out, with needles between sentences."""
    rounds, rest = divmod(count, len(words))
    sentences = split_sentences(" ".join([*words] * rounds + [*words[:rest]]))
    places = sorted(int(len(sentences) * (depth / 100)) for depth in rng.sample(DEPTHS, len(needles)))
    pieces, used = [], 0
    for place, one in zip(places, needles, strict=True):
        pieces += [" ".join(sentences[used:place]), one]
        used = place
    return " ".join([*pieces, " ".join(sentences[used:])])


# ---- vt: variable tracking


def _tracking(rng: random.Random, places: random.Random, letters: int, noises: int) -> Prompt:
    """A chain of variables, each set to the one before it; ask which hold the first one's value."""
    names = different(lambda: "".join(rng.choices(string.ascii_uppercase, k=letters)), NUM_HOPS + 1)
    value = str(rng.randrange(10_000, 99_999))
    chain = [f"VAR {names[0]} = {value}", *(f"VAR {name} = VAR {of} " for of, name in itertools.pairwise(names))]
    hay = [NOISE] * (noises + len(chain))
    for shift, (place, link) in enumerate(zip(sorted(places.sample(range(len(hay)), len(chain))), chain, strict=True)):
        hay.insert(place + shift, link)
    return _filled(VT, "\n".join(hay), names, query=value, num_v=len(names))


def tracking_shot(rng: random.Random, seed: int, noises: int) -> Prompt:
    """vt's example of an answer: names are shorter, and the chain is at the same places in all samples."""
    return _tracking(rng, random.Random(seed), 3, noises)


def variable_tracking(sample: Sample, count: int) -> Prompt:
    """A chain to track, after an example of an answer."""
    rng = sample.rng()
    asked = _tracking(rng, rng, 5, count)
    shot = tracking_shot(rng, sample.seed, sample.shot_noises)
    before = f"{shot.text} {' '.join(shot.references)}\n\n{asked.before}"
    return Prompt(before, asked.question, asked.cue, asked.references)


# ---- cwe: common words


def _numbered_words(sample: Sample, rng: random.Random, count: int, often: int, rarely: int) -> Prompt:
    """A shuffled list in which ten words occur `often` times and `count - 10` others `rarely` times."""
    drawn = rng.sample(sample.texts.words, count)
    listed = sample.shuffle(drawn[:10] * often + drawn[10:] * rarely)
    return _filled(CWE, _enumerated(listed), drawn[:10])


def _enumerated(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def common_words(sample: Sample, count: int) -> Prompt:
    """A list of words, after an example with a shorter list of other words."""
    rng, short = sample.rng(), sample.length < SHORT
    shot = _numbered_words(sample, rng, *((20, 3, 1) if short else (40, 10, 3)))
    asked = _numbered_words(sample, rng, count + 10, *((6, 1) if short else (30, 3)))
    before = f"{shot.text} {_enumerated(shot.references)}\n{asked.before}"
    return Prompt(before, asked.question, asked.cue, asked.references)


# ---- fwe: frequent words


def frequent_words(sample: Sample, count: int) -> Prompt:
    """Coded words, the n-th in proportion to n ** -2; the first is dots, and the question asks for the next three."""
    rng, num_words = sample.rng(), count + 80  # from 74 on, rank 4 occurs more often than rank 5
    vocabulary = different(
        lambda: "".join(rng.choices(string.ascii_lowercase, k=6)), max(5, (sample.length - FWE_TOKENS) // 50)
    )
    vocabulary = sample.shuffle(sorted(vocabulary))
    vocabulary[0] = "..."
    shares = [rank**-2.0 / (math.pi**2 / 6) for rank in range(1, len(vocabulary) + 1)]  # the zeta function of 2
    coded = [word for word, share in zip(vocabulary, shares) for _ in range(int(num_words * share))]
    return _filled(FWE, " ".join(sample.shuffle(coded)), vocabulary[1:4])


# ---- qa: questions about documents


def answer_question(sample: Sample, count: int, of: str) -> Prompt:
    """A question about documents: its own, then related ones, then others, shuffled."""
    rng, given = sample.rng(), sample.texts.question_set(of)
    question = given.questions[sample.number]
    numbers = _documents(rng, question, count + len(question.documents), len(given.documents))
    documents = sample.shuffle([given.documents[number] for number in numbers])
    context = "\n\n".join(f"Document {number}:\n{document}" for number, document in enumerate(documents, 1))
    return _filled(QA, context, question.answers, query=question.text)


def _documents(rng: random.Random, question: Question, count: int, total: int) -> list[int]:
    """Indices of `count` documents; if there are fewer, all of them, repeated from the first."""
    if count >= total:
        return [i % total for i in range(count)]
    own, related = [*question.documents], [*question.related]
    if count - len(own) <= len(related):
        return own + rng.sample(related, count - len(own))
    known = {*own, *related}
    others = [number for number in range(total) if number not in known]
    return own + related + rng.sample(others, max(0, count - len(own) - len(related)))


# ---- the published set


def _niah(haystack: str, keys: str = "words", values: str = "numbers", k: int = 1, v: int = 1, q: int = 1) -> RulerTask:
    make = partial(niah, haystack=haystack, keys=keys, values=values, num_k=max(k, q), num_v=v, num_q=q)
    needs = {"words": keys == "words", "essay_words": haystack == "essay"}
    return RulerTask(make, max_tokens=128, needs=tuple(need for need, there in needs.items() if there))


def _qa(of: str) -> RulerTask:
    return RulerTask(
        partial(answer_question, of=of), max_tokens=32, needs=(of,), any_reference=True,
        most_samples=lambda texts: len(texts.question_set(of).questions),
    )  # fmt: skip


TASKS: dict[str, RulerTask] = {
    "niah_single_1": _niah("noise"),
    "niah_single_2": _niah("essay"),
    "niah_single_3": _niah("essay", values="uuids"),
    "niah_multikey_1": _niah("essay", k=4),
    "niah_multikey_2": _niah("needle"),
    "niah_multikey_3": _niah("needle", keys="uuids", values="uuids"),
    "niah_multivalue": _niah("essay", v=4),
    "niah_multiquery": _niah("essay", q=4),
    "vt": RulerTask(variable_tracking, max_tokens=30),
    "cwe": RulerTask(common_words, max_tokens=120, most=lambda texts: len(texts.words) - 10, needs=("words",)),
    "fwe": RulerTask(frequent_words, max_tokens=FWE_TOKENS),
    "qa_1": _qa("squad_questions"),
    "qa_2": _qa("hotpotqa_questions"),
}
