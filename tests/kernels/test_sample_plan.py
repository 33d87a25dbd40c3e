"""sample_plan: pilots and samples as a plain loop over rows computes them, and rows that do not pay go dense, each alone."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, fields, replace
from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed_sparse.kernels.vattention.residual_statistics import ResidualStatistics
from distributed_sparse.kernels.vattention.sample_plan import GUARANTEES, MIN_PILOT, ROUND_TO, SamplePlan
from tests.support.kernels import Implementation, bits

SETTINGS: dict[str, Any] = {"guarantee": "output", "epsilon": 0.1, "delta": 0.1, "min_context": 0, "max_sample": None}
CLEAR = 1e-4
"""A sample so close to a multiple of `ROUND_TO`, in its own size, may be rounded either way."""


@dataclass
class Rows:
    """The tensors of one call of plan_samples."""

    statistics: ResidualStatistics
    lse: Tensor
    num_chosen: Tensor
    num_residual: Tensor
    num_pilot: Tensor
    num_pages: Tensor
    context_lens: Tensor

    def on(self, implementation: Implementation, **settings: Any) -> SamplePlan:
        device, op = implementation.device, implementation.function("plan_samples", "sample_plan")
        statistics = ResidualStatistics(*torch.stack(self.statistics).to(device).unbind(0))
        others = (getattr(self, field.name).to(device) for field in fields(self)[1:])
        plan = op(statistics, *others, **SETTINGS | settings)
        return SamplePlan(*(x.cpu() for x in plan))

    def of(self, some: slice) -> Rows:
        """Some of the sequences."""
        statistics = ResidualStatistics(*(x[some] for x in self.statistics))
        return Rows(statistics, *(getattr(self, field.name)[some] for field in fields(self)[1:]))


def rows(context_lens: list[int], heads: int = 2, group: int = 3, *, spread: float = 1.0, seed: int = 0) -> Rows:
    """Statistics of magnitudes at which samples of every size come out."""
    generator = torch.Generator().manual_seed(seed)
    context = torch.tensor(context_lens, dtype=torch.int32)
    batch = len(context_lens)
    residual = (context[:, None] * torch.empty(batch, heads).uniform_(0.7, 0.95, generator=generator)).int()
    pilot = torch.maximum((residual * 0.02).int(), torch.tensor(MIN_PILOT)).minimum(residual) * (residual >= 2 * MIN_PILOT)

    def random(low: float, high: float) -> Tensor:
        return torch.empty(batch, heads * group).uniform_(math.log(low), math.log(high), generator=generator).exp()

    n_s = residual.repeat_interleave(group, 1).float()
    trace = random(0.02, 0.8) * spread
    statistics = ResidualStatistics(
        denominator=n_s * random(0.8, 1.5),
        numerator_norm_sq=n_s.square() * random(0.5, 2.0),
        weight_variance=random(0.02, 0.8) * spread,
        weight_kurtosis=random(1.0, 30.0),
        trace=trace,
        trace_of_square=trace.square() * random(0.02, 1.0),
        kurtosis=random(1.0, 30.0),
    )
    pages = (context + 15) // 16
    chosen = (context[:, None] - residual + 15) // 16
    return Rows(statistics, random(0.5, 20.0), chosen.int(), residual, pilot.int(), pages, context)


def quantile(probability: float) -> float:
    return NormalDist().inv_cdf(probability)


def needed(given: Rows, b: int, i: int, n_s: float, m: float, guarantee: str, epsilon: float, delta: float) -> float:
    """A query head's sample before rounding, in float64; infinite where none will do."""
    denominator, norm_sq, variance, weight_kurtosis, trace, of_square, kurtosis = (float(x[b, i]) for x in given.statistics)

    def raised(value: float, of: float) -> float:
        return value * (1 + quantile(0.99) * math.sqrt(max(of - 1, 0) / m))

    def of_denominator(epsilon: float, delta: float) -> float:
        return (quantile(1 - delta / 2) * n_s / (epsilon * denominator)) ** 2 * raised(variance, weight_kurtosis)

    def of_sum(factor: float, c_squared: float, epsilon: float) -> float:
        noise = (factor * n_s) ** 2 / m * (1 - m / n_s)
        norm = factor**2 * norm_sq - noise * trace - quantile(0.99) * noise * math.sqrt(2 * of_square)
        if trace == 0:
            return 0.0
        if not norm > 0:
            return math.inf
        return c_squared * (n_s * factor) ** 2 * raised(trace, kurtosis) / (epsilon**2 * norm)

    if guarantee == "denominator":
        b0 = of_denominator(epsilon, delta)
    elif guarantee == "output":
        spread = 2 / (9 * max(trace**2 / of_square if of_square else 1.0, 1.0))
        factor = max(1 - spread + quantile(1 - delta) * math.sqrt(spread), 0) ** 3
        b0 = of_sum(1 / denominator, factor, epsilon)
    else:
        b0 = max(of_sum(1.0, quantile(1 - delta / 4) ** 2, epsilon / 4), of_denominator(epsilon / 4, delta / 2))
    return math.inf if math.isinf(b0) else b0 / (1 + b0 / n_s)


