"""intervals: bootstrap intervals of means over correlated numbers.

Neighbouring tokens of a text are not independent, so whole units are resampled with replacement: blocks of consecutive
positions, or whole examples. Each task (or text) keeps its number of units, so an interval covers other positions or examples
of the same tasks, not other tasks. Percentile intervals of few units are too narrow; for n units in s tasks they are widened by
sqrt(n / (n - s)) and from a normal to a t distribution (Hesterberg, The American Statistician 69(4), 2015, "expanded percentile
interval").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
RESAMPLES = 2000


class Interval(NamedTuple):
    """Ends of a 95% interval; nan if it is undefined."""

    low: float
    high: float


NO_INTERVAL = Interval(math.nan, math.nan)


def units_of(values: Sequence[float], block: int) -> list[np.ndarray]:
    """Split one example's numbers, in position order, into units of about `block` neighbours; 0: one unit."""
    array = np.array(values, dtype=np.float64)
    return np.array_split(array, max(1, round(array.size / block))) if block and array.size else [array]


def interval(strata: Sequence[Sequence[np.ndarray]], best: float | None = None) -> Interval:
    """The interval of the mean over strata of each stratum's mean.

    If all numbers are equal, the bootstrap shows no spread. If they are all 0 or all `best`, the interval is that of n equal
    Bernoulli outcomes: one end is .05 ** (1 / n) of `best` (the rule of three: about 3 / n away); otherwise it is undefined.

    Args:
        strata: for each task or text, its units; each unit float64 [positions]. Strata are resampled separately; if one has a
            single unit, all units are one stratum.
        best: the highest possible number, if the numbers are in 0..best.
    """
    strata = [list(filter(np.size, units)) for units in strata]
    strata = [units for units in strata if units]
    every = [unit for units in strata for unit in units]
    values = np.concatenate([*every, np.empty(0)])
    if not values.size or not np.isfinite(values).all():
        return NO_INTERVAL
    if (values == values[0]).all():
        value, reached = float(values[0]), (1 - LEVEL) ** (1 / values.size)
        if best is not None and value == best:
            return Interval(reached * best, best)
        return Interval(0.0, (1 - reached) * best) if best is not None and value == 0 else NO_INTERVAL
    if any(len(units) < 2 for units in strata):
        strata = [every]
    free = len(every) - len(strata)
    if free < 1:
        return NO_INTERVAL
    rng, means = np.random.default_rng(0), np.zeros(RESAMPLES)
    for units in strata:
        sums, sizes = np.array([unit.sum() for unit in units]), np.array([unit.size for unit in units])
        drawn = rng.integers(len(units), size=(RESAMPLES, len(units)))
        means += sums[drawn].sum(1) / sizes[drawn].sum(1) / len(strata)
    normal = NormalDist().inv_cdf((1 + LEVEL) / 2)
    widened = normal * math.sqrt(len(every) / free) * (1 + (normal**2 + 1) / (4 * free))
    outside = NormalDist().cdf(-widened)
    low, high = np.quantile(means, (outside, 1 - outside))
    return Interval(float(low), float(high)) if low < high else NO_INTERVAL  # units with equal sums show no spread
