"""reference: float64 implementations of the ops, written for clarity, for tests and benchmarks to compare with."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from distributed_sparse.kernels.philox import philox
from distributed_sparse.kernels.vattention.residual_statistics import GRAM_ROWS, ResidualStatistics


def append_reference(
    k: Tensor, v: Tensor, pages: Tensor, starts: Tensor, offsets: Tensor, counts: Tensor, k_pages: Tensor, v_pages: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `append`. Returns new (k_pages, v_pages) and each written page's min and max (0 for other pages)."""
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


def count_attended_reference(
    num_pages: Tensor,
    last_page_len: Tensor,
    context_lens: Tensor,
    page_size: int,
    *,
    num_tokens: Tensor | None = None,
    partial_num_pages: Tensor | None = None,
    partial_num_tokens: Tensor | None = None,
    extra_tokens_read: Tensor | None = None,
) -> tuple[list[int], list[int], list[int]]:
    """See `count_attended`: the increments of each counter, [H_kv] each, row by row and page by page."""
    heads = num_pages.shape[1]
    attended, sparse, apart = [0] * heads, [0] * heads, [0] * heads
    for b, context in enumerate(context_lens.tolist()):
        for h in range(heads if context else 0):
            tokens = 0
            for pages in (num_pages, partial_num_pages):
                listed = 0 if pages is None else int(pages[b, h])
                tokens += sum(page_size if page < listed - 1 else int(last_page_len[b]) for page in range(listed))
            tokens += sum(int(listed[b, h]) for listed in (num_tokens, partial_num_tokens) if listed is not None)
            attended[h] += tokens
            sparse[h] += tokens < context
            apart[h] += 0 if extra_tokens_read is None else int(extra_tokens_read[b, h])
    return attended, sparse, apart


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `rms_norm`, without any rounding. float64 [..., D]."""
    wide = x.double()
    return weight.double() * wide / (wide.square().mean(dim=-1, keepdim=True) + eps).sqrt()


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `rotary_append`: channel i + d/2 is the imaginary part of channel i; the rotation is a complex product. float64."""
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
    """See `attend`: one softmax over everything that a row lists. float64 out [B, H_q, d], lse [B, H_q]."""
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
                if partial is not None and partial[1][b, i] > float("-inf"):  # the partial result enters as one token
                    logits = torch.cat([logits, partial[1][b, i, None].double()])
                    parts = torch.cat([values, partial[0][b, i, None].double()])
                if len(logits):
                    out[b, i], lse[b, i] = logits.softmax(0) @ parts, logits.logsumexp(0)
    return out, lse


