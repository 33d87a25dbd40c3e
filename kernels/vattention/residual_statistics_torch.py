"""residual_statistics in torch: gathers keys and values once per KV head and never materialises the vectors r_i.

With w_i = e^(s_i - M), y = mean(w v), a_i = w_i - mean(w): r_i - mean(r) = w_i v_i - a_i c - y, so every moment follows from
|v_i|^2, v_i . c and v_i . y, and the Gram matrix of a query head from that of the values, which the group shares. "Mean" is
over the whole pilot, for the Gram rows too.

Internally, exponentials are relative to the pilot's largest logit: relative to M, fourth powers would underflow where the
chosen part dominates.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from distributed_sparse.kernels.scratch import scratch
from distributed_sparse.kernels.vattention.residual_statistics import GRAM_ROWS, ResidualStatistics


def residual_statistics_torch(q, k_pages, v_pages, tokens, num_tokens, num_residual, partial, scale, *, centred):
    """See `residual_statistics`."""
    batch, num_q_heads, dim = q.shape
    _, heads, page_size, _ = k_pages.shape
    group = num_q_heads // heads
    q = q.view(batch, heads, group, dim).float() * scale
    out, lse = partial[0].reshape(batch, heads, group, dim), partial[1].reshape(batch, heads, group)
    k_slots, v_slots = k_pages.view(-1, dim), v_pages.view(-1, dim)
    result = torch.full((len(ResidualStatistics._fields), batch, heads, group), float("nan"))
    for b, pilots in enumerate(num_tokens.tolist()):
        by_count = defaultdict(list)  # KV heads with equal m share calls: the shapes, and so the bits, depend on m alone
        for h, m in enumerate(pilots):
            if m > 1:
                by_count[m].append(h)
        for m, some in by_count.items():
            own: slice | list[int] = slice(None) if len(some) == heads else some
            slots = tokens[b, own, :m]
            head = torch.tensor(some, dtype=torch.int32)[:, None]
            index = (slots // page_size * heads + head) * page_size + slots % page_size
            gathered = scratch("residual_statistics", (2, index.numel(), dim), k_slots.dtype)
            torch.index_select(k_slots, 0, index.view(-1), out=gathered[0])
            torch.index_select(v_slots, 0, index.view(-1), out=gathered[1])
            keys, values = gathered.float().view(2, len(some), m, dim)
            result[:, b, own] = _of_rows(
                q[b, own], keys, values, num_residual[b, own, None] / m, out[b, own], lse[b, own], centred
            )
    return ResidualStatistics(*result.view(-1, batch, num_q_heads).unbind(0))


def _of_rows(q: Tensor, keys: Tensor, values: Tensor, ratio: Tensor, out: Tensor, lse: Tensor, centred: bool) -> Tensor:
    """The statistics, float32 [7, R, G], of rows with equal numbers of pilot tokens.

    q: [R, G, d], scaled. keys, values: float32 [R, m, d]. ratio: [R, 1] n_s / m. out [R, G, d] and lse [R, G]:
    attention over the chosen part.
    """
    m, dim = values.shape[1:]
    logits = torch.bmm(q, keys.transpose(1, 2))  # [R, G, m]
    highest = logits.amax(dim=-1)
    w = (logits - highest[..., None]).exp_()
    total = w.sum(dim=-1)  # [R, G]
    weighted = torch.bmm(w, values)  # [R, G, d]
    common = torch.maximum(lse, highest)
    chosen_factor, factor = (lse - common).exp(), (highest - common).exp()
    denominator = chosen_factor + ratio * factor * total
    out = out.masked_fill((lse == float("-inf"))[..., None], 0.0)
    numerator = chosen_factor[..., None] * out + (ratio * factor)[..., None] * weighted
    c = numerator / denominator[..., None] if centred else torch.zeros_like(numerator)

    mean_w, y = total / m, weighted / m
    a = w - mean_w[..., None]
    a_squared = a.square()
    weight_sum, weight_fourth = a_squared.sum(dim=-1), a_squared.square().sum(dim=-1)
    dots = torch.bmm(torch.cat([c, y], dim=1), values.transpose(1, 2))  # [R, 2 G, m]
    v_c, v_y = dots.chunk(2, dim=1)
    v_v = torch.linalg.vector_norm(values, dim=-1).square_()[:, None]  # [R, 1, m], without a temporary of the size of values
    c_c, c_y, y_y = _dot(c, c)[..., None], _dot(c, y)[..., None], _dot(y, y)[..., None]
    # |w v - a c - y|^2 = w (w v.v - 2 (a v.c + v.y)) + a (a c.c + 2 c.y) + y.y, in few calls
    of_w = torch.add(w * v_v, torch.addcmul(v_y, a, v_c), alpha=-2)
    of_a = torch.addcmul(c_y + c_y, a, c_c)
    norms = torch.addcmul(torch.addcmul(y_y, w, of_w), a, of_a).clamp_(min=0)
    norm_sum = norms.sum(dim=-1)
    trace = norm_sum / (m - 1)

    rows = min(m, GRAM_ROWS)
    gram = _squared_gram(values[:, :rows], w[..., :rows], a[..., :rows], c, y, mean_w)
    trace_of_square = torch.maximum(gram / rows**2 - trace.square() / rows, trace.square() / dim)
    return torch.stack(
        [
            denominator,
            _dot(numerator, numerator),
            factor**2 * weight_sum / (m - 1),
            torch.where(weight_sum > 0, m * weight_fourth / weight_sum.square(), 1.0),
            factor**2 * trace,
            factor**4 * trace_of_square,
            torch.where(norm_sum > 0, m * norms.square().sum(dim=-1) / norm_sum.square(), 1.0),
        ]
    )


def _squared_gram(values: Tensor, w: Tensor, a: Tensor, c: Tensor, y: Tensor, mean_w: Tensor) -> Tensor:
    """Sum over i, j of ((r_i - mean) . (r_j - mean))^2 for values [R, n, d]; w and a [R, G, n], c and y [R, G, d]. [R, G].

    The Gram matrix is W A W + 1 e^T + e 1^T + a h^T + h a^T with A = V V^T and W = diag(w): its squared norm needs no matrix
    per query head. Values, c and y are first shifted by the mean value, so that squares do not cancel.
    """
    origin = values.mean(dim=1, keepdim=True)  # [R, 1, d]
    values, c, y = values - origin, c - origin, y - mean_w[..., None] * origin
    shared = torch.bmm(values, values.transpose(1, 2))  # A: [R, n, n]
    v_c, v_y = torch.bmm(torch.cat([c, y], dim=1), values.transpose(1, 2)).chunk(2, dim=1)  # [R, G, n]
    c_c, c_y, y_y = _dot(c, c)[..., None], _dot(c, y)[..., None], _dot(y, y)[..., None]
    e = y_y / 2 - w * v_y + c_y * a
    h = c_c / 2 * a - w * v_c

    squares = w.square()
    through = torch.bmm(torch.cat([w, w * a], dim=1), shared)  # rows (W 1)^T A and (W a)^T A
    w_through, a_through = through.chunk(2, dim=1)
    product = _dot(torch.bmm(squares, shared.square()), squares)  # |W A W|^2
    crossed = _dot(w_through, w * e) + _dot(a_through, w * h)
    ones_e, ones_a, ones_h = e.sum(dim=-1), a.sum(dim=-1), h.sum(dim=-1)
    low_rank = (
        2 * (w.shape[-1] * _dot(e, e) + ones_e.square() + _dot(a, a) * _dot(h, h) + _dot(a, h).square())
        + 4 * (_dot(e, h) * ones_a + _dot(e, a) * ones_h)
    )  # fmt: skip
    return product + 4 * crossed + low_rank


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(dim=-1)
