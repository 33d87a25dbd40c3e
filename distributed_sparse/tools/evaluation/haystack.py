"""haystack: filler sentences up to a length in tokens, with needles inserted at given depths."""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path

from distributed_sparse.tools.evaluation.files import read_text

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
    """4,000 random sentences without digits and without words of any needle."""
    rng = random.Random(seed)
    sentences = []
    for _ in range(4000):
        deed = rng.choice(_DEEDS).format(thing=rng.choice(_THINGS), place=rng.choice(_PLACES))
        sentences.append(f"{rng.choice(_TIMES)} {rng.choice(_PEOPLE)} {deed}.")
    return sentences


def split_sentences(text: str) -> list[str]:
    """Split a text after `.`, `!` or `?` followed by white space; fold white space within each sentence."""
    return [" ".join(piece.split()) for piece in re.split(r"(?<=[.!?])\s+", text) if piece.strip()]


def read_sentences(path: str | Path) -> list[str]:
    """The sentences of a text file, white space folded.

    Raises:
        ValueError: the file cannot be read, or holds fewer than ten sentences.
    """
    sentences = split_sentences(read_text("haystack_file", path, "a UTF-8 text file"))
    if len(sentences) < 10:
        raise ValueError(f"haystack_file={str(path)!r} has {len(sentences)} sentences; give a longer text, such as an essay")
    return sentences


def with_needles(sentences: Sequence[str], needles: Sequence[tuple[float, str]], count: int, offset: int = 0) -> str:
    """Join `count` sentences, each needle at its depth.

    Args:
        sentences: repeated from the start when they run out.
        needles: (depth, sentence): depth 0 is before the first sentence, 1 after the last; equal depths keep their order.
        offset: index of the first sentence used, modulo the number of sentences.
    """
    start = offset % len(sentences)
    hay = list(islice(cycle(sentences), start, start + count))
    pieces, used = [], 0
    for depth, needle in sorted(needles, key=lambda needle: needle[0]):
        place = round(depth * count)
        pieces += [*hay[used:place], needle]
        used = place
    return " ".join([*pieces, *hay[used:]])


def different(draw: Callable[[], str], count: int) -> list[str]:
    """`count` different values of `draw`, in the order drawn."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


def fit(measure: Callable[[int], int], length: int, what: str) -> int:
    """The largest count whose prompt has at most `length` tokens.

    Args:
        measure: count -> tokens of the prompt; non-decreasing, near enough.
        what: begins the error.

    Raises:
        ValueError: the prompt of count 0 is already longer than `length`.
    """
    shortest = measure(0)
    if shortest > length:
        raise ValueError(f"{what}: length={length} has no room for its {shortest} tokens of needles and question; use more")
    probe = 64
    of_one = max(measure(probe) - shortest, 1) / probe
    low, high = 0, max(1, int((length - shortest) / of_one))
    step = max(1, high // 64)  # the estimate is close: widen slowly
    while measure(high) <= length:
        low, high, step = high, high + step, 2 * step
    while (floor := high - step) > low and measure(floor) > length:
        high, step = floor, 2 * step
    low = max(low, floor)
    return low + bisect_right(range(low + 1, high), length, key=measure)
