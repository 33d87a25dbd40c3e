"""attend on a CPU with `attend.cpp`: reads pages and tokens in place, each once for all query heads of its group."""

from __future__ import annotations

import torch
from torch import Tensor

from distributed_sparse.kernels import native


def attend_native(
    q, k_pages, v_pages, pages, num_pages, last_page_len, scale, *, tokens=None, num_tokens=None, log_weight=None,
    partial=None, return_lse=False
):  # fmt: skip
    """See `attend`; the bits of a row do not depend on the number of threads."""
    assert k_pages.stride()[1:] == v_pages.stride()[1:] == (k_pages[0, 0].numel(), k_pages.shape[3], 1)
    batch, num_q_heads, head_dim = q.shape
    _, num_kv_heads, page_size, _ = k_pages.shape
    queries = (q.float() * scale).contiguous()
    pages, num_pages, last_page_len = native.listed(pages), num_pages.int(), last_page_len.int().contiguous()
    if tokens is None or num_tokens is None:
        tokens = num_tokens = None
    else:
        tokens, num_tokens = native.listed(tokens), num_tokens.int()
    weight = None if log_weight is None else log_weight.float().contiguous()
    parts = (None, None) if partial is None else (partial[0].float().contiguous(), partial[1].float().contiguous())
    out, lse = torch.empty(batch, num_q_heads, head_dim), torch.empty(batch, num_q_heads)

    def strides(entries: Tensor | None) -> tuple[int, int]:
        return (entries.stride(0), entries.stride(1)) if entries is not None else (0, 0)

    native.run(
        f"attend_{native.DTYPES[k_pages.dtype]}", queries, k_pages, v_pages, k_pages.stride(0), k_pages.stride(1), pages,
        *strides(pages), num_pages, *strides(num_pages), last_page_len, tokens, *strides(tokens), num_tokens,
        *strides(num_tokens), weight, *parts, batch, num_kv_heads, num_q_heads // num_kv_heads, head_dim, page_size, out, lse
    )  # fmt: skip
    return (out, lse) if return_lse else out.to(q.dtype)
