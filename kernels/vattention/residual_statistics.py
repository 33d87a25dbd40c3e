"""residual_statistics: statistics of a row's residual (the tokens it has not chosen), estimated from a pilot sample."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from distributed_sparse.kernels.dispatch import op

GRAM_ROWS = 128
"""Maximum number of pilot tokens used for the trace of the squared covariance."""


class ResidualStatistics(NamedTuple):
    """Per query head, each float32 [B, H_q]. All exponentials are relative to one common maximum M of the row's query head
    (of the chosen part's log-sum-exp and the pilot's logits), so that none overflows; ratios do not depend on it.

    denominator:         D = sum of e^(s - M) over the context: exact over the chosen part, n_s / m times the pilot's m tokens.
    numerator_norm_sq:   ||N||^2, N = the same sum of e^(s - M) v: its plain square, not debiased.
    weight_variance:     variance of w_i = e^(s_i - M) over the residual (pilot's, divided by m - 1).
    weight_kurtosis:     E(w - mean)^4 / (E(w - mean)^2)^2 over the pilot; 1 where the variance is 0.
    trace:               Tr Sigma, Sigma the covariance over the residual of r_i = w_i (v_i - c) (divided by m - 1).
    trace_of_square:     Tr(Sigma^2), from the first min(m, 128) pilot tokens ("rows"): the sum over all pairs i, j of them of
                         ((r_i - mean) . (r_j - mean))^2 over rows^2, minus its bias (Tr Sigma)^2 / rows; never below
                         (Tr Sigma)^2 / d.
    kurtosis:            E||r - mean||^4 / (E||r - mean||^2)^2 over the pilot; 1 where the trace is 0.
    """

    denominator: Tensor
    numerator_norm_sq: Tensor
    weight_variance: Tensor
    weight_kurtosis: Tensor
    trace: Tensor
    trace_of_square: Tensor
    kurtosis: Tensor


@op
def residual_statistics(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    tokens: Tensor,
    num_tokens: Tensor,
    num_residual: Tensor,
    partial: tuple[Tensor, Tensor],
    scale: float,
    *,
    centred: bool,
) -> ResidualStatistics:
    """Statistics for sizing vAttention's sample (arXiv 2510.05688, section 4; `selection/vattention.py` has the formulas).

    A row's bits depend on the row alone, not on other rows or on the width of ``tokens``.

    Args:
        q: [B, H_q, d] post-RoPE queries; H_q = G * H_kv.
        k_pages, v_pages: [num_pages_total, H_kv, page_size, d], dtype of q.
        tokens: int32 [B, H_kv, T] the pilot's physical token slots (page * page_size + offset); undefined past the count.
        num_tokens: int32 [B, H_kv] pilot tokens m; results of a row with fewer than 2 are undefined (finite or not).
        num_residual: int32 [B, H_kv] tokens in the residual, n_s.
        partial: (out float32 [B, H_q, d], lse float32 [B, H_q]) attention over the chosen part; lse -inf where it is empty.
        scale: multiplies q.k.
        centred: c is the estimated output o = N / D; else 0, so that r = w v.
    """
