"""vAttention's promise, on the engine's own sampler: errors beyond epsilon are as rare as delta says, sums are unbiased.

Thousands of draws over one context, each under its own seed; the draws are rows of one batch. Overflow is off: what is
tested is the sample, not the dense rows that it falls back to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm
from torch import Tensor

from distributed_sparse.cache import AppendRuns, Geometry, LayerCache
from distributed_sparse.kernels.attend.attend import attend
from distributed_sparse.kernels.vattention.residual_statistics import ResidualStatistics
from distributed_sparse.kernels.vattention.sample_plan import plan_pilot
from distributed_sparse.kernels.vattention.sample_plan_torch import round_up, sample_size
from distributed_sparse.kernels.vattention.sample_residual import PILOT, SAMPLE
from distributed_sparse.selection.base import DecodeBatch
from distributed_sparse.selection.vattention import VAttentionConfig, VAttentionPolicy
from tests.support.grids import corners

pytestmark = pytest.mark.usefixtures("one_thread")  # on CPU, equal bits are promised at one thread

N, DIM, PAGE, DRAWS = 16384, 32, 16, 2000
DISTRIBUTIONS = {  # standard deviation of the logits, mean of the values (their spread is 1)
    "narrow": (0.5, 1.0),
    "wide": (1.0, 0.5),
    "heavy_tailed": (2.0, 1.0),
    "zero_mean_values": (0.5, 0.0),
    "equal_logits": (0.0, 1.0),
}
DEFAULT_CASES = [
    ("narrow", (0.05, 0.05)),
    ("wide", (0.2, 0.2)),
    *((name, (0.1, 0.1)) for name in ("heavy_tailed", "equal_logits")),
]
GRID = [(epsilon, delta) for epsilon in (0.05, 0.1, 0.2) for delta in (0.05, 0.1, 0.2)]
CASES = [
    pytest.param(name, *pair, marks=() if (name, pair) in DEFAULT_CASES else pytest.mark.slow)
    for name in DISTRIBUTIONS
    for pair in GRID
]
# The pilots of values of zero mean ask for nearly everything: the engine reads such rows densely.
PILOT_CASES = [pytest.param(*case.values, marks=case.marks if case.values[0] == "wide" else pytest.mark.slow) for case in CASES]


@dataclass(frozen=True)
class Context:
    """One row's context: what the engine sees, and the same in float64. All sums are relative to the largest logit."""

    q: Tensor
    cache: LayerCache
    batch: DecodeBatch
    chosen: Tensor
    num_chosen: Tensor
    partial: tuple[Tensor, Tensor]
    weights: Tensor  # float64 [n] e^(s - max)
    values: Tensor  # float64 [n, d]
    residual: Tensor  # int64 [n_s] positions that are not chosen

    @property
    def num_residual(self) -> Tensor:
        return torch.tensor([[len(self.residual)]], dtype=torch.int32)

    @property
    def output(self) -> Tensor:
        return self.weights @ self.values / self.weights.sum()

    def of_seeds(self, seeds: int) -> DecodeBatch:
        """The row once per seed."""
        key = torch.zeros(4, seeds, dtype=torch.int64)
        key[0], key[1], key[3] = torch.arange(seeds) * 2654435761 % 2**32, 77, N - 1
        return replace(
            self.batch,
            page_table=self.batch.page_table.expand(seeds, -1),
            num_pages=self.batch.num_pages.expand(seeds),
            context_lens=self.batch.context_lens.expand(seeds),
            last_page_len=self.batch.last_page_len.expand(seeds),
            random_key=key,
        )


Drawn = tuple[list[Tensor], list[float]]
"""Samples (positions), and how often a token of each counts."""

GEOMETRY = Geometry(1, 1, DIM, PAGE, torch.float32, torch.device("cpu"), first_kv_head=0)


