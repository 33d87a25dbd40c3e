"""A haystack holds its needles at their depths, and is as long as was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from distributed_sparse.tools.evaluation.haystack import filler_sentences, fit, read_sentences, with_needles

HAY = [f"Sentence {name}." for name in ("one", "two", "three", "four")]


@pytest.mark.parametrize(("depth", "place"), [(0.0, 0), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_a_needle_stands_behind_its_share_of_the_sentences(depth: float, place: int) -> None:
    text = with_needles(HAY, [(depth, "NEEDLE.")], 8)
    assert text.replace("Sentence ", "").split().index("NEEDLE.") == place


def test_needles_stand_in_the_order_of_their_depths() -> None:
    text = with_needles(HAY, [(0.9, "LAST."), (0.1, "FIRST."), (0.1, "SECOND.")], 20)
    assert text.index("FIRST.") < text.index("SECOND.") < text.index("LAST.")
    assert text.count("Sentence") == 20


def test_sentences_start_again_where_they_run_out() -> None:
    assert with_needles(HAY, [], 6, offset=3) == "Sentence four. " + " ".join([*HAY, HAY[0]])


def test_filler_differs_by_seed_and_holds_no_digits() -> None:
    first = filler_sentences(1)
    assert first == filler_sentences(1) != filler_sentences(2)
    assert len(set(first)) > 1000
    assert not any(char.isdigit() for sentence in first for char in sentence)


def test_a_file_is_cut_into_sentences(tmp_path: Path) -> None:
    path = tmp_path / "essay.txt"
    path.write_text("It was late.\nNobody\n  came! Why? " * 5)
    assert read_sentences(path)[:3] == ["It was late.", "Nobody came!", "Why?"]


@pytest.mark.parametrize("content", [None, "Too short."])
def test_a_file_without_enough_text_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "essay.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"haystack_file=.*essay.txt"):
        read_sentences(path)


@pytest.mark.parametrize("slope", [1.0, 3.0, 17.3])
@pytest.mark.parametrize("length", [10, 11, 100, 1000, 33333])
def test_fit_finds_the_largest_count_in_few_looks(slope: float, length: int) -> None:
    looked = []

    def measure(count: int) -> int:
        looked.append(count)
        return int(9 + slope * count)

    count = fit(measure, length, "test")
    assert 9 + slope * count < length + 1 <= int(9 + slope * (count + 1))
    assert len(looked) <= 18


def test_no_room_is_an_error() -> None:
    with pytest.raises(ValueError, match="length=8 has no room for its 9 tokens"):
        fit(lambda count: 9 + count, 8, "test")
