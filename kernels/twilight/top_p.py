"""top_p: the smallest set of tokens that holds a share p of the softmax mass per query head, united over the group."""

from __future__ import annotations

from torch import Tensor

from distributed_sparse.kernels.dispatch import op


@op
def top_p(
    logits: Tensor,
    pages: Tensor,
    num_pages: Tensor,
    last_page_len: Tensor,
    p: float,
    *,
    page_size: int,
    sink_pages: int,
    recent_pages: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Prune candidates to the exact nucleus (Twilight, arXiv 2502.02770, section 4.1 and algorithm 1).

    Per query head, with w = softmax over the row's candidates: the kept set is {logit >= t} for the largest t whose mass is
    >= p; all ties with t are kept; p >= 1 keeps all. A row's list is the union of its G query heads' sets, and of all tokens of
    the first ``sink_pages`` and last ``recent_pages`` listed pages. The search runs on the order-preserving int32 image of the
    float32 logits, so tie classes are exact, and starts from the row's maximum over all its candidates (the released code
    starts from the first token's weight and stops at an absolute 1e-5; both keep too much). The order of sums depends on the
    row alone.

    Args:
        logits: float32 [B, H_q, P * page_size], entry i belongs to slot i % page_size of listed page i // page_size; entries
            past the row's last token are ignored.
        pages: int32 [B, H_kv, P] physical page ids in logical order (stride 0 over heads is allowed); undefined past the
            count.
        num_pages: int32 [B, H_kv]; 0 is allowed (nothing is kept).
        last_page_len: int32 [B] valid tokens in the last listed page of each of the sequence's rows.
        p: share of the mass, p > 0.
        page_size, sink_pages, recent_pages: see above.

    Returns:
        tokens int32 [B, H_kv, P * page_size]: physical slots (page * page_size + offset) in the order of the list, undefined
        past the count; num_tokens int32 [B, H_kv]; threshold float32 [B, H_q]: the least logit that each query head keeps
        (-inf where p >= 1, +inf for a row without candidates).
    """
