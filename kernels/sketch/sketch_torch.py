"""sketch in torch: unpacks the pages' signs and multiplies them tile by tile; everything else runs row by row.

Sums have a fixed shape or are pairwise, so that a page's sketch and a row's logits do not depend on the rest of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distributed_sparse.kernels.cache.append_torch import pack, quantise
from distributed_sparse.kernels.scratch import scratch
from distributed_sparse.kernels.sketch.sketch import (
    KEY_MEAN_BITS,
    MAGNITUDE_BITS,
    VALUE_MEAN_BITS,
    PageSketches,
    SketchSelection,
)

_TILE_TOKENS = 128
_SCRATCH_BYTES = 4 << 20
"""Unpacked float32 signs at a time."""


def append_sketches_torch(
    k_pages: Tensor, v_pages: Tensor, pages: Tensor, offsets: Tensor, counts: Tensor, sketches: PageSketches
) -> None:
    """See `append_sketches`."""
    full = pages[(counts > 0) & (offsets + counts == k_pages.shape[2])].long()
    if len(full) == 0:
        return
    keys, values = k_pages[full].float(), v_pages[full].float()  # [T, H_kv, S, d]
    size = keys.shape[2]
    sketches.key_means[full], key_scales = quantise(_sum(keys, 2) / size, KEY_MEAN_BITS)
    rest = rotate(keys - _decoded(sketches.key_means[full], key_scales, KEY_MEAN_BITS)[:, :, None])
    sketches.signs[full] = pack((rest > 0).to(torch.uint8), 1)
    sketches.magnitudes[full], magnitude_scales = quantise(_sum(rest.abs(), 3) / rest.shape[3], MAGNITUDE_BITS)
    sketches.value_means[full], value_scales = quantise(_sum(values, 2) / size, VALUE_MEAN_BITS)
    sketches.scales[full] = torch.cat([key_scales, magnitude_scales, value_scales], dim=-1)


def sketch_logits_torch(
    q: Tensor, sketches: PageSketches, page_table: Tensor, num_pages: Tensor, last_page_len: Tensor, scale: float
) -> Tensor:
    """See `sketch_logits`."""
    batch, num_q_heads, dim = q.shape
    _, heads, size, width = sketches.signs.shape
    group, tile_pages = num_q_heads // heads, max(_TILE_TOKENS // size, 1)
    queries = q.float().view(batch, heads, group, dim) * scale
    rotated = rotate(queries)
    totals = _sum(rotated, 3)
    logits = torch.full((batch, num_q_heads, page_table.shape[1] * size), float("-inf"))
    at_once = max(_SCRATCH_BYTES // (heads * tile_pages * size * dim * 4), 1)
    for b, full in enumerate(full_pages(num_pages, last_page_len, size)):
        of_row = logits[b].view(heads, group, -1)
        for start in range(0, full, at_once * tile_pages):
            count = min(full - start, at_once * tile_pages)
            tiles = -(-count // tile_pages)
            ids = torch.zeros(tiles * tile_pages, dtype=torch.long)  # the null page pads the last tile
            ids[:count] = page_table[b, start : start + count]
            signs = sketches.signs[ids].view(tiles, tile_pages, heads, size, width)
            signs = signs.permute(0, 2, 1, 3, 4).reshape(tiles, heads, tile_pages * size, width)
            unpacked = scratch("sketch: signs", (tiles, heads, tile_pages * size, dim))
            for i in range(8):
                unpacked[..., i * width : (i + 1) * width] = (signs >> i) & 1
            products = 2 * _products(rotated[b], unpacked) - totals[b, :, :, None]  # [tiles, H_kv, G, tile tokens]
            means, magnitudes = key_means_of(sketches, ids), magnitudes_of(sketches, ids)
            means = means.view(tiles, tile_pages, heads, dim).transpose(1, 2)
            of_means = _products(queries[b], means).repeat_interleave(size, dim=3)
            magnitudes = magnitudes.view(tiles, tile_pages, heads, 1, size).permute(0, 2, 3, 1, 4).flatten(3)
            found = (of_means + magnitudes * products).permute(1, 2, 0, 3).flatten(2)
            of_row[:, :, start * size : (start + count) * size] = found[:, :, : count * size]
    return logits


def select_by_sketch_torch(logits, sketches, page_table, num_pages, context_lens, tau, *, min_tokens, sink_pages, recent_pages):
    """See `select_by_sketch`."""
    batch, num_q_heads, tokens_wide = logits.shape
    _, heads, size, _ = sketches.signs.shape
    dim = sketches.key_means.shape[2] * 2
    tokens = torch.zeros(batch, heads, tokens_wide, dtype=torch.int32)
    num_tokens = torch.zeros(batch, heads, dtype=torch.int32)
    tail_out = torch.zeros(batch, num_q_heads, dim)
    tail_lse = torch.full((batch, num_q_heads), float("-inf"))
    last_page_len = context_lens - (num_pages - 1) * size
    for b, full in enumerate(full_pages(num_pages, last_page_len, size)):
        n, pages, scored = int(context_lens[b]), int(num_pages[b]), full * size
        kept = torch.zeros(heads, n, dtype=torch.bool)
        kept[:, : sink_pages * size] = True
        kept[:, max(pages - recent_pages, 0) * size :] = True
        kept[:, scored:] = True
        if scored > 0:
            probability, weights, lse = _probabilities(logits[b, :, :scored].view(heads, -1, scored))
            floor = probability.topk(min_tokens, dim=1).values[:, -1:] if scored > min_tokens else -1.0
            kept[:, :scored] |= (probability > tau / n) | (probability >= floor)
            dropped = weights.masked_fill(kept[:, None, :scored], 0.0)
            of_pages = dropped.unflatten(2, (full, size)).sum(3)  # [H_kv, G, full]
            mass = of_pages.sum(2, keepdim=True)
            values = value_means_of(sketches, page_table[b, :full].long()).transpose(0, 1)  # [H_kv, full, d]
            tail_out[b] = (of_pages @ values / mass.clamp_min(1e-38)).flatten(0, 1)
            tail_lse[b] = (mass.log() + lse).flatten()
        num_tokens[b] = kept.sum(1)
        position = torch.arange(n, dtype=torch.int32).expand(heads, -1)
        tokens[b].masked_scatter_(torch.arange(tokens_wide) < num_tokens[b, :, None], position[kept])
    return SketchSelection(tokens, num_tokens, tail_out, tail_lse)


def sketch_probabilities_torch(logits: Tensor, heads: int, num_tokens: Tensor) -> Tensor:
    """See `sketch_probabilities`."""
    batch, _, width = logits.shape
    found = torch.zeros(batch, heads, width)
    for b, scored in enumerate(num_tokens.tolist()):
        if scored > 0:
            found[b, :, :scored] = _probabilities(logits[b, :, :scored].view(heads, -1, scored))[0]
    return found


def _products(q: Tensor, rows: Tensor) -> Tensor:
    """q [H_kv, G, d] by rows [tiles, H_kv, n, d]: [tiles, H_kv, G, n]. Every product has the same shape."""
    queries = q.expand(len(rows), -1, -1, -1).flatten(0, 1)
    return torch.bmm(queries, rows.flatten(0, 1).mT).unflatten(0, rows.shape[:2])


def _probabilities(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From logits [H_kv, G, n]: the group's mean softmax [H_kv, n], each head's softmax, and its log-sum-exp [H_kv, G, 1]."""
    lse = logits.logsumexp(2, keepdim=True)
    weights = (logits - lse).exp()
    probability = weights[:, 0].clone()
    for g in range(1, weights.shape[1]):  # sequential: torch.sum's order may change with H_kv
        probability += weights[:, g]
    return probability / weights.shape[1], weights, lse


