"""Eager methods: each sparse method from its definition, in float64 on the keys of one sequence; nothing of the engine is used.

What is taken over as it is documented: Philox, the layout of hash weights, and the draw of vAttention's sample (its reference
in plain ints, `kernels/reference.py`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from distributed_sparse.kernels.philox import philox
from distributed_sparse.kernels.reference import sample_residual_reference
from tests.support.eager_selectors import (
    EagerSelector,
    HashScores,
    Margins,
    OracleScores,
    QuestScores,
    best,
    page_scores,
    tokens_of,
)


@dataclass
class EagerMethod(ABC):
    """Settings that all share. `seed` is the request's, which is the sample of index 0.

    `margins` say how clear the decisions were, `counts` how many tokens each row read: (layer, KV head, n) -> tokens.
    """

    page_size: int = 16
    dense_layers: int = 2
    min_context: int = 0
    sink_pages: int = 1
    recent_pages: int = 2
    seed: int = 0
    first_kv_head: int = 0
    margins: Margins = field(default_factory=Margins)
    counts: dict[tuple[int, int, int], int] = field(default_factory=dict)

    def log_weights(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [H_q, d], key and value [H_kv, n, d] -> float64 [H_q, n]."""
        kv_heads, n, _ = key.shape
        weights = torch.full((kv_heads, n), float("-inf"), dtype=torch.float64)
        for head, (queries, keys, values) in enumerate(zip(query.chunk(kv_heads), key, value)):
            chosen = None
            if layer >= self.dense_layers and n >= self.min_context:
                chosen = self.weigh(layer, head + self.first_kv_head, queries.double(), keys.double(), values.double())
            weights[head] = 0.0 if chosen is None else chosen
            self.counts[layer, head, n] = int(weights[head].isfinite().sum())
        return weights.repeat_interleave(query.shape[0] // kv_heads, 0)

    @abstractmethod
    def weigh(self, layer: int, head: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor | None:
        """One row: queries [G, d], keys and values [n, d] -> what is added to the logits, [n]; None: dense."""

    def seen(self, tokens: list[int], n: int) -> Tensor:
        """Weight 1 for these tokens."""
        weights = torch.full((n,), float("-inf"), dtype=torch.float64)
        weights[tokens] = 0.0
        return weights

    def make_selector(self, name: str, hash_weights: str | None) -> EagerSelector:
        if name == "hash":
            assert hash_weights is not None
            return HashScores(hash_weights, self.margins)
        return QuestScores(self.margins, self.page_size) if name == "quest" else OracleScores(self.margins)


@dataclass
class EagerTopK(EagerMethod):
    """quest, hash and oracle_topk alone: the best pages, or as many of the best tokens as fill them."""

    selector: str = "quest"
    token_budget: int = 2048
    hash_weights: str | None = None

    def __post_init__(self) -> None:
        self.select = self.make_selector(self.selector, self.hash_weights)

    def weigh(self, layer: int, head: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor | None:
        n, budget = len(keys), math.ceil(self.token_budget / self.page_size)
        if math.ceil(n / self.page_size) <= budget:
            return None
        scores = self.select.scores(layer, head, queries, keys)
        if self.select.per_token:
            sinks, recent = self.sink_pages * self.page_size, self.recent_pages * self.page_size
            return self.seen(best(scores, budget * self.page_size, sinks, recent, self.select), n)
        pages = best(scores, budget, self.sink_pages, self.recent_pages, self.select)
        return self.seen(tokens_of(pages, self.page_size, n), n)


@dataclass
class EagerRandom(EagerMethod):
    """The pages of the largest Philox words: key (seed), counter (page, sample, position, 2 | layer << 8 | head << 20)."""

    token_budget: int = 2048

    def weigh(self, layer: int, head: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor | None:
        n, budget = len(keys), math.ceil(self.token_budget / self.page_size)
        num_pages = math.ceil(n / self.page_size)
        if num_pages <= budget:
            return None
        key, use = (self.seed % 2**32, self.seed >> 32), 2 | layer << 8 | head << 20
        words = [int(philox(key, (page, 0, n - 1, use))[0]) >> 9 for page in range(num_pages)]
        pages = best(torch.tensor(words, dtype=torch.float64), budget, self.sink_pages, self.recent_pages)
        return self.seen(tokens_of(pages, self.page_size, n), n)


@dataclass
class EagerTova(EagerMethod):
    """The newest query's weights over what is left decide what falls, for ever; it reads the rest. One token after another."""

    token_budget: int = 2048
    fallen: dict[tuple[int, int], set[int]] = field(default_factory=dict)
    """(layer, KV head) -> positions."""

    def weigh(self, layer: int, head: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor | None:
        n, fallen = len(keys), self.fallen.setdefault((layer, head), set())
        left = [i for i in range(n) if i not in fallen]
        if len(left) <= self.token_budget:
            return self.seen(left, n)
        weights = (queries @ keys[left].T / keys.shape[1] ** 0.5).softmax(-1).mean(0)
        weights[-1] = torch.inf  # the query's own token
        weight_of = dict(zip(left, weights.tolist()))
        order = sorted(left, key=lambda i: (-weight_of[i], -i))  # of equal weights the older token falls
        kept, falls = order[: self.token_budget], order[self.token_budget :]
        if len(kept) > 1:
            self.margins.see("weight", 1 - weight_of[falls[0]] / weight_of[kept[-1]])
        fallen.update(falls)
        return self.seen(kept, n)


@dataclass
class EagerTwilight(EagerMethod):
    """Candidates; logits estimated from quantised keys; exact top-p per query head by sorting; the union."""

    p: float = 0.95
    selector: str = "quest"
    candidate_fraction: float = 0.25
    min_candidates: int = 1024
    key_bits: int = 4
    key_offset: Tensor | None = None  # [layers, H_kv, d]
    hash_weights: str | None = None

    def __post_init__(self) -> None:
        self.select = None if self.selector == "full" else self.make_selector(self.selector, self.hash_weights)

    def candidates(self, layer: int, head: int, queries: Tensor, keys: Tensor) -> list[int]:
        """Positions that the selector offers."""
        n = len(keys)
        if self.select is None:
            return list(range(n))
        count = max(
            math.ceil(self.candidate_fraction * n / self.page_size),
            math.ceil(self.min_candidates / self.page_size),
            self.sink_pages + self.recent_pages,
        )
        if count >= math.ceil(n / self.page_size):
            return list(range(n))
        scores = page_scores(self.select, self.select.scores(layer, head, queries, keys), self.page_size)
        return tokens_of(best(scores, count, self.sink_pages, self.recent_pages, self.select), self.page_size, n)

    def decoded(self, keys: Tensor) -> Tensor:
        """What is left of keys [m, d] that were quantised: scale and minimum are rounded to fp16 first.

        Codes are those of the named float32 operations: equal keys have equal codes.
        """
        levels, x = 2**self.key_bits - 1, keys.float()
        minimum = x.amin(-1, keepdim=True).half().float()
        scale = ((x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / levels).half().float()
        exact = (x - minimum) / scale + 0.5
        border = (exact - exact.round()).abs()[(exact > 0.25) & (exact < levels + 0.75)]
        self.margins.see("code", float(border.min()))
        return exact.floor().clamp(0, levels).double() * scale.double() + minimum.double()

    def top_p(self, logits: Tensor) -> Tensor:
        """bool [m]: the smallest {logit >= t} of mass >= p."""
        if self.p >= 1:
            return torch.ones(len(logits), dtype=torch.bool)
        mass = logits.softmax(0)
        order = logits.argsort(descending=True)
        cumulative = mass[order].cumsum(0)
        last = int((cumulative < self.p).sum())
        self.margins.see("mass", float((cumulative - self.p).abs().min()))
        if last + 1 < len(order):
            self.margins.see("threshold", float(logits[order[last]] - logits[order[last + 1]]))
        return logits >= logits[order[last]]

    def weigh(self, layer: int, head: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor | None:
        n = len(keys)
        candidates = self.candidates(layer, head, queries, keys)
        offset = 0.0 if self.key_offset is None else self.key_offset[layer, head]
        estimates = queries @ self.decoded(keys[candidates].float() - offset).T / keys.shape[1] ** 0.5  # [G, m]
        kept = torch.zeros(n, dtype=torch.bool)
        for estimate in estimates:
            kept[candidates] |= self.top_p(estimate)
        pages = math.ceil(n / self.page_size)
        forced = [*range(min(self.sink_pages, pages)), *range(max(pages - self.recent_pages, 0), pages)]
        kept[tokens_of(forced, self.page_size, n)] = True
        return self.seen(kept.nonzero()[:, 0].tolist(), n)


@dataclass
class EagerVAttention(EagerMethod):
    """Sinks, window and top-k with weight 1; a pilot; explicit r_i and their covariance; the size; the sample with n_s / b."""

    epsilon: float = 0.1
    delta: float = 0.1
    guarantee: str = "output"
    selector: str = "quest"
    top_k_fraction: float = 0.05
    sink_tokens: int = 128
    window_tokens: int = 128
    base_fraction: float = 0.02
    max_sample: int | None = None
    hash_weights: str | None = None
    budgets: dict[tuple[int, int, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.select = self.make_selector(self.selector, self.hash_weights)

    def choose(self, layer: int, head: int, queries: Tensor, keys: Tensor) -> tuple[list[int], int]:
        """The blocks of the chosen part and their size; a window in pages has one page more, as the newest may be partial."""
        n, size = len(keys), self.page_size
        block = 1 if self.select.per_token else size
        sinks = math.ceil(max(self.sink_tokens, self.sink_pages * size) / block)
        if block == 1:
            recent = max(self.window_tokens, self.recent_pages * size)
        else:
            recent = max(math.ceil(self.window_tokens / size) + 1, self.recent_pages)
        count = sinks + recent + math.ceil(n * self.top_k_fraction / block)
        return best(self.select.scores(layer, head, queries, keys), count, sinks, recent, self.select), block

    def draw(self, chosen: list[int], block: int, count: int, n: int, layer: int, head: int, kind: int) -> list[int]:
        """Positions; with an identity page table a slot is a position."""
        pages = math.ceil(n / self.page_size)
        random_key = torch.tensor([[self.seed % 2**32], [self.seed >> 32], [0], [n - 1]])
        drawn = sample_residual_reference(
            torch.tensor([[chosen]], dtype=torch.int32),
            torch.tensor([[len(chosen)]]),
            torch.arange(pages)[None],
            torch.tensor([n]),
            torch.tensor([[count]]),
            random_key,
            block_tokens=block,
            page_size=self.page_size,
            layer=layer,
            first_kv_head=head,
            draw=kind,
        )
        return drawn[0][0]

    def weigh(self, layer: int, head: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor | None:
        n = len(keys)
        blocks, block = self.choose(layer, head, queries, keys)
        chosen = blocks if block == 1 else tokens_of(blocks, block, n)
        n_s = n - len(chosen)
        if n_s < 512:
            return None
        m = min(max(math.ceil(n_s * self.base_fraction), 256), n_s)
        pilot = self.draw(blocks, block, m, n, layer, head, kind=1)
        needed = []
        for query in queries:
            weights = (keys @ query / len(query) ** 0.5).exp()
            needed.append(self.size(weights, values, chosen, pilot, n_s))
        size = max(needed)
        b = n_s
        if math.isfinite(size):
            b = min(64 * math.ceil(max(size, m) / 64), n_s)
            if size > m:
                self.margins.see("sample_size", min(size / 64 % 1, 1 - size / 64 % 1) / size)
        if 2 * (len(chosen) + b) > n or (self.max_sample is not None and b > self.max_sample):
            return None
        self.budgets[layer, head, n] = b
        weights = self.seen(chosen, n)
        weights[self.draw(blocks, block, b, n, layer, head, kind=0)] = math.log(n_s / b)
        return weights

    def size(self, weights: Tensor, values: Tensor, chosen: list[int], pilot: list[int], n_s: int) -> float:
        """b of one query head before it is rounded. weights [n] e^s, values [n, d]."""
        m, d = len(pilot), values.shape[1]
        w, v = weights[pilot], values[pilot]
        denominator = weights[chosen].sum() + n_s / m * w.sum()
        numerator = weights[chosen] @ values[chosen] + n_s / m * (w @ v)
        epsilon, delta = self.epsilon, self.delta
        if self.guarantee == "denominator":
            return self.finite(self.for_denominator(w, float(denominator), n_s, epsilon, delta), n_s)
        output = numerator / denominator
        centred = self.guarantee == "output"
        r = w[:, None] * (v - output if centred else v)
        off = r - r.mean(0)
        covariance = off.T @ off / (m - 1)
        trace = float(covariance.trace())
        some = off[:128]
        second = some.T @ some / len(some)
        of_square = max(float((second @ second).trace()) - trace**2 / len(some), trace**2 / d)
        # One unit: the output's for `output`, the numerator's for the lemma.
        unit = float(denominator) if centred else 1.0
        noise = (n_s / unit) ** 2 / m * (1 - m / n_s)
        norm_sq = float((numerator / unit).square().sum())
        known = norm_sq - noise * (trace + quantile(0.99) * math.sqrt(2 * of_square))
        self.margins.see("norm", abs(known) / norm_sq)
        if known <= 0:
            return math.inf
        spread = (n_s / unit) ** 2 * raised(off.square().sum(1), trace, m)
        if centred:
            nu = max(trace**2 / of_square, 1.0)  # as of any covariance; estimates, from other draws, may not be
            c_sq = (1 - 2 / (9 * nu) + quantile(1 - delta) * math.sqrt(2 / (9 * nu))) ** 3
            return self.finite(c_sq * spread / (epsilon**2 * known), n_s)
        of_numerator = quantile(1 - delta / 4) ** 2 * spread / ((epsilon / 4) ** 2 * known)
        of_denominator = self.for_denominator(w, float(denominator), n_s, epsilon / 4, delta / 2)
        return self.finite(max(of_numerator, of_denominator), n_s)

    def for_denominator(self, w: Tensor, denominator: float, n_s: int, epsilon: float, delta: float) -> float:
        variance = raised((w - w.mean()).square(), float(w.var()), len(w))
        return (quantile(1 - delta / 2) * n_s / (epsilon * denominator)) ** 2 * variance

    @staticmethod
    def finite(b0: float, n_s: int) -> float:
        """Drawn without replacement."""
        return b0 / (1 + b0 / n_s)


def quantile(probability: float) -> float:
    return NormalDist().inv_cdf(probability)


@dataclass
class EagerSketch(EagerMethod):
    """Tokens by their probability, as the mean key of a page and signs and magnitude of the rest tell it; no tail."""

    tau: float = 1.6
    min_tokens: int = 128
    tail: bool = False

    def weigh(self, layer: int, head: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor | None:
        assert not self.tail, "what is not attended has no weight here"
        n, scored = len(keys), len(keys) // self.page_size * self.page_size
        if scored == 0:
            return None
        estimates = torch.cat([self.estimate(queries, page) for page in keys[:scored].split(self.page_size)], dim=1)
        p = (estimates / keys.shape[1] ** 0.5).softmax(1).mean(0)
        kept = p > self.tau / n
        self.margins.see("probability", float((p * n / self.tau - 1).abs().min()))
        if scored > self.min_tokens:
            best_first = p.sort(descending=True)
            kept[best_first.indices[: self.min_tokens]] = True
            last, next_one = best_first.values[self.min_tokens - 1 : self.min_tokens + 1].tolist()
            self.margins.see("probability", 1 - next_one / last)
        else:
            kept[:] = True
        pages = math.ceil(n / self.page_size)
        forced = [*range(self.sink_pages), *range(max(pages - self.recent_pages, 0), pages)]
        likely = kept.nonzero()[:, 0].tolist()
        return self.seen(sorted({*likely, *range(scored, n), *tokens_of(forced, self.page_size, n)}), n)

    def estimate(self, queries: Tensor, keys: Tensor) -> Tensor:
        """q.k of one page: queries [G, d], keys [S, d] -> [G, S]."""
        dim = keys.shape[1]
        matrix = hadamard(dim)
        mean = self.rounded(keys.mean(0), 4)
        rest = (keys - mean) @ matrix
        self.margins.see("sign", float(rest.abs().min()))
        magnitudes = self.rounded(rest.abs().mean(1), 4)
        return queries @ mean[:, None] + queries @ matrix @ rest.sign().T * magnitudes

    def rounded(self, x: Tensor, bits: int) -> Tensor:
        """x [n] in so many bits, of a scale and minimum that are rounded to fp16 first."""
        levels = 2**bits - 1
        minimum = x.min().float().half().double()
        scale = ((x.max() - x.min()).float() / levels).half().double()
        exact = (x - minimum) / scale + 0.5
        border = (exact - exact.round()).abs()[(exact > 0.25) & (exact < levels + 0.75)]
        self.margins.see("code", float(border.min()))
        return exact.floor().clamp(0, levels) * scale + minimum


def hadamard(dim: int) -> Tensor:
    """The normalised Hadamard matrix, float64 [d, d], by its recursion; d a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < dim:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix / dim**0.5


def raised(squares: Tensor, variance: float, m: int) -> float:
    """A variance from m draws, raised to about its 99% bound by the kurtosis; squares of what is centred, [m]."""
    kurtosis = float(squares.square().mean() / squares.mean() ** 2)
    return variance * (1 + quantile(0.99) * math.sqrt(max(kurtosis - 1, 0.0) / m))


def eager_method(sparse: dict[str, Any], seed: int = 0, **where: Any) -> EagerMethod:
    """The emulation of a `sparse:` section."""
    settings = {key: value for key, value in sparse.items() if key != "method"} | {"seed": seed, **where}
    match sparse["method"]:
        case "quest" | "hash" | "oracle_topk" as method:
            return EagerTopK(selector=method.removesuffix("_topk"), **settings)
        case "random":
            return EagerRandom(**settings)
        case "tova":
            return EagerTova(**settings)
        case "sketch":
            return EagerSketch(**settings)
        case "twilight":
            return EagerTwilight(**settings)
        case "vattention":
            return EagerVAttention(**settings)
    raise AssertionError(sparse)
