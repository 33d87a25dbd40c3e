"""The tests' one list of methods. A method that is added here runs in every generic test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MethodCase:
    """How the generic tests run a method.

    Attributes:
        settings: its part of the `sparse:` section; layer 0 is dense unless a test says otherwise.
        covered: tokens of a context that these settings read whole: bitwise dense.
        sparse_at: tokens of a context in which rows are sparse.
        captured: its steps may be captured as CUDA graphs.
        budget: it has a `token_budget`.
    """

    settings: dict[str, Any]
    covered: int = 48
    sparse_at: int = 151
    captured: bool = True
    budget: bool = False


_BUDGET = {"token_budget": 48, "recent_pages": 1}

METHODS: dict[str, MethodCase] = {
    "quest": MethodCase(_BUDGET, budget=True),
    "sketch": MethodCase({"min_tokens": 40, "tau": 1.2}, covered=40, captured=False),
    "twilight": MethodCase({"p": 0.7, "candidate_fraction": 0.5, "min_candidates": 48}, covered=32),
    "vattention": MethodCase(
        {"epsilon": 0.5, "delta": 0.5, "sink_tokens": 16, "window_tokens": 16, "guarantee": "denominator"},
        covered=500,  # too short to be sampled
        sparse_at=1000,
    ),
    "hash": MethodCase(_BUDGET, budget=True),
    "window": MethodCase(_BUDGET, budget=True),
    "tova": MethodCase({"token_budget": 48}, captured=False),
    "random": MethodCase(_BUDGET, budget=True),
    "oracle_topk": MethodCase(_BUDGET, captured=False, budget=True),
    "tests.support.outside_policy:EveryOtherPolicy": MethodCase({"stride": 3}, covered=16, captured=False),
}
"""Every method but `dense`, and one that is no part of the engine."""


def sparse_settings(method: str, hash_weights: str | None = None, **changes: Any) -> dict[str, Any] | None:
    """The `sparse:` section of a method in `METHODS`, with changes; None for "dense".

    Args:
        hash_weights: a file of `random_hash_weights`, for the settings that read one.
    """
    if method == "dense":
        return None
    settings = {"method": method, "dense_layers": 1, **METHODS[method].settings, **changes}
    if "hash" in (method, settings.get("selector")):
        settings["hash_weights"] = hash_weights
    return settings
