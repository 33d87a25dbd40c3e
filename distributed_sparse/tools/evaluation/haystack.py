"""Haystack: sentences of no importance to a given length in tokens, with needles put in at given depths."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path

_PLACES = "harbour mill orchard station library garden bridge market chapel workshop quarry lighthouse".split()  # noqa: SIM905
_THINGS = "lantern kettle ladder basket mirror blanket hammer bucket ribbon teapot saddle drum".split()  # noqa: SIM905
_PEOPLE = (
    *("the baker", "the ferryman", "an old sailor", "the gardener", "a travelling clerk", "the miller", "two children"),
    *("the postman", "a quiet painter", "the night watchman", "the carpenter", "a retired teacher"),
)
_DEEDS = (
    "carried a {thing} past the {place}",
    "spoke of the weather near the {place}",
    "left a {thing} beside the {place}",
    "walked slowly round the {place}",
    "mended a {thing} behind the {place}",
    "remembered how the {place} had looked in winter",
    "sat by the {place} until the rain was over",
    "traded a {thing} for another at the {place}",
)
_TIMES = (
    *("In the morning", "Towards noon", "Late in the day", "After the first snow", "On a windy evening"),
    *("Some weeks later", "Before the tide turned"),
)


def filler_sentences(seed: int) -> list[str]:
    """A few thousand sentences about nothing, none twice in a row; they hold no digits and no needle's words."""
    rng = random.Random(seed)
    sentences = []
    for _ in range(4000):
        deed = rng.choice(_DEEDS).format(thing=rng.choice(_THINGS), place=rng.choice(_PLACES))
        sentences.append(f"{rng.choice(_TIMES)} {rng.choice(_PEOPLE)} {deed}.")
    return sentences


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, white space folded; each ends in . ! or ? before white space."""
    return [" ".join(piece.split()) for piece in re.split(r"(?<=[.!?])\s+", text) if piece.strip()]


def read_sentences(path: str | Path) -> list[str]:
    """The sentences of a text file, white space folded.

    Raises:
        ValueError: it cannot be read, or holds fewer than ten sentences.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"haystack_file={str(path)!r} cannot be read ({error}); give a UTF-8 text file") from None
    sentences = split_sentences(text)
    if len(sentences) < 10:
        raise ValueError(f"haystack_file={str(path)!r} has {len(sentences)} sentences; give a longer text, such as an essay")
    return sentences


class Haystack:
    """Sentences in a fixed order, again from the start where they run out."""

    def __init__(self, sentences: Sequence[str]) -> None:
        self._sentences = sentences

    def with_needles(self, needles: Sequence[tuple[float, str]], count: int, offset: int = 0) -> str:
        """`count` sentences with each needle at its depth.

        Args:
            needles: (depth, sentence): 0 stands before the first sentence, 1 behind the last; equal depths keep their order.
            offset: the first sentence of the haystack that is used.
        """
        start = offset % len(self._sentences)
        hay = list(islice(cycle(self._sentences), start, start + count))
        pieces, used = [], 0
        for depth, needle in sorted(needles, key=lambda needle: needle[0]):
            place = round(depth * count)
            pieces += [*hay[used:place], needle]
            used = place
        return " ".join([*pieces, *hay[used:]])


def fit(measure: Callable[[int], int], length: int, what: str) -> int:
    """The largest count whose prompt has at most `length` tokens; `measure` grows with the count, near enough.

    Raises:
        ValueError: a count of 0 is already too long.
    """
    shortest = measure(0)
    if shortest > length:
        raise ValueError(f"{what}: length={length} has no room for its {shortest} tokens of needles and question; use more")
    probe = 64
    of_one = max(measure(probe) - shortest, 1) / probe
    low, high = 0, max(1, int((length - shortest) / of_one))
    step = max(1, high // 64)  # the estimate is near: widen slowly
    while measure(high) <= length:
        low, high, step = high, high + step, 2 * step
    floor = high - step
    while floor > low and measure(floor) > length:
        high, step = floor, 2 * step
        floor -= step
    low = max(low, floor)
    while high - low > 1:
        middle = (low + high) // 2
        if measure(middle) <= length:
            low = middle
        else:
            high = middle
    return low