def check(given: Rows, plan: SamplePlan, **changed: Any) -> list[bool]:
    """Every row of a plan against the loop; which of them are sampled."""
    settings = SETTINGS | changed
    group = given.lse.shape[1] // given.num_residual.shape[1]
    sampled = []
    for b, h in itertools.product(*map(range, given.num_residual.shape)):
        n, n_s, m = int(given.context_lens[b]), int(given.num_residual[b, h]), int(given.num_pilot[b, h])
        chosen, budget, fits = n - n_s, int(plan.budget[b, h]), False
        if m > 0:
            parts = (settings[name] for name in ("guarantee", "epsilon", "delta"))
            guarantee, epsilon, delta = parts
            size = max(needed(given, b, h * group + g, n_s, m, guarantee, epsilon, delta) for g in range(group))
            size = min(max(size, m), n_s)
            low, high = (min(math.ceil(x / ROUND_TO) * ROUND_TO, n_s) for x in (size * (1 - CLEAR), size * (1 + CLEAR)))
            assert budget in (low, high), f"row {b}, {h}: {budget}, not {low}"
            fits = 2 * (chosen + budget) <= n and n >= settings["min_context"]
            fits = fits and (settings["max_sample"] is None or budget <= settings["max_sample"])
            assert float(plan.log_weight[b, h]) == pytest.approx(math.log(n_s / max(budget, 1)), abs=2e-6)
        assert int(plan.num_samples[b, h]) == (budget if fits else 0)
        assert int(plan.num_pages[b, h]) == (0 if fits else int(given.num_pages[b]))
        assert int(plan.num_chosen[b, h]) == (int(given.num_chosen[b, h]) if fits else 0)
        assert int(plan.extra_tokens_read[b, h]) == m + (0 if fits else chosen)
        own = slice(h * group, (h + 1) * group)
        assert torch.equal(plan.lse[b, own], given.lse[b, own] if fits else torch.full((group,), -math.inf))
        sampled.append(fits)
    return sampled


CONTEXTS = [4096, 40000, 700, 131072, 512, 9000, 0, 65537]


@pytest.mark.parametrize("guarantee", GUARANTEES)
@pytest.mark.parametrize("group", [1, 3, 8])
def test_samples_are_those_of_the_formulas(implementation: Implementation, guarantee: str, group: int) -> None:
    epsilon = 0.4 if guarantee == "numerator_denominator" else 0.1
    given = rows(CONTEXTS, group=group)
    found = check(given, given.on(implementation, guarantee=guarantee, epsilon=epsilon), guarantee=guarantee, epsilon=epsilon)
    assert any(found) and not all(found)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.02, 0.1), (0.5, 0.1), (0.1, 0.01), (0.3, 0.9)])
def test_epsilon_and_delta_are_those_that_are_asked_for(implementation: Implementation, epsilon: float, delta: float) -> None:
    given = rows(CONTEXTS, seed=1)
    check(given, given.on(implementation, epsilon=epsilon, delta=delta), epsilon=epsilon, delta=delta)


def test_short_rows_and_large_samples_go_dense(implementation: Implementation) -> None:
    given = rows(CONTEXTS, seed=2)
    for changed in ({"min_context": 20000}, {"max_sample": 512}, {"max_sample": 10**6, "min_context": 1}):
        check(given, given.on(implementation, **changed), **changed)
    assert not any(check(given, given.on(implementation, min_context=200000), min_context=200000))


