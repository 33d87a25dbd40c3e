"""sample_residual: a uniform sample without replacement of a row's residual, the tokens that it has not chosen."""

from __future__ import annotations

from torch import Tensor

from distributed_sparse.kernels import native
from distributed_sparse.kernels.dispatch import op

SAMPLE, PILOT = 0, 1
"""Which of a row's two independent draws."""

ROUNDS = 8
"""Feistel rounds of the bijection."""

MIN_WIDTH = 6
"""Minimum width of the bijection in bits: eight rounds over halves of one or two bits do not mix well."""


@op(native=native.available)
def sample_residual(
    chosen: Tensor,
    num_chosen: Tensor,
    page_table: Tensor,
    context_lens: Tensor,
    num_samples: Tensor,
    random_key: Tensor,
    *,
    block_tokens: int,
    page_size: int,
    layer: int,
    first_kv_head: int,
    draw: int,
    capacity: int,
) -> Tensor:
    """Draw ``num_samples`` distinct tokens per row, each subset of that size equally likely (vAttention, arXiv 2510.05688).

    The residual of a row is its context without the *chosen* blocks: n_s tokens, ranked 0 .. n_s - 1 by position. A keyed
    bijection of [0, n_s) (a Feistel network over the smallest power of two >= n_s, at least 2^6, with halves of unequal
    width if the exponent is odd, cycle walking back into range, round keys from Philox) maps 0, 1, 2, ... to ranks. Its first
    ``num_samples`` values are the sample: exactly that many, without rejection. A rank becomes a position through the
    prefix counts of the chosen blocks (binary search), and a slot through the page table. Equal arguments give equal bits in
    torch, C++ and Triton, for any batch, any order, and any rank that holds the head.

    Key of Philox4x32-10 (`philox.py`): (seed low, seed high). Counter: (i, sample index, position, 1 | draw << 4 | layer << 8 |
    global KV head << 20) for the i-th group of four round keys; the lowest 4 bits distinguish this use from token sampling (0).

    Args:
        chosen: int32 [B, H_kv, F] chosen blocks of ``block_tokens`` consecutive tokens: ascending logical indices without
            duplicates; undefined past the count.
        num_chosen: int32 [B, H_kv]. With block_tokens > 1 the newest, possibly partial block is always among them.
        page_table: int32 [B, P] physical page ids in logical order; undefined past the count.
        context_lens: int32 [B].
        num_samples: int32 [B, H_kv], 0 <= num_samples <= min(n_s, capacity).
        random_key: int64 [4, B]: low and high 32 bits of the seed, sample index, position; each in [0, 2^32).
        block_tokens: page_size, or 1.
        page_size: of the cache.
        layer: layer index, below 4096.
        first_kv_head: global index of the shard's first KV head; global indices are below 4096.
        draw: `SAMPLE` or `PILOT`.
        capacity: width of the result.

    Returns:
        int32 [B, H_kv, capacity] physical token slots (page * page_size + offset) in the order drawn; past the count undefined.
    """
