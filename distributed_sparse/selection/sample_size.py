"""Sample sizes for vAttention: how many tokens of the residual must be drawn so that an error bound holds.

r is what the sum that is estimated adds up over the residual's n_s tokens, Sigma its covariance there, D the softmax
denominator, o = N / D the output; D, N and r are relative to one common maximum. Statistics come from a pilot of m tokens.
"""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor

from distributed_sparse.kernels.residual_statistics import ResidualStatistics

ROUND_TO = 64
"""Samples are rounded up to this multiple, so that one unit in the last place of a statistic changes no sample."""

GUARANTEES = ("output", "denominator", "numerator_denominator")


def sample_size(
    guarantee: str, epsilon: float, delta: float, statistics: ResidualStatistics, num_residual: Tensor, num_pilot: Tensor
) -> Tensor:
    """Samples that each query head needs, before rounding: float32 [B, H_q]; infinite or NaN where no size will do.

    - `output` (first order, this project's own): r = e^s (v - o); ||error of o|| <= epsilon ||o|| but for a share delta.
      b0 = c^2 (n_s / (epsilon D))^2 Tr Sigma / ||o||^2. The squared error is a weighted sum of chi-squares: by two moments it
      is chi-square of nu = (Tr Sigma)^2 / Tr(Sigma^2) degrees, c^2 = its 1 - delta quantile over nu (Wilson-Hilferty). ||o||^2
      is taken without the pilot's own noise.
    - `denominator` (what the experiments of arXiv 2510.05688 ran): |error of D| <= epsilon D;
      b0 = (z n_s sigma / (epsilon D))^2.
    - `numerator_denominator` (its Lemma 4.2): r = e^s v within eps1 ||N|| and e^s within eps2 D, each at delta / 2 and
      epsilon / 4: the output is then within 2 (eps1 + eps2) = epsilon.

    A pilot's spread is uncertain: variances are raised to about their 99% bound, by their kurtosis. Finite population:
    b = b0 / (1 + b0 / n_s).

    Args:
        guarantee, epsilon, delta: see above.
        statistics: of the pilot; `centred` for `output`.
        num_residual, num_pilot: int32 [B, H_q], or broadcast to it: n_s and m.
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
            b0 = _quantile(1 - delta / 4) ** 2 * spread / ((epsilon / 4) ** 2 * norm_sq)
        b0 = torch.where(norm_sq > 0, b0, torch.inf)
        b0 = torch.where(statistics.trace == 0, 0.0, b0)  # all r alike: any sample is exact
        if guarantee == "numerator_denominator":
            b0 = torch.maximum(b0, _denominator_size(statistics, n_s, m, epsilon / 4, delta / 2))
    return torch.where(b0.isinf(), torch.inf, b0 / (1 + b0 / n_s))


def round_up(size: Tensor, num_pilot: Tensor, num_residual: Tensor) -> Tensor:
    """A row's sample from its query heads' sizes [B, H_kv, G]: their largest, at least the pilot's, rounded: int32 [B, H_kv].

    Not finite becomes all of the residual.
    """
    most = num_residual.float()
    largest = size.amax(-1).nan_to_num(nan=torch.inf, posinf=torch.inf).maximum(num_pilot.float()).minimum(most)
    rounded = (largest / ROUND_TO).ceil() * ROUND_TO
    return rounded.to(torch.int32).minimum(num_residual)


def _norm_sq(statistics: ResidualStatistics, n_s: Tensor, m: Tensor, factor: Tensor) -> Tensor:
    """||factor * N||^2 without what the pilot's own noise e adds to it, at about its 99% lower bound; not positive: unknown.

    ||N_pilot||^2 is ||N||^2 + ||e||^2 on average. E||e||^2 is n_s^2 Tr Sigma / m (1 - m / n_s), and ||e||^2 scatters about it
    by sqrt(2 Tr(Sigma_e^2)). Were only the mean taken off, values of almost zero mean would pass as known half of the time.
    """
    noise = (factor * n_s) ** 2 / m * (1 - m / n_s)
    scatter = _quantile(0.99) * noise * (2 * statistics.trace_of_square).sqrt()
    return factor**2 * statistics.numerator_norm_sq - noise * statistics.trace - scatter


def _denominator_size(statistics: ResidualStatistics, n_s: Tensor, m: Tensor, epsilon: float, delta: float) -> Tensor:
    variance = _raised(statistics.weight_variance, statistics.weight_kurtosis, m)
    return (_quantile(1 - delta / 2) * n_s / (epsilon * statistics.denominator)) ** 2 * variance


def _raised(variance: Tensor, kurtosis: Tensor, m: Tensor) -> Tensor:
    """About the 99% bound of a variance that was estimated from m draws."""
    return variance * (1 + _quantile(0.99) * ((kurtosis - 1).clamp_min(0) / m).sqrt())


def _chi_square_factor(nu: Tensor, delta: float) -> Tensor:
    """The 1 - delta quantile of chi-square with nu degrees of freedom, over nu (Wilson and Hilferty, 1931)."""
    spread = 2 / (9 * nu.clamp_min(1))
    return (1 - spread + _quantile(1 - delta) * spread.sqrt()).clamp_min(0) ** 3


def _quantile(probability: float) -> float:
    return NormalDist().inv_cdf(probability)
