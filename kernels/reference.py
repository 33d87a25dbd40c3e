"""The kernels once more in float64, written for clarity: what the tests compare with, and nothing else uses."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def append_reference(
    k: Tensor, v: Tensor, pages: Tensor, starts: Tensor, offsets: Tensor, counts: Tensor, k_pages: Tensor, v_pages: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `append`. New (k_pages, v_pages) and the min and max of all that each written page then holds (others: 0)."""
    k_pages, v_pages = k_pages.clone(), v_pages.clone()
    num_pages, heads, _, dim = k_pages.shape
    page_min_max = torch.zeros(num_pages, heads, 2, dim, dtype=k_pages.dtype)
    for page, start, offset, count in zip(pages.tolist(), starts.tolist(), offsets.tolist(), counts.tolist()):
        if count == 0:
            continue
        for i in range(count):
            k_pages[page, :, offset + i] = k[start + i] + 0.0
            v_pages[page, :, offset + i] = v[start + i]
        held = k_pages[page, :, : offset + count]
        page_min_max[page] = torch.stack([held.min(dim=1).values, held.max(dim=1).values], dim=1)
    return k_pages, v_pages, page_min_max


def page_scores_reference(
    q: Tensor, page_min_max: Tensor, page_table: Tensor, num_pages: Tensor, group_reduction: str = "max"
) -> Tensor:
    """See `page_scores`: sum_d max(q_d m_d, q_d M_d), as the paper writes it. float64 [B, H_kv, P]."""
    batch, heads = q.shape[0], page_min_max.shape[1]
    group = q.shape[1] // heads
    scores = torch.full((batch, heads, page_table.shape[1]), float("-inf"), dtype=torch.float64)
    for b in range(batch):
        for p in range(int(num_pages[b])):
            low, high = page_min_max[page_table[b, p]].double().unbind(dim=1)  # [H_kv, d] each
            for h in range(heads):
                queries = q[b, h * group : (h + 1) * group].double()
                bound = torch.maximum(queries * low[h], queries * high[h]).sum(dim=-1)  # [G]
                scores[b, h, p] = bound.max() if group_reduction == "max" else bound.sum()
    return scores


def top_k_pages_reference(
    scores: Tensor, page_table: Tensor, num_pages: Tensor, k: Tensor, *, sink_pages: int, recent_pages: int
) -> list[list[list[int]]]:
    """See `top_k_pages`. The selected physical pages of every row: [B][H_kv] lists, by a plain stable sort."""
    batch, heads, _ = scores.shape
    selected: list[list[list[int]]] = [[[] for _ in range(heads)] for _ in range(batch)]
    for b in range(batch):
        n = int(num_pages[b])
        newest_first = range(n - 1, max(n - recent_pages, 0) - 1, -1)
        for h in range(heads):
            best_first = (-scores[b, h, :n]).sort(stable=True).indices.tolist()
            order = list(dict.fromkeys([*newest_first, *range(min(sink_pages, n)), *best_first]))  # each page once
            selected[b][h] = [int(page_table[b, p]) for p in sorted(order[: int(k[b])])]
    return selected


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `rms_norm`, without any rounding. float64 [..., D]."""
    wide = x.double()
    return weight.double() * wide / (wide.square().mean(dim=-1, keepdim=True) + eps).sqrt()


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `rotary`: channel i + d/2 is the imaginary part of channel i; the rotation is a complex product. float64."""
    real, imaginary = x.double().chunk(2, dim=-1)
    turned = torch.complex(real, imaginary) * torch.complex(cos.double(), sin.double())[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


def attend_reference(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    pages: Tensor,
    num_pages: Tensor,
    last_page_len: Tensor,
    scale: float,
    *,
    tokens: Tensor | None = None,
    num_tokens: Tensor | None = None,
    log_weight: Tensor | None = None,
    partial: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """See `attend`: one softmax over all that a row lists, each token once. float64 out [B, H_q, d], lse [B, H_q]."""
    heads, page_size = k_pages.shape[1:3]
    group = q.shape[1] // heads
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(heads):
            slots = [(int(page), i) for page in pages[b, h, : int(num_pages[b, h])] for i in range(page_size)]
            if slots:
                slots = slots[: len(slots) - page_size + int(last_page_len[b])]
            weights = [0.0] * len(slots)
            if tokens is not None and num_tokens is not None:
                listed = tokens[b, h, : int(num_tokens[b, h])].tolist()
                slots += [(slot // page_size, slot % page_size) for slot in listed]
                weights += [float(log_weight[b, h]) if log_weight is not None else 0.0] * len(listed)
            where = torch.tensor(slots, dtype=torch.long).view(-1, 2)
            keys, values = (cache[where[:, 0], h, where[:, 1]].double() for cache in (k_pages, v_pages))  # [n, d]
            for i in range(h * group, (h + 1) * group):
                logits = keys @ q[b, i].double() * scale + torch.tensor(weights, dtype=torch.float64)
                parts = values
                if partial is not None and partial[1][b, i] > float("-inf"):  # what was attended counts as one token
                    logits = torch.cat([logits, partial[1][b, i, None].double()])
                    parts = torch.cat([values, partial[0][b, i, None].double()])
                if len(logits):
                    out[b, i], lse[b, i] = logits.softmax(0) @ parts, logits.logsumexp(0)
    return out, lse


def combine_reference(
    outs: Tensor, lses: Tensor, num_partials: Tensor, partial: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """See `combine`: a softmax over partial results. float64 out [R, G, d], lse [R, G]."""
    rows, _, group, dim = outs.shape
    out = torch.zeros(rows, group, dim, dtype=torch.float64)
    lse = torch.full((rows, group), float("-inf"), dtype=torch.float64)
    for r in range(rows):
        for g in range(group):
            parts = [(outs[r, c, g], lses[r, c, g]) for c in range(int(num_partials[r]))]
            if partial is not None:
                parts.append((partial[0][r, g], partial[1][r, g]))
            parts = [(part.double(), part_lse.double()) for part, part_lse in parts if part_lse > float("-inf")]
            if parts:
                logits = torch.stack([part_lse for _, part_lse in parts])
                out[r, g], lse[r, g] = logits.softmax(0) @ torch.stack([part for part, _ in parts]), logits.logsumexp(0)
    return out, lse


def prefill_attend_reference(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    """See `prefill_attend`: each query's softmax over positions 0 up to its own. float64 [query_start[R], H_q, d]."""
    heads, page_size, dim = k_pages.shape[1:]
    group = q.shape[1] // heads
    starts = query_start.tolist()
    out = torch.zeros(starts[-1], q.shape[1], dim, dtype=torch.float64)
    for r, (start, end) in enumerate(pairwise(starts)):
        context_len = int(context_lens[r])
        position = torch.arange(context_len)
        page = page_table[r].long()[position // page_size]
        keys, values = (cache[page, :, position % page_size].double() for cache in (k_pages, v_pages))  # [n, H_kv, d]
        unseen = position > (context_len - (end - start) + torch.arange(end - start))[:, None]  # [queries, n]
        for i in range(q.shape[1]):
            logits = q[start:end, i].double() @ keys[:, i // group].T * scale
            out[start:end, i] = logits.masked_fill(unseen, float("-inf")).softmax(-1) @ values[:, i // group]
    return out