def policy(epsilon: float = 0.1, delta: float = 0.1, guarantee: str = "output") -> VAttentionPolicy:
    settings = {"sink_tokens": 32, "window_tokens": 32, "top_k_fraction": 0.02, "guarantee": guarantee}
    return VAttentionPolicy(VAttentionConfig(epsilon=epsilon, delta=delta, **settings), GEOMETRY)


@cache
def context(distribution: str) -> Context:
    spread, mean = DISTRIBUTIONS[distribution]
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(1, 1, DIM, generator=generator)
    logits = torch.randn(N, generator=generator) * spread
    direction = q[0, 0] / q.square().sum() * DIM**0.5
    k = logits[:, None] * direction
    v = torch.randn(N, DIM, generator=generator) + mean
    cache = LayerCache.allocate(5, N // PAGE + 1, GEOMETRY, policy().metadata)
    table = (torch.randperm(N // PAGE, generator=generator) + 1).to(torch.int32)
    starts = torch.arange(N // PAGE, dtype=torch.int32) * PAGE
    cache.append(k[:, None], v[:, None], AppendRuns(table, starts, torch.zeros_like(starts), torch.full_like(starts, PAGE)))
    one = torch.ones(1, dtype=torch.int32)
    key = torch.tensor([[1], [0], [0], [N - 1]])
    batch = DecodeBatch(table[None], one * (N // PAGE), one * N, one * PAGE, key, N, PAGE)
    chosen, num_chosen = policy().choose(q, cache, batch)
    pages = table[chosen.long()]
    partial = attend(q, cache.k_pages, cache.v_pages, pages, num_chosen, batch.last_page_len, GEOMETRY.scale, return_lse=True)
    exact = (k.double() @ q[0, 0].double()) * GEOMETRY.scale
    kept = torch.ones(N, dtype=torch.bool)
    kept[(chosen[0, 0, : int(num_chosen)].long()[:, None] * PAGE + torch.arange(PAGE)).flatten()] = False
    weights = (exact - exact.max()).exp()
    return Context(q, cache, batch, chosen, num_chosen, partial, weights, v.double(), kept.nonzero()[:, 0])


def positions(slots: Tensor, table: Tensor) -> Tensor:
    """Logical positions of physical slots."""
    logical = torch.zeros(int(table.max()) + 1, dtype=torch.int64)
    logical[table.long()] = torch.arange(len(table))
    return logical[slots.long() // PAGE] * PAGE + slots % PAGE


def draw(own: VAttentionPolicy, given: Context, sizes: Tensor, kind: int) -> Tensor:
    """Slots int32 [seeds, most] of one draw per seed, sizes int32 [seeds]."""
    seeds = len(sizes)
    chosen, counts = given.chosen.expand(seeds, -1, -1), given.num_chosen.expand(seeds, -1)
    batch, most = given.of_seeds(seeds), int(sizes.max())
    slots = own.draw(chosen, counts, sizes[:, None], given.cache, batch, kind, most)[:, 0]
    return slots.masked_fill(torch.arange(most) >= sizes[:, None], 0)  # past the count any bits


def sums(given: Context, drawn: list[Tensor], each: list[float]) -> tuple[Tensor, Tensor]:
    """D [T] and N [T, d] of the whole context as T samples (positions) estimate them; a sampled token counts `each` times."""
    fixed = torch.ones(N, dtype=torch.bool)
    fixed[given.residual] = False
    weighted = given.weights[:, None] * given.values
    denominators = [given.weights[fixed].sum() + times * given.weights[some].sum() for some, times in zip(drawn, each)]
    numerators = [weighted[fixed].sum(0) + times * weighted[some].sum(0) for some, times in zip(drawn, each)]
    return torch.stack(denominators), torch.stack(numerators)


def samples(own: VAttentionPolicy, given: Context, sizes: Tensor) -> Drawn:
    slots = draw(own, given, sizes, SAMPLE)
    at = positions(slots.clamp_min(0), given.batch.page_table[0])
    return [row[:size] for row, size in zip(at, sizes.tolist())], [len(given.residual) / size for size in sizes.tolist()]


def failures(given: Context, denominators: Tensor, numerators: Tensor, epsilon: float, guarantee: str) -> int:
    """Draws whose relative error exceeds epsilon."""
    if guarantee == "denominator":
        exact = given.weights.sum()
        return int(((denominators - exact).abs() > epsilon * exact).sum())
    error = (numerators / denominators[:, None] - given.output).norm(dim=-1)
    return int((error > epsilon * given.output.norm()).sum())


def exact_statistics(given: Context, guarantee: str) -> ResidualStatistics:
    """What a pilot of the whole residual would say, without the uncertainty of one: kurtosis 1 raises no variance."""
    weights, values = given.weights[given.residual], given.values[given.residual]
    total = given.weights.sum()
    centre = given.output if guarantee == "output" else torch.zeros(DIM)
    r = weights[:, None] * (values - centre)
    sigma = torch.cov(r.T)
    norm_sq = (given.weights @ given.values).square().sum()
    numbers = [total, norm_sq, weights.var(), torch.ones(()), sigma.trace(), (sigma @ sigma).trace(), torch.ones(())]
    return ResidualStatistics(*(number.float().view(1, 1) for number in numbers))


def assert_sampled(given: Context, sizes: Tensor, distribution: str) -> None:
    """A bound that is held by reading everything says nothing; values of zero mean may need it."""
    assert distribution == "zero_mean_values" or int(sizes.max()) < len(given.residual) / 2


def exact_size(given: Context, guarantee: str, epsilon: float, delta: float) -> int:
    """The sample that exact statistics ask for."""
    n_s = given.num_residual
    size = sample_size(guarantee, epsilon, delta, exact_statistics(given, guarantee), n_s, n_s)
    return int(round_up(size[..., None], torch.ones_like(n_s), n_s))


def assert_covered(given: Context, drawn: Drawn, epsilon: float, delta: float, guarantee: str) -> None:
    """Errors beyond epsilon are no more frequent than delta explains."""
    found = failures(given, *sums(given, *drawn), epsilon, guarantee)
    assert found <= binom.ppf(0.999, DRAWS, delta), f"{found} of {DRAWS} at b = {np.mean([len(some) for some in drawn[0]]):.0f}"


def assert_unbiased(given: Context, drawn: Drawn) -> None:
    """The means of D and of every coordinate of N lie within four standard errors of the truth."""
    denominators, numerators = sums(given, *drawn)
    if denominators.std() < 1e-9 * denominators.mean():  # equal weights are summed without any error
        assert denominators.tolist() == pytest.approx([float(given.weights.sum())] * DRAWS)
        denominators = denominators + torch.randn(DRAWS, generator=torch.Generator().manual_seed(0)).double()
    assert deviations(given, denominators, numerators).max() < 4


@pytest.mark.parametrize(("distribution", "epsilon", "delta"), CASES)
def test_coverage_with_exact_statistics(distribution: str, epsilon: float, delta: float) -> None:
    given, own = context(distribution), policy(epsilon, delta)
    sizes = torch.tensor([exact_size(given, "output", epsilon, delta)] * DRAWS)
    assert_sampled(given, sizes, distribution)
    assert_covered(given, samples(own, given, sizes), epsilon, delta, "output")


@pytest.mark.parametrize("distribution", corners(["narrow", "wide", "heavy_tailed"], kept=("heavy_tailed",)))
def test_coverage_of_the_denominator_with_exact_statistics(distribution: str) -> None:
    given, own = context(distribution), policy(0.05, 0.05, "denominator")
    sizes = torch.tensor([exact_size(given, "denominator", 0.05, 0.05)] * DRAWS)
    assert_sampled(given, sizes, distribution)
    assert_covered(given, samples(own, given, sizes), 0.05, 0.05, "denominator")


def pilot_sizes(given: Context, own: VAttentionPolicy) -> Tensor:
    """The sample sizes int32 [DRAWS] that as many pilots ask for."""
    batch, chosen = given.of_seeds(DRAWS), given.num_chosen.expand(DRAWS, -1)
    n_s, counts = plan_pilot(chosen, batch.context_lens, block_tokens=PAGE, base_fraction=own.config.base_fraction)
    assert (n_s == given.num_residual).all()
    pilots = draw(own, given, counts[:, 0], PILOT)
    partial = (given.partial[0].expand(DRAWS, -1, -1), given.partial[1].expand(DRAWS, -1))
    statistics = own.estimate(given.q.expand(DRAWS, -1, -1), given.cache, pilots[:, None], counts, n_s, partial)
    return own.plan(statistics, partial[1], chosen, n_s, counts, batch).budget[:, 0]


@pytest.mark.parametrize(("distribution", "epsilon", "delta"), PILOT_CASES)
def test_coverage_with_the_pilots_statistics(distribution: str, epsilon: float, delta: float) -> None:
    """The whole of it, as decode does it: a pilot, the size that it asks for, an independent sample of that size."""
    given, own = context(distribution), policy(epsilon, delta)
    sizes = pilot_sizes(given, own)
    assert_sampled(given, sizes.double().quantile(0.99).round().int().view(1), distribution)
    assert_covered(given, samples(own, given, sizes), epsilon, 1.5 * delta, "output")


def test_coverage_of_the_denominator() -> None:
    given, own = context("wide"), policy(0.05, 0.1, "denominator")
    sizes = pilot_sizes(given, own)
    assert_sampled(given, sizes, "wide")
    found = failures(given, *sums(given, *samples(own, given, sizes)), 0.05, "denominator")
    assert 0 < found <= binom.ppf(0.999, DRAWS, 1.5 * 0.1)


@pytest.mark.slow
def test_the_lemma_bounds_the_output_at_a_larger_sample() -> None:
    """numerator_denominator holds for the output, too, and asks for far more than the first-order bound does."""
    given, own = context("narrow"), policy(0.2, 0.1, "numerator_denominator")
    sizes = pilot_sizes(given, own)
    found = failures(given, *sums(given, *samples(own, given, sizes)), 0.2, "output")
    assert found <= binom.ppf(0.999, DRAWS, 0.1)
    assert sizes.double().mean() > 3 * pilot_sizes(given, policy(0.2, 0.1)).double().mean()


def deviations(given: Context, denominators: Tensor, numerators: Tensor) -> Tensor:
    """How many standard errors the means of D and of every coordinate of N lie off the truth: [1 + d]."""
    estimates = torch.cat([denominators[:, None], numerators], dim=1)
    exact = torch.cat([given.weights.sum()[None], given.weights @ given.values])
    return (estimates.mean(0) - exact).abs() / (estimates.std(0) / len(estimates) ** 0.5)


@pytest.mark.parametrize("distribution", list(DISTRIBUTIONS))
def test_estimates_are_unbiased(distribution: str) -> None:
    given = context(distribution)
    assert_unbiased(given, samples(policy(), given, torch.full((DRAWS,), 512)))


def collapsed(given: Context, size: int) -> Drawn:
    """The published code's draw: with replacement, duplicates collapsed, the weight n_s / b kept."""
    generator = torch.Generator().manual_seed(1)
    picks = torch.randint(len(given.residual), (DRAWS, size), generator=generator)
    return [given.residual[row.unique()] for row in picks], [len(given.residual) / size] * DRAWS


@pytest.mark.parametrize("distribution", corners(["narrow", "heavy_tailed"], kept=("narrow",)))
@pytest.mark.slow
def test_drawing_with_replacement_and_collapsing_fails_both_tests(distribution: str) -> None:
    """The negative control: the same checks, of the denominator's coverage and of bias, refuse the published code's draw.

    (In the output, a ratio, most of its bias cancels.)
    """
    given, epsilon, delta = context(distribution), 0.05, 0.05
    b = exact_size(given, "denominator", epsilon, delta) if distribution == "heavy_tailed" else 4096
    wrong, right = collapsed(given, b), samples(policy(), given, torch.full((DRAWS,), b))
    for check in (
        lambda drawn: assert_covered(given, drawn, epsilon, delta, "denominator"),
        lambda drawn: assert_unbiased(given, drawn),
    ):
        check(right)
        with pytest.raises(AssertionError):
            check(wrong)


@pytest.mark.parametrize("distribution", ["narrow", "heavy_tailed"])
def test_a_sample_of_everything_is_dense(distribution: str) -> None:
    given = context(distribution)
    denominators, numerators = sums(given, *samples(policy(), given, torch.full((3,), len(given.residual))))
    output = numerators / denominators[:, None]
    assert (output - given.output).norm(dim=-1).max() < 1e-9 * given.output.norm()


@pytest.mark.parametrize("guarantee", ["output", "denominator", "numerator_denominator"])
def test_smaller_epsilon_or_delta_asks_for_more(guarantee: str) -> None:
    given = context("wide")
    n_s = given.num_residual
    statistics = exact_statistics(given, guarantee)

    def size(epsilon: float, delta: float) -> float:
        return float(sample_size(guarantee, epsilon, delta, statistics, n_s, n_s))

    sizes = [size(epsilon, 0.1) for epsilon in (0.4, 0.2, 0.1, 0.05, 0.02)]
    assert sizes == sorted(sizes) and len(set(sizes)) == 5 and sizes[-1] <= int(n_s)
    sizes = [size(0.1, delta) for delta in (0.2, 0.1, 0.05, 0.01)]
    assert sizes == sorted(sizes) and len(set(sizes)) == 4


def test_one_term_asks_for_the_normal_quantile() -> None:
    """Where all spread lies in one direction, chi-square of one degree: c is the two-sided normal quantile."""
    ones = torch.ones(1, 1)
    n_s, m = torch.tensor([[10**6]]), torch.tensor([[10**6]])
    statistics = ResidualStatistics(ones * 1e6, ones * 1e12, ones, ones, ones * 4.0, ones * 16.0, ones)
    found = float(sample_size("output", 0.1, 0.1, statistics, n_s, m))
    plain = norm.ppf(0.95) ** 2 * 4.0 / 0.1**2
    assert found == pytest.approx(plain / (1 + plain / 1e6), rel=0.03)  # Wilson-Hilferty's own error at one degree


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_sample_of_a_head_is_the_same_on_any_rank(ranks: int) -> None:
    """Four heads with different choices; each rank draws for its own and knows where they start."""
    given, heads = context("wide"), 4
    chosen = given.chosen.expand(3, heads, -1).clone()
    chosen[:, 1, 4] += 1  # so that heads differ in more than their keys
    counts, sizes = given.num_chosen.expand(3, heads), torch.tensor([[300, 512, 64, 700]] * 3, dtype=torch.int32)
    parts = []
    for rank in range(ranks):
        mine = slice(rank * heads // ranks, (rank + 1) * heads // ranks)
        geometry = replace(GEOMETRY, num_kv_heads=heads // ranks, first_kv_head=mine.start)
        own = VAttentionPolicy(policy().config, geometry)
        drawn = own.draw(chosen[:, mine], counts[:, mine], sizes[:, mine], given.cache, given.of_seeds(3), SAMPLE, 700)
        parts += [[drawn[b, h, : int(sizes[b, mine.start + h])] for b in range(3)] for h in range(heads // ranks)]
    whole = VAttentionPolicy(policy().config, replace(GEOMETRY, num_kv_heads=heads))
    expected = whole.draw(chosen, counts, sizes, given.cache, given.of_seeds(3), SAMPLE, 700)
    for head in range(heads):
        for b in range(3):
            assert torch.equal(parts[head][b], expected[b, head, : int(sizes[b, head])])
    assert not torch.equal(expected[0, 0, :64], expected[1, 0, :64]) and not torch.equal(
        expected[0, 0, :64], expected[0, 2, :64]
    )
