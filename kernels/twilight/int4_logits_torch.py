"""int4_logits in torch: unpacks codes tile by tile into scratch that fits in the CPU cache, and multiplies them there."""

from __future__ import annotations

import torch
from torch import Tensor

from distributed_sparse.kernels.scratch import scratch

_TILE_TOKENS = 128
"""Tokens per matrix product. All products have one shape (a short last tile is padded), so the bits of a token's logit do not
depend on the row's length or the batch."""

_SCRATCH_BYTES = 4 << 20
"""Unpacked float32 codes at a time: large enough to amortise a call, small enough to stay in the CPU cache."""


def int4_logits_torch(q, key_codes, key_scales, pages, num_pages, last_page_len, scale):
    """See `int4_logits`."""
    batch, num_q_heads, dim = q.shape
    heads, page_size, width = key_codes.shape[1:]
    group, num_rows = num_q_heads // heads, batch * heads
    q_rows = q.float().view(num_rows, group, dim) * scale
    q_sums = q_rows.cumsum(dim=-1)[..., -1:]  # sequential: the order of torch.sum may change with the batch

    # A tile is a fixed number of listed pages of one row; past the row's list it is padded with the null page.
    tile_pages = max(_TILE_TOKENS // page_size, 1)
    listed = num_pages.reshape(num_rows).long()
    per_row = (listed + tile_pages - 1) // tile_pages
    row = torch.arange(num_rows).repeat_interleave(per_row)  # [I]
    index = torch.arange(len(row)) - (per_row.cumsum(0) - per_row)[row]
    place = index[:, None] * tile_pages + torch.arange(tile_pages)  # [I, tile_pages]
    ids = pages[(row // heads)[:, None], (row % heads)[:, None], place.clamp(max=max(pages.shape[2] - 1, 0))].long()
    blocks = (ids * heads + (row % heads)[:, None]).masked_fill_(place >= listed[row, None], 0)

    per_byte = dim // width
    tile_tokens = tile_pages * page_size
    tiles_at_once = max(_SCRATCH_BYTES // (tile_tokens * dim * 4), 1)
    most = min(tiles_at_once, len(row))
    code_blocks = key_codes.view(-1, page_size * width)
    gathered = scratch("int4_logits: codes", (most, tile_pages, page_size * width), torch.uint8)
    part = scratch("int4_logits: codes of a part", (most, tile_tokens, width), torch.uint8)
    unpacked = scratch("int4_logits: unpacked", (most, tile_tokens, dim))
    results = scratch("int4_logits: results", (len(row), group, tile_tokens))
    queries = q_rows[row]
    for start in range(0, len(row), tiles_at_once):
        some = slice(start, min(start + tiles_at_once, len(row)))
        count = some.stop - start
        codes = gathered[:count]
        torch.index_select(code_blocks, 0, blocks[some].flatten(), out=codes.flatten(0, 1))
        for i in range(per_byte):
            wide = unpacked[:count, :, i * width : (i + 1) * width]
            wide.copy_(_codes_of_part(codes.view(count, tile_tokens, width), i, per_byte, part[:count]))
        torch.bmm(queries[some], unpacked[:count].transpose(1, 2), out=results[some])
    scales = key_scales.view(-1, page_size * 2).index_select(0, blocks.flatten()).float()
    key_scale, minimum = scales.view(-1, 1, tile_tokens, 2).unbind(-1)
    results.mul_(key_scale).addcmul_(q_sums[row], minimum)

    last = (index == per_row[row] - 1).nonzero()[:, 0]  # only a row's last tile may extend past its end
    length = (listed - 1) * page_size + last_page_len.long().repeat_interleave(heads)
    in_last = (length[row] - index * tile_tokens)[last]
    past = torch.arange(tile_tokens) >= in_last[:, None]
    results[last] = results[last].masked_fill_(past[:, None], float("-inf"))

    tokens = pages.shape[2] * page_size
    logits = torch.empty(num_rows, group, -(-tokens // tile_tokens), tile_tokens)
    logits[row, :, index] = results
    unlisted = torch.arange(logits.shape[2]) >= per_row[:, None]
    if unlisted.any():
        logits.masked_fill_(unlisted[:, None, :, None], float("-inf"))
    return logits.flatten(2)[..., :tokens].reshape(batch, num_q_heads, tokens)


def _codes_of_part(codes: Tensor, i: int, per_byte: int, out: Tensor) -> Tensor:
    """The i-th lowest code of every byte, uint8 [I, tile_tokens, width]."""
    if per_byte == 1:
        return codes
    bits = 8 // per_byte
    shifted = codes if i == 0 else torch.bitwise_right_shift(codes, i * bits, out=out)
    return shifted if i == per_byte - 1 else torch.bitwise_and(shifted, 2**bits - 1, out=out)