def full_pages(num_pages: Tensor, last_page_len: Tensor, page_size: int) -> list[int]:
    """Number of full pages of each row."""
    return (num_pages - (last_page_len < page_size).int()).clamp_min(0).tolist()


def rotate(x: Tensor) -> Tensor:
    """H x over the last dimension d. H is block-diagonal; its blocks are normalised Hadamard matrices of the
    largest power of two that divides d.

    Computed by butterflies, so that the bits do not depend on the shape of x.
    """
    dim = x.shape[-1]
    block = dim & -dim
    x, half = x.float(), 1
    while half < block:
        low, high = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x = torch.stack([low + high, low - high], dim=-2).flatten(-3)
        half *= 2
    return x * block**-0.5


def _sum(x: Tensor, dim: int) -> Tensor:
    """The pairwise sum over a dimension, which is removed."""
    x = x.movedim(dim, 0)
    while len(x) > 1:
        half = len(x) // 2
        odd = x[2 * half :]
        x = torch.cat([x[:half] + x[half : 2 * half], odd])
    return x[0]


def _decoded(packed: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Decode the result of `quantise` to float32 [..., n]."""
    codes = torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], dim=-1)
    return codes.float() * scales[..., :1].float() + scales[..., 1:].float()


def key_means_of(sketches: PageSketches, ids: Tensor) -> Tensor:
    """float32 [P, H_kv, d]."""
    return _decoded(sketches.key_means[ids], sketches.scales[ids, :, 0:2], KEY_MEAN_BITS)


def magnitudes_of(sketches: PageSketches, ids: Tensor) -> Tensor:
    """float32 [P, H_kv, page_size]."""
    return _decoded(sketches.magnitudes[ids], sketches.scales[ids, :, 2:4], MAGNITUDE_BITS)


def value_means_of(sketches: PageSketches, ids: Tensor) -> Tensor:
    """float32 [P, H_kv, d]."""
    return _decoded(sketches.value_means[ids], sketches.scales[ids, :, 4:6], VALUE_MEAN_BITS)
