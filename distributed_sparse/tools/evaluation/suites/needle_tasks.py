"""The seven tasks of the suite `needle`: each makes a text of any size, a question, and the right answers."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass

from distributed_sparse.tools.evaluation.haystack import Haystack

_SYLLABLES = [first + vowel for first in "bdfgklmnprstvz" for vowel in "aeiou"]


@dataclass(frozen=True)
class NeedleTask:
    """`introduction + body(count) + question + cue` is the prompt; `body` grows with `count`, the cue begins the answer."""

    introduction: str
    body: Callable[[int], str]
    question: str
    cue: str
    references: tuple[str, ...]


def _names(rng: random.Random, count: int) -> list[str]:
    """Different invented words, all of one length: none is part of another."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choices(_SYLLABLES, k=3))] = None
    return list(names)


def _numbers(rng: random.Random, count: int) -> list[str]:
    """Different numbers of seven digits."""
    return [str(number) for number in rng.sample(range(1_000_000, 10_000_000), count)]


def _spread(rng: random.Random, depth: float, count: int) -> list[float]:
    """`depth`, and others anywhere."""
    return [depth, *(rng.random() for _ in range(count - 1))]


def _secrets(rng: random.Random, depth: float, haystack: Haystack, asked: int, values: int, distractors: int) -> NeedleTask:
    """Sentences "the secret number of NAME is N": `asked` names are asked for, each with `values` numbers."""
    names = _names(rng, asked + distractors)
    numbers = _numbers(rng, asked * values + distractors)
    owners = [name for name in names[:asked] for _ in range(values)] + names[asked:]
    needles = [
        (place, f"Note this down: one secret number of {name} is {number}.")
        for place, name, number in zip(_spread(rng, depth, len(owners)), owners, numbers, strict=True)
    ]
    offset = rng.randrange(1_000_000)
    whose = " and of ".join(names[:asked])
    many = asked * values > 1
    return NeedleTask(
        "Secret numbers are mentioned in the text below. Keep them in mind: they will be asked for.\n\n",
        lambda count: haystack.with_needles(needles, count, offset),
        f"\n\nWhich {'are all the secret numbers' if many else 'is the secret number'} of {whose}?",
        f" According to the text, the secret {'numbers' if many else 'number'} of {whose} {'are' if many else 'is'}",
        tuple(numbers[: asked * values]),
    )


def single(rng: random.Random, depth: float, haystack: Haystack) -> NeedleTask:
    """One name with one number."""
    return _secrets(rng, depth, haystack, asked=1, values=1, distractors=0)


def multikey(rng: random.Random, depth: float, haystack: Haystack) -> NeedleTask:
    """One name is asked for, among seven others with numbers of their own."""
    return _secrets(rng, depth, haystack, asked=1, values=1, distractors=7)


def multivalue(rng: random.Random, depth: float, haystack: Haystack) -> NeedleTask:
    """One name with four numbers."""
    return _secrets(rng, depth, haystack, asked=1, values=4, distractors=0)


def multiquery(rng: random.Random, depth: float, haystack: Haystack) -> NeedleTask:
    """Four names are asked for at once."""
    return _secrets(rng, depth, haystack, asked=4, values=1, distractors=0)


def variable_tracking(rng: random.Random, depth: float, haystack: Haystack) -> NeedleTask:
    """A chain of five names, each set to the one before it, and a second chain beside it; which hold the first one's value?"""
    letters = ["".join(pair) for pair in zip(rng.sample(string.ascii_uppercase, 10), rng.choices(string.ascii_uppercase, k=10))]
    names = [f"{pair}{rng.randrange(10, 100)}" for pair in letters]  # first letters differ: none is part of another
    chain, other = names[:5], names[5:]
    value, other_value = _numbers(rng, 2)
    needles: list[tuple[float, str]] = []
    for of_chain, start in ((chain, value), (other, other_value)):
        first = depth if of_chain is chain else rng.random()
        # a name is set only after the one that it takes its value from
        places = sorted(first + (1 - first) * rng.random() for _ in of_chain[1:])
        sources = [start, *of_chain[:-1]]
        needles += [
            (place, f"Set variable {name} = {source}.") for place, name, source in zip([first, *places], of_chain, sources)
        ]
    offset = rng.randrange(1_000_000)
    return NeedleTask(
        "Variables are set in the text below, some of them to the value of another. Follow them.\n\n",
        lambda count: haystack.with_needles(needles, count, offset),
        f"\n\nWhich five variables hold the value {value}?",
        f" The variables that hold {value} are",
        tuple(chain),
    )


def _word_list(
    rng: random.Random, often: int, times_often: int, times_rare: int
) -> tuple[list[str], Callable[[int], list[str]]]:
    """Ten words (`often`) that stand `times_often` in a shuffled list; `count` others stand `times_rare`."""
    words = _names(rng, often)
    seed = rng.random()

    def listed(count: int) -> list[str]:
        own = random.Random(seed)
        others = [word for word in _names(own, count + often) if word not in words][:count]
        every = words * times_often + others * times_rare
        own.shuffle(every)
        return every

    return words, listed


def common_words(rng: random.Random, depth: float, haystack: Haystack) -> NeedleTask:
    """Ten words stand thirty times in a numbered list, all others three times."""
    words, listed = _word_list(rng, 10, 30, 3)
    return NeedleTask(
        "Below is a numbered list of words. Some of them appear much more often than the others; remember those.\n\n",
        lambda count: " ".join(f"{i}. {word}" for i, word in enumerate(listed(count), 1)),
        "\n\nWhich ten words appear most often in the list?",
        " The ten most common words are",
        tuple(words),
    )


def frequent_words(rng: random.Random, depth: float, haystack: Haystack) -> NeedleTask:
    """A coded text whose words follow a zeta distribution; which three are the most frequent?

    The n-th word stands in proportion to n ** -2, so that the third still leads the fourth clearly.
    """
    vocabulary = _names(rng, 40)
    seed = rng.random()

    def body(count: int) -> str:
        length = 60 + count  # enough for the order of the first four to be settled
        shares = [rank**-2.0 for rank in range(1, len(vocabulary) + 1)]
        times = [round(length * share / sum(shares)) for share in shares]
        every = [word for word, number in zip(vocabulary, times) for _ in range(number)]
        random.Random(seed).shuffle(every)
        return " ".join(every)

    return NeedleTask(
        "Below is a text in a code. Count how often each of its words appears.\n\n",
        body,
        "\n\nWhich three words appear most often in the text in code?",
        " The three most frequent words are",
        tuple(vocabulary[:3]),
    )


TASKS: dict[str, Callable[[random.Random, float, Haystack], NeedleTask]] = {
    "single": single,
    "multikey": multikey,
    "multivalue": multivalue,
    "multiquery": multiquery,
    "variable-tracking": variable_tracking,
    "common-words": common_words,
    "frequent-words": frequent_words,
}
MAX_TOKENS = {
    "single": 32,
    "multikey": 32,
    "multivalue": 96,
    "multiquery": 96,
    "variable-tracking": 48,
    "common-words": 96,
    "frequent-words": 32,
}
"""Tokens of an answer."""
