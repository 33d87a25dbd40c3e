"""hamming_scores in torch: gathers signatures tile by tile and counts their differing bits in eight-byte lanes."""

from __future__ import annotations

import torch
from torch import Tensor

from distributed_sparse.kernels.scratch import scratch

_TILE_WORDS = 1 << 18
"""Words gathered at a time: few calls, and the words and one temporary stay in the CPU cache."""


def hamming_scores_torch(q_signatures: Tensor, signatures: Tensor, page_table: Tensor, context_lens: Tensor) -> Tensor:
    """See `hamming_scores`."""
    num_pages, heads, page_size, group, words = signatures.shape
    batch, width = page_table.shape
    scores = torch.full((batch, heads, width * page_size), -1, dtype=torch.int32)
    # Process two words per lane if their number is even.
    lane = torch.int64 if group * words % 2 == 0 else torch.int32
    blocks = signatures.view(num_pages, -1).view(lane)  # [num_pages, H_kv * S * lanes]
    queries = q_signatures.reshape(batch, heads, 1, group * words).view(lane)  # [B, H_kv, 1, lanes]
    tile_pages = max(_TILE_WORDS // (heads * page_size * group * words), 1)
    gathered = scratch("hamming_scores: words", (tile_pages, blocks.shape[1]), lane)
    temporary = scratch("hamming_scores: spare", gathered.shape, lane)
    for b, length in enumerate(context_lens.tolist()):
        pages_used = -(-length // page_size)
        for start in range(0, pages_used, tile_pages):
            end = min(start + tile_pages, pages_used)
            x, spare = gathered[: end - start], temporary[: end - start]
            torch.index_select(blocks, 0, page_table[b, start:end], out=x)
            by_token = x.view(end - start, heads, page_size, -1)
            by_token.bitwise_xor_(queries[b])
            differing = _popcount_(x, spare).view_as(by_token)
            total = differing[..., 0]
            for i in range(1, differing.shape[-1]):
                total = total + differing[..., i]
            tokens = slice(start * page_size, min(end * page_size, length))
            agreeing = (32 * group * words - total).transpose(0, 1).flatten(1)  # [H_kv, tokens]
            scores[b, :, tokens] = agreeing[:, : tokens.stop - tokens.start].to(torch.int32)
    return scores


def _popcount_(x: Tensor, spare: Tensor) -> Tensor:
    """Ones in each int32 or int64, in place; ``spare`` is overwritten. Shifts are arithmetic, so each is masked."""
    bits = 8 * x.element_size()
    ones = (1 << bits) - 1

    def every(pattern: int) -> int:
        """The byte pattern repeated, as a signed number."""
        value = ones // 0xFF * pattern
        return value - (1 << bits) if value >> (bits - 1) else value

    torch.bitwise_right_shift(x, 1, out=spare)
    x -= spare.bitwise_and_(every(0x55))
    torch.bitwise_right_shift(x, 2, out=spare)
    x.bitwise_and_(every(0x33)).add_(spare.bitwise_and_(every(0x33)))
    torch.bitwise_right_shift(x, 4, out=spare)
    x.add_(spare).bitwise_and_(every(0x0F))
    x *= every(0x01)  # the highest byte becomes the sum of all
    x >>= bits - 8
    return x
