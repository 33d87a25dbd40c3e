"""sample_plan in torch: a direct transcription of the formulas."""

from __future__ import annotations

import functools
from statistics import NormalDist

import torch
from torch import Tensor

from distributed_sparse.kernels.vattention.residual_statistics import ResidualStatistics
from distributed_sparse.kernels.vattention.sample_plan import MIN_PILOT, ROUND_TO, SamplePlan


def plan_pilot_torch(
    num_chosen: Tensor, context_lens: Tensor, *, block_tokens: int, base_fraction: float
) -> tuple[Tensor, Tensor]:
    """See `plan_pilot`."""
    context = context_lens[:, None]
    missing = (-context) % block_tokens  # of the newest block
    n_s = context - num_chosen * block_tokens + missing * (num_chosen > 0)
    share = (n_s.double() * base_fraction).ceil().to(torch.int32)
    return n_s, share.clamp_min(MIN_PILOT).minimum(n_s) * (n_s >= 2 * MIN_PILOT)


def plan_samples_torch(
    statistics, lse, num_chosen, num_residual, num_pilot, num_pages, context_lens, *, guarantee, epsilon, delta, min_context,
    max_sample
):  # fmt: skip
    """See `plan_samples`."""
    n, n_s, m = context_lens[:, None], num_residual, num_pilot
    group = lse.shape[1] // n_s.shape[1]
    size = sample_size(guarantee, epsilon, delta, statistics, *(x.repeat_interleave(group, 1) for x in (n_s, m)))
    budget = round_up(size.unflatten(1, (-1, group)), m, n_s)
    chosen = n - n_s
    fits = (m > 0) & (2 * (chosen + budget) <= n) & (n >= min_context)
    if max_sample is not None:
        fits &= budget <= max_sample
    return SamplePlan(
        budget,
        budget * fits,
        (n_s.float() / budget.clamp_min(1)).log(),
        num_pages[:, None] * ~fits,
        lse.where(fits.repeat_interleave(group, 1), -torch.inf),
        num_chosen * fits,
        m + chosen * ~fits,
    )


def sample_size(
    guarantee: str, epsilon: float, delta: float, statistics: ResidualStatistics, num_residual: Tensor, num_pilot: Tensor
) -> Tensor:
    """Sample size that each query head needs, before rounding: float32 [B, H_q]; infinite or NaN if no size suffices.

    num_residual, num_pilot: n_s and m, int32 [B, H_q] or broadcastable to it.
    """
    n_s, m = num_residual.float(), num_pilot.float()
    if guarantee == "denominator":
        b0 = _denominator_size(statistics, n_s, m, epsilon, delta)
    else:
        to_output = 1 / statistics.denominator if guarantee == "output" else torch.ones_like(statistics.denominator)
        norm_sq = _norm_sq(statistics, n_s, m, to_output)
        spread = _raised(statistics.trace, statistics.kurtosis, m) * (n_s * to_output) ** 2
        if guarantee == "output":
            nu = (statistics.trace**2 / statistics.trace_of_square).nan_to_num(nan=1.0)  # 0 / 0: both squares underflow
            b0 = _chi_square_factor(nu, delta) * spread / (epsilon**2 * norm_sq)
        else:
            b0 = quantile(1 - delta / 4) ** 2 * spread / ((epsilon / 4) ** 2 * norm_sq)
        b0 = torch.where(norm_sq > 0, b0, torch.inf)
        b0 = torch.where(statistics.trace == 0, 0.0, b0)  # all r are equal: any sample is exact
        if guarantee == "numerator_denominator":
            b0 = torch.maximum(b0, _denominator_size(statistics, n_s, m, epsilon / 4, delta / 2))
    return torch.where(b0.isinf(), torch.inf, b0 / (1 + b0 / n_s))


def round_up(size: Tensor, num_pilot: Tensor, num_residual: Tensor) -> Tensor:
    """A row's sample size: the largest of its query heads [B, H_kv, G], at least the pilot, rounded up. int32 [B, H_kv].

    A size that is not finite becomes the whole residual.
    """
    most = num_residual.float()
    largest = size.amax(-1).nan_to_num(nan=torch.inf, posinf=torch.inf).maximum(num_pilot.float()).minimum(most)
    rounded = (largest / ROUND_TO).ceil() * ROUND_TO
    return rounded.to(torch.int32).minimum(num_residual)


@functools.cache
def quantile(probability: float) -> float:
    """Quantile of the standard normal distribution."""
    return NormalDist().inv_cdf(probability)


def bound_quantiles(guarantee: str, delta: float) -> tuple[float, float, float]:
    """Quantiles passed to the kernels: for the denominator, for the output or numerator, and for raising a variance."""
    of_denominator = 1 - delta / 2 if guarantee == "denominator" else 1 - delta / 4
    of_output = 1 - delta if guarantee == "output" else 1 - delta / 4
    return quantile(of_denominator), quantile(of_output), quantile(0.99)


def _norm_sq(statistics: ResidualStatistics, n_s: Tensor, m: Tensor, factor: Tensor) -> Tensor:
    """||factor * N||^2 minus the contribution of the pilot's noise e, at about its 99% lower bound; not positive: unknown.

    ||N_pilot||^2 is ||N||^2 + ||e||^2 on average. E||e||^2 is n_s^2 Tr Sigma / m (1 - m / n_s), and ||e||^2 scatters about it
    by sqrt(2 Tr(Sigma_e^2)). Subtracting only the mean would accept values of almost zero mean as known half of the time.
    """
    noise = (factor * n_s) ** 2 / m * (1 - m / n_s)
    scatter = quantile(0.99) * noise * (2 * statistics.trace_of_square).sqrt()
    return factor**2 * statistics.numerator_norm_sq - noise * statistics.trace - scatter


def _denominator_size(statistics: ResidualStatistics, n_s: Tensor, m: Tensor, epsilon: float, delta: float) -> Tensor:
    variance = _raised(statistics.weight_variance, statistics.weight_kurtosis, m)
    return (quantile(1 - delta / 2) * n_s / (epsilon * statistics.denominator)) ** 2 * variance


def _raised(variance: Tensor, kurtosis: Tensor, m: Tensor) -> Tensor:
    """About the 99% upper bound of a variance estimated from m draws."""
    return variance * (1 + quantile(0.99) * ((kurtosis - 1).clamp_min(0) / m).sqrt())


def _chi_square_factor(nu: Tensor, delta: float) -> Tensor:
    """The 1 - delta quantile of chi-square with nu degrees of freedom, over nu (Wilson and Hilferty, 1931)."""
    spread = 2 / (9 * nu.clamp_min(1))
    return (1 - spread + quantile(1 - delta) * spread.sqrt()).clamp_min(0) ** 3
