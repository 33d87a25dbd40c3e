"""sample_plan: sizes of vAttention's pilot and sample of a row's residual, and which rows are attended densely instead."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from distributed_sparse.kernels import native
from distributed_sparse.kernels.dispatch import op
from distributed_sparse.kernels.vattention.residual_statistics import ResidualStatistics

MIN_PILOT = 256
"""Minimum tokens of a pilot. A residual of fewer than twice as many is not sampled: the row is dense."""

ROUND_TO = 64
"""Samples are rounded up to this multiple, so that a difference of one ulp in a statistic rarely changes a sample's size."""

GUARANTEES = ("output", "denominator", "numerator_denominator")


class SamplePlan(NamedTuple):
    """What each (sequence, KV head) row reads. A row for which sampling does not pay is dense: it reads only its page table.

    budget:      int32 [B, H_kv] tokens that the guarantee requires; the whole residual if no smaller sample suffices.
    num_samples: int32 [B, H_kv] tokens to draw: the budget, or 0 for a dense row.
    log_weight:  float32 [B, H_kv] ln(n_s / budget), the log weight of each drawn token.
    num_pages:   int32 [B, H_kv] all pages for a dense row, else 0.
    lse:         float32 [B, H_q] of the chosen part; -inf for a dense row, which attends that part again.
    num_chosen:  int32 [B, H_kv] chosen blocks, or 0 for a dense row.
    extra_tokens_read:  int32 [B, H_kv] tokens read in addition to those attended: the pilot, and a dense row's chosen part.
    """

    budget: Tensor
    num_samples: Tensor
    log_weight: Tensor
    num_pages: Tensor
    lse: Tensor
    num_chosen: Tensor
    extra_tokens_read: Tensor


@op
def plan_pilot(num_chosen: Tensor, context_lens: Tensor, *, block_tokens: int, base_fraction: float) -> tuple[Tensor, Tensor]:
    """Sizes of each row's residual and pilot.

    Args:
        num_chosen: int32 [B, H_kv] blocks of ``block_tokens`` tokens that the row has chosen, the newest among them.
        context_lens: int32 [B].
        block_tokens: page_size, or 1.
        base_fraction: the pilot's share of the residual; at least `MIN_PILOT` tokens.

    Returns:
        num_residual n_s and num_pilot m, int32 [B, H_kv]; m is 0 where n_s < 2 `MIN_PILOT` (the row is not sampled).
    """


@op(native=native.available)
def plan_samples(
    statistics: ResidualStatistics,
    lse: Tensor,
    num_chosen: Tensor,
    num_residual: Tensor,
    num_pilot: Tensor,
    num_pages: Tensor,
    context_lens: Tensor,
    *,
    guarantee: str,
    epsilon: float,
    delta: float,
    min_context: int,
    max_sample: int | None,
) -> SamplePlan:
    """Compute how many residual tokens must be drawn for an error bound to hold, and which rows do not profit from sampling.

    r is the summand of the estimated sum over the residual's n_s tokens, Sigma its covariance there, D the softmax
    denominator, o = N / D the output; D, N and r are relative to one common maximum. Per query head:

    - `output` (first order, this project's own): r = e^s (v - o); ||error of o|| <= epsilon ||o|| with probability 1 - delta.
      b0 = c^2 (n_s / (epsilon D))^2 Tr Sigma / ||o||^2. The squared error is a weighted sum of chi-squares: by two moments it
      is chi-square of nu = (Tr Sigma)^2 / Tr(Sigma^2) degrees, c^2 = its 1 - delta quantile over nu (Wilson-Hilferty). ||o||^2
      is corrected for the pilot's own noise.
    - `denominator` (what the experiments of arXiv 2510.05688 ran): |error of D| <= epsilon D;
      b0 = (z n_s sigma / (epsilon D))^2.
    - `numerator_denominator` (its Lemma 4.2): r = e^s v within eps1 ||N|| and e^s within eps2 D, each at delta / 2 and
      epsilon / 4: the output is then within 2 (eps1 + eps2) = epsilon.

    A pilot's variances are uncertain, so they are raised to about their 99% bound by their kurtosis. Finite population:
    b = b0 / (1 + b0 / n_s). A row takes the largest b of its query heads, at least its pilot's size, rounded up to `ROUND_TO`.

    Sampling pays if chosen and drawn tokens are at most half of the context. A sample is never truncated.

    Args:
        statistics: from the pilot, float32 [B, H_q] each; `centred` for `output`.
        lse: float32 [B, H_q] of the chosen part.
        num_chosen, num_residual, num_pilot: int32 [B, H_kv], as in `plan_pilot`.
        num_pages, context_lens: int32 [B].
        guarantee, epsilon, delta: see above.
        min_context: rows with a shorter context are dense.
        max_sample: rows that need a larger sample are dense; None: no limit.
    """
