"""attend and combine in torch: gathers listed slots, a few chunks at a time, into scratch that fits in the CPU cache."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distributed_sparse.kernels.attend.attend import CHUNK_TOKENS
from distributed_sparse.kernels.scratch import scratch

SCRATCH_BYTES = 8 << 20
"""Float32 keys and values gathered at a time: large enough to amortise a call, small enough to stay in the CPU cache."""

CHUNK_WIDTHS = (64, 128, 256, 384, CHUNK_TOKENS)
"""A row's last chunk is padded to the smallest of these token counts that holds it. No page is larger than the first."""


@dataclass
class _Chunks:
    """Rows' lists cut into chunks of CHUNK_TOKENS and flattened: item i is one chunk of one row."""

    per_row: NDArray[np.int64]  # [R]
    row: NDArray[np.int64]  # [I]
    index: NDArray[np.int64]  # [I] place in its row's list of chunks
    length: NDArray[np.int64]  # [I] tokens, 1..CHUNK_TOKENS
    blocks: NDArray[np.int64]  # [I, CHUNK_TOKENS // block_tokens], 0 past the list
    block_tokens: int  # K and V viewed as [num_blocks, block_tokens, d]: a block is a page of one KV head, or one slot of it


def attend_torch(
    q, k_pages, v_pages, pages, num_pages, last_page_len, scale, *, tokens=None, num_tokens=None, log_weight=None,
    partial=None, return_lse=False
):  # fmt: skip
    """See `attend`."""
    batch, num_q_heads, head_dim = q.shape
    _, num_kv_heads, page_size, _ = k_pages.shape
    num_rows, group = batch * num_kv_heads, num_q_heads // num_kv_heads
    q_rows = q.reshape(num_rows, 1, group, head_dim)

    listed = num_pages.reshape(num_rows).numpy().astype(np.int64)
    in_last_page = last_page_len.numpy().astype(np.int64).repeat(num_kv_heads)
    lists = []
    if listed.any():
        lists.append(_cut(pages, listed, (listed - 1) * page_size + in_last_page, page_size, page_size))
    if tokens is not None and num_tokens is not None:
        listed = num_tokens.reshape(num_rows).numpy().astype(np.int64)
        lists.append(_cut(tokens, listed, listed, 1, page_size))

    num_partials = np.zeros(num_rows, dtype=np.int64)
    capacity = int(sum((chunks.per_row for chunks in lists), start=num_partials).max())
    outs = scratch("attend: partial outputs", (num_rows * capacity, group, head_dim))
    lses = torch.empty(num_rows * capacity, group)
    for chunks in lists:
        places = chunks.row * capacity + num_partials[chunks.row] + chunks.index
        _attend_chunks(q_rows, k_pages, v_pages, chunks, scale, outs, lses, places)
        num_partials = num_partials + chunks.per_row
    if log_weight is not None and tokens is not None:  # equal for all tokens of a row: changes a chunk's lse, not its output
        lses[torch.from_numpy(places)] += log_weight.reshape(num_rows, 1)[torch.from_numpy(chunks.row)]

    if partial is not None:
        partial = (partial[0].reshape(num_rows, group, head_dim), partial[1].reshape(num_rows, group))
    outs, lses = outs.view(num_rows, capacity, group, head_dim), lses.view(num_rows, capacity, group)
    out, lse = combine_torch(outs, lses, torch.from_numpy(num_partials), partial)
    out = out.view(batch, num_q_heads, head_dim)
    return (out, lse.view(batch, num_q_heads)) if return_lse else out.to(q.dtype)


