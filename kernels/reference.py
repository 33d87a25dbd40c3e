"""The kernels once more in float64, written for clarity: what the tests compare with, and nothing else uses."""

from __future__ import annotations

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