def test_equal_values_need_no_more_than_the_pilot(implementation: Implementation) -> None:
    given = rows([40000, 40000])
    none = torch.zeros_like(given.statistics.trace)
    given = replace(given, statistics=given.statistics._replace(trace=none, trace_of_square=none))
    plan = given.on(implementation)
    check(given, plan)
    assert (plan.budget == (given.num_pilot / ROUND_TO).ceil() * ROUND_TO).all()


@pytest.mark.parametrize("guarantee", GUARANTEES)
@pytest.mark.parametrize(
    "field", ["denominator", "numerator_norm_sq", "weight_variance", "weight_kurtosis", "trace", "kurtosis"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_a_statistic_that_is_no_number_sends_its_own_row_to_everything(
    implementation: Implementation, guarantee: str, field: str, value: float
) -> None:
    """0 is one, too, where something is divided by it; where it is not used, or is a fair value, nothing need change."""
    given = rows([40000, 40000, 40000], spread=0.1)
    settings = {"guarantee": guarantee, "epsilon": 0.3}
    before = given.on(implementation, **settings)
    getattr(given.statistics, field)[1, 4] = value
    plan = given.on(implementation, **settings)
    for name, own, old in zip(SamplePlan._fields, plan, before):
        touched = torch.zeros_like(own, dtype=torch.bool)
        touched[1, 1 if own.shape[1] == 2 else slice(3, 6)] = True
        assert torch.equal(own[~touched], old[~touched]), name
    budget, n_s = int(plan.budget[1, 1]), int(given.num_residual[1, 1])
    unused = {"output": ("weight_variance", "weight_kurtosis"), "denominator": ("numerator_norm_sq", "trace", "kurtosis")}
    if field in unused.get(guarantee, ()):
        assert budget == int(before.budget[1, 1])
    elif value != 0 and not (field in ("denominator", "numerator_norm_sq") and value == math.inf):
        assert budget == n_s and int(plan.num_samples[1, 1]) == 0


def test_a_row_has_the_same_bits_in_any_batch(implementation: Implementation) -> None:
    given = rows(CONTEXTS, seed=3)
    whole = given.on(implementation)
    for i in range(len(CONTEXTS)):
        for own, of_all in zip(given.of(slice(i, i + 1)).on(implementation), whole):
            assert torch.equal(bits(own[0]), bits(of_all[i]))


def test_no_rows_have_an_empty_plan(implementation: Implementation) -> None:
    assert [len(x) for x in rows([40000]).of(slice(0, 0)).on(implementation)] == [0] * len(SamplePlan._fields)


@pytest.mark.parametrize("block_tokens", [1, 16, 64])
@pytest.mark.parametrize("base_fraction", [0.0, 0.02, 1 / 3, 0.1, 1.0])
def test_a_pilot_is_its_share_of_what_is_left(implementation: Implementation, block_tokens: int, base_fraction: float) -> None:
    generator = torch.Generator().manual_seed(0)
    lens = [0, 1, 63, 64, 65, 767, 768, 5000, 30000, 131071, 131072]
    context = torch.tensor(lens, dtype=torch.int32)
    blocks = (context + block_tokens - 1) // block_tokens
    chosen = (blocks[:, None] * torch.rand(len(lens), 5, generator=generator) * 0.3).int().clamp_min(1).minimum(blocks[:, None])
    op = implementation.function("plan_pilot", "sample_plan")
    given = (chosen.to(implementation.device), context.to(implementation.device))
    residual, pilot = (x.cpu() for x in op(*given, block_tokens=block_tokens, base_fraction=base_fraction))
    assert residual.dtype == pilot.dtype == torch.int32
    for b, h in itertools.product(range(len(lens)), range(5)):
        listed, n = int(chosen[b, h]), lens[b]
        n_s = n - (listed * block_tokens - (-n % block_tokens) if listed else 0)
        assert int(residual[b, h]) == n_s
        m = min(max(math.ceil(n_s * base_fraction), MIN_PILOT), n_s) if n_s >= 2 * MIN_PILOT else 0
        assert int(pilot[b, h]) == m
