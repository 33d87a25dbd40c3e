"""signatures: signs of a learned hash of queries and cached keys, packed 32 to a word."""

from __future__ import annotations

from torch import Tensor

from distributed_sparse.kernels.dispatch import op


@op
def pack_signs(x: Tensor) -> Tensor:
    """Pack signs into words (HashAttention, arXiv 2412.14468, section 3).

    Args:
        x: [..., bits] floats, bits a multiple of 32.

    Returns:
        int32 [..., bits / 32]: bit j of word w is 1 where x[..., 32 w + j] > 0 (NaN gives 0).
    """


@op
def append_signatures(x: Tensor, pages: Tensor, starts: Tensor, offsets: Tensor, counts: Tensor, signatures: Tensor) -> None:
    """Pack the signs of new tokens' hashes and write them into their pages, in place.

    Args:
        x: [N, H_q, bits] hash outputs of the batch's keys, one per query head; H_q = G * H_kv.
        pages, starts, offsets, counts: int32 [T] runs, as in `append`.
        signatures: int32 [num_pages, H_kv, page_size, G, bits / 32].
    """
