"""page_scores: Quest's upper bound of q.k for every page of a row."""

from __future__ import annotations

from torch import Tensor

from distributed_sparse.kernels.dispatch import op


@op
def page_scores(q: Tensor, page_min_max: Tensor, page_table: Tensor, num_pages: Tensor, group_reduction: str = "max") -> Tensor:
    """Score every page of every (sequence, KV head) row (Quest, arXiv 2406.10774, section 3.2, algorithm 1).

    For one query head, score(page) = sum_d max(q_d m_d, q_d M_d), computed as relu(q).M + min(q, 0).m in float32: an
    upper bound of q.k for every key k of the page. No scale, no softmax. The G query heads of a KV head are then reduced.

    Args:
        q: [B, H_q, d] post-RoPE queries; H_q = G * H_kv; query head h belongs to KV head h // G.
        page_min_max: [num_pages_total, H_kv, 2, d] channel-wise min (0) and max (1) per physical page, dtype of the cache.
        page_table: int32 [B, P] physical page ids in logical order; entries past the count are undefined.
        num_pages: int32 [B] pages in use, 0 <= num_pages <= P (0: a padded row).
        group_reduction: "max" or "sum" over the query heads of the group.

    Returns:
        float32 [B, H_kv, P]; -inf at and past ``num_pages[b]``.

    Raises:
        ValueError: an unknown ``group_reduction``.
    """


def sums_over_group(group_reduction: str) -> bool:
    """Whether a group's scores are summed (True) or their maximum is taken (False). Used by the implementations."""
    if group_reduction not in ("max", "sum"):
        raise ValueError(f"group_reduction={group_reduction!r} is unknown; use 'max' or 'sum'")
    return group_reduction == "sum"
