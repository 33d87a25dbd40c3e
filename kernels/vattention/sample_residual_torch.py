"""sample_residual in torch: tabulates the bijection's round functions, so that its rounds are gathers.

The draw uses numpy, for its unsigned integers and its cheap calls on the last few values that still walk.

The bijection of [0, n_s) under eight 32-bit round keys, with the same bits here, in C++, in Triton and in the reference:
w is the bit length of n_s - 1, but at least 6, so that 2^w holds n_s; a = w // 2, b = w - a. A value x of w bits is the pair
L = x >> b (a bits), R = x & (2^b - 1) (b bits). Round i of eight: (L, R) -> (R, L ^ (mix(R ^ key_i) & (2^c - 1))), where c is
the width of L in that round: a where i is even, b where it is odd. mix is the 32-bit finaliser "lowbias32" (Chris Wellons):
y ^= y >> 16, y *= 0x7FEB352D, y ^= y >> 15, y *= 0x846CA68B, y ^= y >> 16, modulo 2^32, with logical shifts. After the rounds
x = L << b | R again, and all eight are repeated until x < n_s (cycle walking). Each round is invertible, so this is a
bijection of [0, 2^w), and cycle walking makes it one of [0, n_s).
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distributed_sparse.kernels.philox import SAMPLE_RESIDUAL, philox_rounds
from distributed_sparse.kernels.vattention.sample_residual import MIN_WIDTH, ROUNDS

_PAST = torch.iinfo(torch.int32).max


def sample_residual_torch(
    chosen, num_chosen, page_table, context_lens, num_samples, random_key, *, block_tokens, page_size, layer, first_kv_head,
    draw, capacity
):  # fmt: skip
    """See `sample_residual`."""
    batch, heads, _ = chosen.shape
    block_bits, page_bits = block_tokens.bit_length() - 1, page_size.bit_length() - 1
    num_blocks = (context_lens + (block_tokens - 1)) >> block_bits
    residual = ((num_blocks[:, None] - num_chosen) << block_bits).view(-1).numpy()  # the partial block is always chosen
    counts = num_samples.reshape(-1).numpy()
    by_width = defaultdict(list)  # rows of equal w have halves of equal widths and are drawn together
    for row, (size, count) in enumerate(zip(residual.tolist(), counts.tolist())):
        if count:
            by_width[max((size - 1).bit_length(), MIN_WIDTH)].append(row)

    keys = _round_keys(random_key.numpy(), heads, layer, first_kv_head, draw)  # [ROUNDS, R]
    chosen, num_chosen = chosen.flatten(0, 1), num_chosen.reshape(-1)
    slots = torch.empty(batch * heads, capacity, dtype=torch.int32)
    for width, some in by_width.items():
        rows = np.array(some)
        ranks = torch.from_numpy(_draw(keys[:, rows], residual[rows], counts[rows], width))  # [rows, most]
        is_all = len(some) == len(slots)
        index = torch.from_numpy(rows)
        of_rows = (chosen, num_chosen) if is_all else (chosen[index], num_chosen[index])
        positions = (_unchosen(ranks >> block_bits, *of_rows) << block_bits).bitwise_or_(ranks & (block_tokens - 1))
        table_rows = torch.from_numpy(rows // heads * page_table.shape[1]).int()[:, None]
        entries = (positions >> page_bits).add_(table_rows)
        pages = page_table.reshape(-1).index_select(0, entries.view(-1)).view_as(entries)
        drawn = (pages << page_bits).bitwise_or_(positions.bitwise_and_(page_size - 1))
        if is_all:
            slots[:, : drawn.shape[1]] = drawn
        else:
            slots[index, : drawn.shape[1]] = drawn
    return slots.view(batch, heads, capacity)


def _draw(keys: NDArray[np.uint32], residual: NDArray[np.int32], counts: NDArray[np.int32], width: int) -> NDArray[np.int32]:
    """Ranks [R, max count] of rows whose bijection is ``width`` bits wide; 0 past a row's count.

    keys: [ROUNDS, R]; residual, counts: [R].
    """
    num_rows, most = len(counts), int(counts.max())
    low_bits = width - width // 2
    high_mask, low_mask = (1 << (width // 2)) - 1, (1 << low_bits) - 1
    functions = _mix(keys[:, :, None] ^ np.arange(1 << low_bits, dtype=np.uint32))  # [ROUNDS, R, 2^b]
    functions[0::2] &= high_mask
    functions[1::2] &= low_mask
    tables = functions.reshape(ROUNDS, -1).astype(np.intp)

    # Each half carries its row number above its own bits, so it is an index into the tables.
    row = (np.arange(num_rows) << low_bits)[:, None]
    x = np.arange(most)
    high, low = _permute(tables, ((x >> low_bits) | row).ravel(), ((x & low_mask) | row).ravel())
    ranks = (high & high_mask) << low_bits | (low & low_mask)
    limits = np.repeat(residual, most)
    outside = ranks >= limits
    drawn = (x < counts[:, None]).ravel()
    walking = (outside & drawn).nonzero()[0]  # a start at or past n_s might never walk into range
    high, low, limits = high[walking], low[walking], limits[walking]
    while len(walking):
        high, low = _permute(tables, high, low)
        value = (high & high_mask) << low_bits | (low & low_mask)
        ranks[walking] = value
        still = (value >= limits).nonzero()[0]
        walking, high, low, limits = walking[still], high[still], low[still], limits[still]
    return (ranks * drawn).astype(np.int32).reshape(num_rows, most)


def _permute(
    tables: NDArray[np.intp], high: NDArray[np.intp], low: NDArray[np.intp]
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Apply all rounds once."""
    for table in tables:
        high, low = low, high ^ table.take(low)
    return high, low


def _mix(y: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """lowbias32, in place."""
    y ^= y >> 16
    y *= np.uint32(0x7FEB352D)
    y ^= y >> 15
    y *= np.uint32(0x846CA68B)
    y ^= y >> 16
    return y


def _unchosen(ranks: Tensor, chosen: Tensor, num_chosen: Tensor) -> Tensor:
    """The index of the ranks[r, i]-th block that is not among the ascending chosen[r, : num_chosen[r]]. int32 [R, m]."""
    most = int(num_chosen.max())
    if most == 0:
        return ranks.clone()
    index = torch.arange(most, dtype=torch.int32)
    before = chosen[:, :most] - index  # unchosen blocks before chosen block j
    before.masked_fill_(index >= num_chosen[:, None], _PAST)
    return torch.searchsorted(before, ranks, right=True, out_int32=True).add_(ranks)


def _round_keys(random_key: NDArray[np.int64], heads: int, layer: int, first_kv_head: int, draw: int) -> NDArray[np.uint32]:
    """Round keys from Philox4x32-10, [ROUNDS, B * H_kv]. In numpy, which is cheaper for so few numbers."""
    batch, calls = random_key.shape[1], ROUNDS // 4
    k0, k1, sample_index, position = random_key[:, :, None]  # [B, 1] each
    use = np.arange(first_kv_head, first_kv_head + heads) << 20 | layer << 8 | draw << 4 | SAMPLE_RESIDUAL
    counter = np.broadcast_arrays(np.arange(calls)[:, None, None], sample_index, position, use)
    return np.stack(philox_rounds(k0, k1, *counter), axis=1).reshape(ROUNDS, batch * heads).astype(np.uint32)