def combine_reference(
    outs: Tensor, lses: Tensor, num_partials: Tensor, partial: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """See `combine_torch`: a softmax over partial results. float64 out [R, G, d], lse [R, G]."""
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


def sample_residual_reference(
    chosen: Tensor,
    num_chosen: Tensor,
    page_table: Tensor,
    context_lens: Tensor,
    num_samples: Tensor,
    random_key: Tensor,
    *,
    block_tokens: int,
    page_size: int,
    layer: int,
    first_kv_head: int,
    draw: int,
) -> list[list[list[int]]]:
    """See `sample_residual`. The slots drawn, [B][H_kv] lists, with an explicit residual and plain Python ints."""
    batch, heads, _ = chosen.shape
    drawn: list[list[list[int]]] = [[[] for _ in range(heads)] for _ in range(batch)]
    for b in range(batch):
        seed_low, seed_high, sample_index, position = random_key[:, b].tolist()
        for h in range(heads):
            taken = set(chosen[b, h, : int(num_chosen[b, h])].tolist())
            positions = range(int(context_lens[b]))
            residual = [i for i in positions if i // block_tokens not in taken] if taken else positions
            use = 1 | draw << 4 | layer << 8 | (first_kv_head + h) << 20
            counters = ((i, sample_index, position, use) for i in range(2))
            keys = [int(word) for counter in counters for word in philox((seed_low, seed_high), counter)]
            for i in range(int(num_samples[b, h])):
                token = residual[_bijection(i, len(residual), keys)]
                drawn[b][h].append(int(page_table[b, token // page_size]) * page_size + token % page_size)
    return drawn


def _bijection(x: int, size: int, keys: list[int]) -> int:
    """The image of x in [0, size): an alternating Feistel network on a power of two, walked until it is in range."""
    width = max((size - 1).bit_length(), 6)
    high_bits, low_bits = width // 2, width - width // 2
    while True:
        high, low = x >> low_bits, x % 2**low_bits
        high_width, low_width = high_bits, low_bits
        for key in keys:
            high, low = low, high ^ (_lowbias32(low ^ key) % 2**high_width)
            high_width, low_width = low_width, high_width
        x = high << low_bits | low
        if x < size:
            return x


def _lowbias32(y: int) -> int:
    """The 32-bit finaliser "lowbias32" (Chris Wellons)."""
    y = (y ^ y >> 16) * 0x7FEB352D % 2**32
    y = (y ^ y >> 15) * 0x846CA68B % 2**32
    return y ^ y >> 16


def quantise_reference(k: Tensor, bits: int, key_offset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `append`: one key [H_kv, d] at a time, channel by channel. Codes uint8 [N, H_kv, d * bits / 8], scales [N, H_kv, 2].

    Not in float64: codes must be equal bit for bit, so every operation is the IEEE float32 operation that `append` names.
    """
    levels, per_byte = 2**bits - 1, 8 // bits
    tokens, heads, dim = k.shape
    width = dim // per_byte
    codes = torch.zeros(tokens, heads, width, dtype=torch.uint8)
    scales = torch.zeros(tokens, heads, 2, dtype=torch.float16)
    for n in range(tokens):
        for h in range(heads):
            x = k[n, h].float().numpy() + np.float32(0)
            if key_offset is not None:
                x = x - key_offset[h].numpy()
            minimum = np.float16(x.min())
            scale = np.float16((x.max() - x.min()) / np.float32(levels))
            scales[n, h, 0], scales[n, h, 1] = float(scale), float(minimum)
            if scale == 0:
                continue
            code = np.clip(np.floor((x - np.float32(minimum)) / np.float32(scale) + np.float32(0.5)), 0, levels).astype(int)
            for i in range(dim):
                codes[n, h, i % width] |= int(code[i]) << (i // width * bits)
    return codes, scales


def int4_logits_reference(
    q: Tensor,
    key_codes: Tensor,
    key_scales: Tensor,
    pages: Tensor,
    num_pages: Tensor,
    last_page_len: Tensor,
    scale: float,
) -> Tensor:
    """See `int4_logits`: keys are decoded as code * scale + minimum, then multiplied. float64 [B, H_q, P * page_size]."""
    batch, num_q_heads, dim = q.shape
    heads, page_size, width = key_codes.shape[1:]
    group, bits = num_q_heads // heads, 8 * width // dim
    logits = torch.full((batch, num_q_heads, pages.shape[2] * page_size), float("-inf"), dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(int(num_pages[b, h])):
                held = page_size if i < int(num_pages[b, h]) - 1 else int(last_page_len[b])
                packed = key_codes[pages[b, h, i], h, :held]  # [held, width]
                codes = torch.cat([packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)], dim=-1).double()
                key_scale, minimum = key_scales[pages[b, h, i], h, :held].double().split(1, dim=-1)
                of_group = q[b, h * group : (h + 1) * group].double()
                to = slice(i * page_size, i * page_size + held)
                logits[b, h * group : (h + 1) * group, to] = of_group @ (codes * key_scale + minimum).T * scale
    return logits


def top_p_reference(logits: Tensor, p: float) -> Tensor:
    """See `top_p`: which of one query head's logits [n] are kept, by sorting. bool [n]."""
    if p >= 1 or len(logits) == 0:
        return torch.ones(len(logits), dtype=torch.bool)
    best_first = logits.double().sort(descending=True).values
    mass = (best_first - best_first[0]).exp().cumsum(0)
    return logits.double() >= best_first[int((mass < p * mass[-1]).sum())]


def residual_statistics_reference(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    tokens: Tensor,
    num_tokens: Tensor,
    num_residual: Tensor,
    partial: tuple[Tensor, Tensor],
    scale: float,
    *,
    centred: bool,
) -> ResidualStatistics:
    """See `residual_statistics`: every r_i, and the covariance as a matrix. float64 [B, H_q] each; NaN below 2 tokens."""
    batch, num_q_heads, dim = q.shape
    heads, page_size = k_pages.shape[1:3]
    fields = torch.full((len(ResidualStatistics._fields), batch, num_q_heads), float("nan"), dtype=torch.float64)
    for b in range(batch):
        for i in range(num_q_heads):
            h = i // (num_q_heads // heads)
            slots = tokens[b, h, : int(num_tokens[b, h])].long()
            m = len(slots)
            if m < 2:
                continue
            keys, values = (cache[slots // page_size, h, slots % page_size].double() for cache in (k_pages, v_pages))  # [m, d]
            logits, lse = keys @ q[b, i].double() * scale, partial[1][b, i].double()
            common = torch.maximum(lse, logits.max())
            w, ratio = (logits - common).exp(), int(num_residual[b, h]) / m
            denominator, numerator = ratio * w.sum(), ratio * (w[:, None] * values).sum(dim=0)
            if lse > float("-inf"):
                denominator = denominator + (lse - common).exp()
                numerator = numerator + (lse - common).exp() * partial[0][b, i].double()
            r = w[:, None] * (values - numerator / denominator if centred else values)
            off = r - r.mean(dim=0)  # [m, d]
            covariance = off.T @ off / (m - 1)
            trace = covariance.trace()
            some = off[:GRAM_ROWS]
            second_moment = some.T @ some / len(some)
            trace_of_square = (second_moment @ second_moment).trace() - trace.square() / len(some)
            fields[:, b, i] = torch.stack(
                [
                    denominator,
                    numerator.square().sum(),
                    w.var(),
                    _kurtosis((w - w.mean()).square()),
                    trace,
                    torch.maximum(trace_of_square, trace.square() / dim),
                    _kurtosis(off.square().sum(dim=1)),
                ]
            )
    return ResidualStatistics(*fields.unbind(0))


def _kurtosis(squares: Tensor) -> Tensor:
    """E x^4 / (E x^2)^2 of the squares of centred values; 1 where they are all 0."""
    return squares.square().mean() / squares.mean().square() if squares.sum() > 0 else torch.ones((), dtype=squares.dtype)


def signatures_reference(x: Tensor) -> Tensor:
    """See `pack_signs`: word by word, bit by bit, in plain ints."""
    words = []
    for signs in (x.double() > 0).reshape(-1, 32).tolist():
        word = sum(1 << j for j, is_positive in enumerate(signs) if is_positive)
        words.append(word - 2**32 if word >= 2**31 else word)
    return torch.tensor(words, dtype=torch.int32).view(*x.shape[:-1], x.shape[-1] // 32)


def hamming_scores_reference(q_signatures: Tensor, signatures: Tensor, page_table: Tensor, context_lens: Tensor) -> Tensor:
    """See `hamming_scores`: agreeing bits counted in plain ints. int32 [B, H_kv, P * page_size]."""
    _, heads, page_size, group, _ = signatures.shape
    batch, width = page_table.shape
    scores = torch.full((batch, heads, width * page_size), -1, dtype=torch.int32)
    for b in range(batch):
        for h in range(heads):
            query = q_signatures[b, h * group : (h + 1) * group].flatten().tolist()
            for i in range(int(context_lens[b])):
                key = signatures[page_table[b, i // page_size], h, i % page_size].flatten().tolist()
                scores[b, h, i] = sum(32 - ((x ^ y) & 0xFFFFFFFF).bit_count() for x, y in zip(query, key))
    return scores
