"""top_k_pages: the k best pages of every row, forced pages included, as an ascending list of physical page ids."""

from __future__ import annotations

from torch import Tensor

from distributed_sparse.kernels import native
from distributed_sparse.kernels.dispatch import op


@op(native=native.available)
def top_k_pages(
    scores: Tensor,
    page_table: Tensor,
    num_pages: Tensor,
    k: Tensor,
    *,
    sink_pages: int,
    recent_pages: int,
    capacity: int,
) -> tuple[Tensor, Tensor]:
    """Select min(k, num_pages) pages per (sequence, KV head) row.

    The first ``sink_pages`` and the last ``recent_pages`` pages of a row are forced and count towards k; the rest are the
    best by score. Ties: the lower logical page first. The list ascends in logical order, so its last entry is the newest
    page. A row with k >= num_pages lists all its pages. If the forced pages alone exceed k,
    the newest are kept first, then the sinks in order.

    To rank single tokens, pass an identity table: a "page" is then a token, and its id the position.

    Args:
        scores: float32 [B, H_kv, P], or int32 with values 0 .. 65535 (few distinct values: a counting histogram finds the
            threshold, without a sort); entries past ``num_pages[b]`` are ignored; NaN does not occur.
        page_table: int32 [B, P] physical page ids in logical order.
        num_pages: int32 [B].
        k: int32 [B] pages to keep per row (data, not a shape).
        sink_pages, recent_pages: forced pages at the start and the end.
        capacity: width of the result; the caller guarantees min(k, num_pages) <= capacity.

    Returns:
        pages int32 [B, H_kv, capacity] (entries past the count are undefined), counts int32 [B, H_kv].
    """
