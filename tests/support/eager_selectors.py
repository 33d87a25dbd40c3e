"""Eager selectors: what quest, hash and oracle think of every page or token of one KV head, in float64, from q and k alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor


@dataclass
class Margins:
    """How clearly an emulation decided, by kind of decision: the smallest distance from deciding otherwise.

    float32 sums in another order move what is compared by about 1e-6. An emulation that decided everything by far more than
    that must be followed by the engine on any machine.
    """

    least: dict[str, float] = field(default_factory=dict)

    def see(self, kind: str, distance: float) -> None:
        self.least[kind] = min(distance, self.least.get(kind, float("inf")))

    def assert_clear(self, **limits: float) -> None:
        """Every decision was clearer than its kind's limit; kinds without one need 1e-4."""
        for kind, distance in self.least.items():
            assert distance > limits.get(kind, 1e-4), f"{kind} is decided by {distance:.1e} alone: choose another seed"


class EagerSelector(Protocol):
    """Scores of one KV head. `per_token` tells whether single tokens are scored, or pages."""

    per_token: bool

    def scores(self, layer: int, head: int, queries: Tensor, keys: Tensor) -> Tensor:
        """queries [G, d], keys [n, d] of KV head `head` -> float64 [P] or [n]."""
        ...

    def see_margin(self, scores: Tensor, threshold: float, runner_up: float) -> None:
        """Note how clear a choice was whose last score is `threshold`, with `runner_up` the best that is not chosen."""
        ...


@dataclass
class QuestScores:
    """The upper bound of q.k over each page, the largest of the group's."""

    margins: Margins
    page_size: int = 16
    per_token: bool = False

    def scores(self, layer: int, head: int, queries: Tensor, keys: Tensor) -> Tensor:
        bounds = []
        for page in keys.double().split(self.page_size):
            of_channels = torch.maximum(queries.double() * page.amin(0), queries.double() * page.amax(0))
            bounds.append(of_channels.sum(-1).max())
        return torch.stack(bounds)

    def see_margin(self, scores: Tensor, threshold: float, runner_up: float) -> None:
        self.margins.see("bound", (threshold - runner_up) / float(scores.std()))


@dataclass
class OracleScores:
    """The largest softmax probability that a query head of the group gives a token."""

    margins: Margins
    per_token: bool = True

    def scores(self, layer: int, head: int, queries: Tensor, keys: Tensor) -> Tensor:
        logits = queries.double() @ keys.double().T / queries.shape[1] ** 0.5
        return logits.softmax(-1).amax(0)

    def see_margin(self, scores: Tensor, threshold: float, runner_up: float) -> None:
        self.margins.see("probability", (threshold - runner_up) / threshold)


@dataclass
class HashScores:
    """bits - 2 Hamming of a token's signature and the query's, summed over the group, from the networks of a file."""

    path: str
    margins: Margins
    per_token: bool = True

    def __post_init__(self) -> None:
        self.weights = {name: tensor.double() for name, tensor in load_file(self.path).items()}

    def outputs(self, layer: int, side: str, query_head: int, x: Tensor) -> Tensor:
        """[m, d] -> [m, bits]."""
        x = x.double()
        for number in range(3):
            name = f"model.layers.{layer}.hash.{side}.{number}"
            x = x if number == 0 else x * torch.sigmoid(x)
            x = x @ self.weights[f"{name}.weight"][query_head].T + self.weights[f"{name}.bias"][query_head]
        return x

    def scores(self, layer: int, head: int, queries: Tensor, keys: Tensor) -> Tensor:
        group, total, doubt = len(queries), torch.zeros(len(keys), dtype=torch.float64), []
        for i in range(group):
            of_query, of_keys = (
                self.outputs(layer, side, head * group + i, x) for side, x in (("q", queries[i : i + 1]), ("k", keys))
            )
            differing = ((of_query > 0) != (of_keys > 0)).sum(-1)
            total += of_query.shape[1] - 2 * differing
            self.margins.see("signature", float(of_query.abs().min()))
            doubt.append(of_keys.abs().amin(-1))
        self._of_tokens = total, torch.stack(doubt).amin(0)
        return total

    def see_margin(self, scores: Tensor, threshold: float, runner_up: float) -> None:
        """One sign that flips moves a score by 2: it matters only where the score is next to the last chosen one."""
        of_tokens, doubt = self._of_tokens
        self.margins.see("signature", float(doubt[(of_tokens - threshold).abs() <= 2].min()))


def page_scores(selector: EagerSelector, scores: Tensor, page_size: int) -> Tensor:
    """Of scores per token, each page's best."""
    return torch.stack([page.max() for page in scores.split(page_size)]) if selector.per_token else scores


def best(scores: Tensor, count: int, sinks: int, recent: int, selector: EagerSelector | None = None) -> list[int]:
    """`count` indices, ascending: the newest `recent` and the first `sinks`, then the highest scores; ties: the lower one."""
    n = len(scores)
    if count >= n:
        return list(range(n))
    forced = list(dict.fromkeys([*range(n - 1, max(n - recent, 0) - 1, -1), *range(min(sinks, n))]))[:count]
    others = sorted(set(range(n)) - set(forced), key=lambda i: (-float(scores[i]), i))
    taken = count - len(forced)
    if selector is not None and 0 < taken < len(others):
        selector.see_margin(scores, float(scores[others[taken - 1]]), float(scores[others[taken]]))
    return sorted([*forced, *others[:taken]])


def tokens_of(pages: Sequence[int], page_size: int, n: int) -> list[int]:
    """Positions of the tokens of some pages."""
    return [i for page in pages for i in range(page * page_size, min((page + 1) * page_size, n))]
