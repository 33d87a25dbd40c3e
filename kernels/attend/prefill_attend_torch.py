"""prefill_attend in torch: attends each chunk over itself and over blocks of its history, merged by log-sum-exp."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from distributed_sparse.kernels.attend.attend_torch import combine_torch
from distributed_sparse.kernels.scratch import scratch

HISTORY_BLOCK_TOKENS = 4096
"""Tokens of a chunk's history gathered and attended at a time; bounds the scratch memory at any context length."""


def prefill_attend_torch(q, k_pages, v_pages, page_table, query_start, context_lens, scale, max_query_len):
    """See `prefill_attend`."""
    out = torch.empty_like(q)
    for (start, end), context_len, pages in zip(pairwise(query_start.tolist()), context_lens.tolist(), page_table.long()):
        if start < end:
            _attend_chunk(q[start:end], k_pages, v_pages, pages, context_len, scale, out[start:end])
    return out


def _attend_chunk(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, pages: Tensor, context_len: int, scale: float, out: Tensor
) -> None:
    """Attend one chunk q [L, H_q, d], the last L tokens of its context, into out [L, H_q, d]."""
    length, num_q_heads, head_dim = q.shape
    num_kv_heads = k_pages.shape[1]
    group = num_q_heads // num_kv_heads
    queries = q.view(length, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    history = context_len - length

    def attend(queries: Tensor, begin: int, end: int, is_causal: bool) -> tuple[Tensor, Tensor]:
        """Results [H_q, L, d] and [H_q, L]. KV heads are the batch; a group's query heads share K and V with stride 0."""
        keys, values = (
            _gather(cache, pages, begin, end, scratch_name)[:, None].expand(-1, queries.shape[1], -1, -1)
            for cache, scratch_name in ((k_pages, "prefill_attend: keys"), (v_pages, "prefill_attend: values"))
        )
        part, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, 0.0, is_causal, scale=scale
        )
        return part.float().reshape(num_q_heads, length, head_dim), lse.reshape(num_q_heads, length)

    merged = attend(queries, history, context_len, True)
    if history:
        one = torch.ones(num_q_heads, dtype=torch.int32)
        folded = queries.reshape(num_kv_heads, 1, group * length, head_dim)  # no mask: heads fold into queries
        for begin in range(0, history, HISTORY_BLOCK_TOKENS):
            part, lse = attend(folded, begin, min(begin + HISTORY_BLOCK_TOKENS, history), False)
            merged = combine_torch(part[:, None], lse[:, None], one, partial=merged)
    out.copy_(merged[0].transpose(0, 1))


def _gather(cache: Tensor, pages: Tensor, begin: int, end: int, scratch_name: str) -> Tensor:
    """Tokens begin..end of a sequence, [H_kv, end - begin, d], from its pages."""
    num_kv_heads, page_size, head_dim = cache.shape[1:]
    first = begin // page_size
    pages = pages[first : -(-end // page_size)]
    blocks = (pages * num_kv_heads + torch.arange(num_kv_heads)[:, None]).flatten()
    gathered = scratch(scratch_name, (len(blocks), page_size * head_dim), cache.dtype)
    torch.index_select(cache.view(-1, page_size * head_dim), 0, blocks, out=gathered)
    return gathered.view(num_kv_heads, -1, head_dim)[:, begin - first * page_size : end - first * page_size]
