"""needle_tasks: the seven tasks of the suite `needle`; each makes a text of any size, a question, and the right answers."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from distributed_sparse.tools.evaluation.haystack import different, with_needles

_SYLLABLES = [first + vowel for first in "bdfgklmnprstvz" for vowel in "aeiou"]


@dataclass(frozen=True)
class NeedlePrompt:
    """The prompt is `before(count) + question + cue`; it grows with `count`, and the cue begins the answer."""

    before: Callable[[int], str]
    question: str
    cue: str
    references: tuple[str, ...]


class NeedleTask(NamedTuple):
    """`make`: (random generator, depth of the first needle, the haystack's sentences) -> prompt; `max_tokens`: of an answer."""

    make: Callable[[random.Random, float, Sequence[str]], NeedlePrompt]
    max_tokens: int


def _names(rng: random.Random, count: int) -> list[str]:
    """Different invented words of equal length, so that none is part of another."""
    return different(lambda: "".join(rng.choices(_SYLLABLES, k=3)), count)


def _numbers(rng: random.Random, count: int) -> list[str]:
    """Different numbers of seven digits."""
    return [str(number) for number in rng.sample(range(1_000_000, 10_000_000), count)]


def _secrets(
    rng: random.Random, depth: float, haystack: Sequence[str], *, asked: int = 1, values: int = 1, distractors: int = 0
) -> NeedlePrompt:
    """Plant "one secret number of NAME is N".

    The question asks for `asked` names with `values` numbers each; `distractors` other names have one number each. The first
    needle is at `depth`, the others anywhere.
    """
    names = _names(rng, asked + distractors)
    numbers = _numbers(rng, asked * values + distractors)
    owners = [name for name in names[:asked] for _ in range(values)] + names[asked:]
    places = [depth, *(rng.random() for _ in owners[1:])]
    needles = [
        (place, f"Note this down: one secret number of {name} is {number}.")
        for place, name, number in zip(places, owners, numbers, strict=True)
    ]
    offset = rng.randrange(1_000_000)
    whose = " and of ".join(names[:asked])
    many = asked * values > 1
    introduction = "Secret numbers are mentioned in the text below. Keep them in mind: they will be asked for.\n\n"
    return NeedlePrompt(
        lambda count: introduction + with_needles(haystack, needles, count, offset),
        f"\n\nWhich {'are all the secret numbers' if many else 'is the secret number'} of {whose}?",
        f" According to the text, the secret {'numbers' if many else 'number'} of {whose} {'are' if many else 'is'}",
        tuple(numbers[: asked * values]),
    )


def _variable_tracking(rng: random.Random, depth: float, haystack: Sequence[str]) -> NeedlePrompt:
    """Plant two chains of five variables, each set to the one before it; ask which hold the first chain's value."""
    letters = ["".join(pair) for pair in zip(rng.sample(string.ascii_uppercase, 10), rng.choices(string.ascii_uppercase, k=10))]
    names = [f"{pair}{rng.randrange(10, 100)}" for pair in letters]  # first letters differ: none is part of another
    chain, other = names[:5], names[5:]
    value, other_value = _numbers(rng, 2)
    needles: list[tuple[float, str]] = []
    for of_chain, start in ((chain, value), (other, other_value)):
        first = depth if of_chain is chain else rng.random()
        # sorted: a variable is set after the one whose value it takes
        places = sorted(first + (1 - first) * rng.random() for _ in of_chain[1:])
        sources = [start, *of_chain[:-1]]
        needles += [
            (place, f"Set variable {name} = {source}.") for place, name, source in zip([first, *places], of_chain, sources)
        ]
    offset = rng.randrange(1_000_000)
    introduction = "Variables are set in the text below, some of them to the value of another. Follow them.\n\n"
    return NeedlePrompt(
        lambda count: introduction + with_needles(haystack, needles, count, offset),
        f"\n\nWhich five variables hold the value {value}?",
        f" The variables that hold {value} are",
        tuple(chain),
    )


def _common_words(rng: random.Random, depth: float, haystack: Sequence[str]) -> NeedlePrompt:
    """A shuffled, numbered list: ten words occur thirty times, `count` others three times."""
    words = _names(rng, 10)
    seed = rng.random()

    def before(count: int) -> str:
        own = random.Random(seed)
        others = [word for word in _names(own, count + 10) if word not in words][:count]
        every = words * 30 + others * 3
        own.shuffle(every)
        introduction = "Below is a numbered list of words. Some of them appear much more often than the others; remember those."
        return f"{introduction}\n\n{' '.join(f'{i}. {word}' for i, word in enumerate(every, 1))}"

    return NeedlePrompt(
        before, "\n\nWhich ten words appear most often in the list?", " The ten most common words are", tuple(words)
    )


def _frequent_words(rng: random.Random, depth: float, haystack: Sequence[str]) -> NeedlePrompt:
    """A coded text whose n-th word occurs in proportion to n ** -2; ask for the three most frequent.

    With that exponent the third word clearly outnumbers the fourth.
    """
    vocabulary = _names(rng, 40)
    seed = rng.random()

    def before(count: int) -> str:
        length = 60 + count  # 60 words suffice to order the first four
        shares = [rank**-2.0 for rank in range(1, len(vocabulary) + 1)]
        times = [round(length * share / sum(shares)) for share in shares]
        every = [word for word, number in zip(vocabulary, times) for _ in range(number)]
        random.Random(seed).shuffle(every)
        return "Below is a text in a code. Count how often each of its words appears.\n\n" + " ".join(every)

    question = "\n\nWhich three words appear most often in the text in code?"
    return NeedlePrompt(before, question, " The three most frequent words are", tuple(vocabulary[:3]))


TASKS = {
    "single": NeedleTask(_secrets, 32),
    "multikey": NeedleTask(partial(_secrets, distractors=7), 32),
    "multivalue": NeedleTask(partial(_secrets, values=4), 96),
    "multiquery": NeedleTask(partial(_secrets, asked=4), 96),
    "variable-tracking": NeedleTask(_variable_tracking, 48),
    "common-words": NeedleTask(_common_words, 96),
    "frequent-words": NeedleTask(_frequent_words, 32),
}