def combine_torch(
    outs: Tensor, lses: Tensor, num_partials: Tensor, partial: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Merge normalised partial results by their log-sum-exps, in index order, ``partial`` last.

    Args:
        outs: float32 [R, C, G, d]; lses: float32 [R, C, G].
        num_partials: [R] how many of a row's C partial results are defined.
        partial: (out [R, G, d], lse [R, G]) one more partial result per row; lse -inf: none.

    Returns:
        out float32 [R, G, d], lse [R, G]; 0 and -inf for a row without partial results.
    """
    num_rows, capacity, group, head_dim = outs.shape
    defined = torch.arange(capacity) < num_partials[:, None]
    partial_lse = partial[1] if partial is not None else torch.full((num_rows, group), float("-inf"))
    lses = torch.cat([lses.masked_fill(~defined[..., None], float("-inf")), partial_lse[:, None]], dim=1)

    highest = lses.amax(dim=1)
    highest = highest.masked_fill(highest == float("-inf"), 0.0)
    weights = (lses - highest[:, None]).exp()
    live = (lses != float("-inf"))[..., None]  # an lse of NaN is not an empty partial: its row's result is NaN
    most = int(num_partials.max())
    weighted = scratch("combine", (num_rows, most, group, head_dim))
    torch.mul(weights[:, :most, :, None], outs[:, :most], out=weighted)
    parts = [*weighted.masked_fill_(~live[:, :most], 0.0).unbind(1)]  # the output of an empty partial may be NaN
    if partial is not None:
        parts.append((weights[:, -1, :, None] * partial[0]).where(live[:, -1], 0.0))
    out, total = torch.zeros(num_rows, group, head_dim), torch.zeros(num_rows, group)
    for part in parts:  # one by one in index order: the order of torch.sum would change with the capacity
        out += part
    for weight in (*weights[:, :most].unbind(1), weights[:, -1]):
        total += weight
    return out / total.where(total != 0, 1.0)[..., None], highest + total.log()


def _cut(entries: Tensor, counts: NDArray[np.int64], lengths: NDArray[np.int64], block_tokens: int, page_size: int) -> _Chunks:
    """Cut lists of pages (block_tokens = page_size) or of tokens (1) into chunks. In numpy, whose small calls are cheaper.

    Args:
        entries: int32 [B, H_kv, E] page ids or token slots; undefined past the count.
        counts: [R] entries listed; R = B * H_kv.
        lengths: [R] tokens in them.
    """
    num_kv_heads, width = entries.shape[1:]
    per_chunk = CHUNK_TOKENS // block_tokens
    per_row = (counts + per_chunk - 1) // per_chunk
    row = np.arange(len(counts)).repeat(per_row)
    index = np.arange(len(row)) - (per_row.cumsum() - per_row)[row]
    length = np.minimum(lengths[row] - index * CHUNK_TOKENS, CHUNK_TOKENS)

    place = index[:, None] * per_chunk + np.arange(per_chunk)  # [I, per_chunk]
    head = (row % num_kv_heads)[:, None]
    ids = entries.numpy()[(row // num_kv_heads)[:, None], head, np.minimum(place, width - 1)].astype(np.int64)
    if block_tokens == 1:
        blocks = (ids // page_size * num_kv_heads + head) * page_size + ids % page_size
    else:
        blocks = ids * num_kv_heads + head
    blocks[place >= counts[row, None]] = 0
    return _Chunks(per_row, row, index, length, blocks, block_tokens)


def _attend_chunks(
    q_rows: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    chunks: _Chunks,
    scale: float,
    outs: Tensor,
    lses: Tensor,
    places: NDArray[np.int64],
) -> None:
    """Attend q_rows [R, 1, G, d] over every chunk; item i goes to outs[places[i]] [G, d] and lses[places[i]] [G].

    An item's shape, and so its bits, depend on its own length alone, never on other items. Everything is computed in
    float32: torch's kernel is several times slower on float16, and on bfloat16 with one query.
    """
    head_dim = q_rows.shape[-1]
    block_elements = chunks.block_tokens * head_dim
    k_blocks, v_blocks = k_pages.view(-1, block_elements), v_pages.view(-1, block_elements)
    is_wide = q_rows.dtype == torch.float32
    # Each thread gets a whole number of chunks.
    threads = torch.get_num_threads()
    chunks_at_once = max(SCRATCH_BYTES // (2 * CHUNK_TOKENS * head_dim * 4) // threads, 1) * threads
    space = (2, chunks_at_once * CHUNK_TOKENS * head_dim)
    wide = scratch("attend", space)
    narrow = wide if is_wide else scratch("attend", space, k_pages.dtype)
    width_class = np.searchsorted(CHUNK_WIDTHS, chunks.length)
    for i in np.unique(width_class):
        width = CHUNK_WIDTHS[i]
        of_class, is_full = width_class == i, chunks.length == width
        for items in ((of_class & is_full).nonzero()[0], (of_class & ~is_full).nonzero()[0]):
            queries = q_rows.index_select(0, torch.from_numpy(chunks.row[items])).float()
            for start in range(0, len(items), at_once := chunks_at_once * (CHUNK_TOKENS // width)):
                some = items[start : start + at_once]
                blocks = torch.from_numpy(chunks.blocks[some, : width // chunks.block_tokens].ravel())
                used = len(some) * width * head_dim
                torch.index_select(k_blocks, 0, blocks, out=narrow[0, :used].view(-1, block_elements))
                torch.index_select(v_blocks, 0, blocks, out=narrow[1, :used].view(-1, block_elements))
                if not is_wide:
                    wide[:, :used].copy_(narrow[:, :used])
                keys, values = wide[:, :used].view(2, len(some), width, head_dim)
                mask = None if is_full[some[0]] else _mask_past(torch.from_numpy(chunks.length[some]), keys, values)
                out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    queries[start : start + at_once], keys[:, None], values[:, None], 0.0, False, attn_mask=mask, scale=scale
                )
                at = torch.from_numpy(places[some])
                outs.index_copy_(0, at, out[:, 0])
                lses.index_copy_(0, at, lse[:, 0])


def _mask_past(length: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """A float mask [I, 1, 1, width] of the tokens past each item's length; zeroes their keys and values, as 0 * NaN is NaN."""
    width, head_dim = keys.shape[1:]
    past = torch.arange(width) >= length[:, None]
    slots = past.flatten().nonzero().flatten()
    keys.view(-1, head_dim).index_fill_(0, slots, 0.0)
    values.view(-1, head_dim).index_fill_(0, slots, 0.0)
    return torch.zeros(len(length), 1, 1, width).masked_fill_(past[:, None, None], float("-inf"))
