"""Intervals cover what they claim to: of correlated positions, of few examples, of answers that are all alike."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.signal import lfilter

from distributed_sparse.tools.evaluation.intervals import interval, units_of

TRIALS = 100


def test_blocks_cover_the_mean_of_positions_that_resemble_their_neighbours() -> None:
    rng = np.random.default_rng(1)
    texts = lfilter([0.8], [1, -0.6], rng.normal(size=(TRIALS, 2, 320)))[..., 64:]  # stationary, of mean 0
    found = [interval([units_of(text, 32) for text in pair]) for pair in texts]
    assert np.mean([low <= 0 <= high for low, high in found]) >= 0.91
    alone = [interval([units_of(text, 1) for text in pair]) for pair in texts[:10]]  # as if positions were independent
    assert 1.5 * np.mean([high - low for low, high in alone]) < np.mean([high - low for low, high in found[:10]])


@pytest.mark.parametrize("count", [5, 10])
def test_few_examples_are_covered_too(count: int) -> None:
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(TRIALS):
        low, high = interval([[np.array([value]) for value in rng.normal(size=count)]])
        held += low <= 0 <= high
    assert held / TRIALS >= 0.9


def test_an_interval_has_the_width_that_theory_says() -> None:
    values = np.random.default_rng(3).normal(size=400)
    low, high = interval([[np.array([value]) for value in values]])
    expected = 1.96 * values.std(ddof=1) / 20
    assert (high - low) / 2 == pytest.approx(expected, rel=0.05) and (high + low) / 2 == pytest.approx(values.mean(), abs=0.01)


def test_tasks_keep_their_number_of_units() -> None:
    """The difference between two tasks is no uncertainty of their mean."""
    rng = np.random.default_rng(4)
    easy, hard = ([np.array([centre + 0.01 * rng.normal()]) for _ in range(20)] for centre in (1.0, 0.0))
    low, high = interval([easy, hard])
    assert high - low < 0.02
    together = interval([easy + hard])
    assert together.high - together.low > 0.2


def test_units_are_blocks_of_neighbours_or_whole_examples() -> None:
    assert [list(unit) for unit in units_of(range(7), 3)] == [[0, 1, 2, 3], [4, 5, 6]]
    assert [list(unit) for unit in units_of(range(3), 0)] == [[0, 1, 2]]
    assert [list(unit) for unit in units_of(range(3), 1)] == [[0], [1], [2]]
    assert [unit.size for unit in units_of([], 3)] == [0]


def test_answers_that_are_all_right_or_all_wrong_prove_no_more_than_their_number_does() -> None:
    right, wrong = ([[np.array([value])] * 20] for value in (100.0, 0.0))
    assert interval(right, best=100.0) == pytest.approx((100 * 0.05 ** (1 / 20), 100))  # 86: about 3 of 20
    assert interval(wrong, best=100.0) == pytest.approx((0, 100 - 100 * 0.05 ** (1 / 20)))
    for alike in (interval(right), interval([[np.array([0.5])] * 20], best=1.0), interval([[np.array([0.0, 1.0])] * 20], 1.0)):
        assert np.isnan(alike).all()


@pytest.mark.parametrize("strata", [[], [[]], [[np.array([0.1, 0.9])]], [[np.array([0.1]), np.array([np.inf])]]])
def test_what_cannot_be_told_is_not_told(strata: list[list[np.ndarray]]) -> None:
    assert np.isnan(interval(strata)).all()
