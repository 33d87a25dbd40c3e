"""trace_summary: a request's traced steps as one record of arrays by step, layer and head."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from distributed_sparse.trace import LayerTrace, TraceStep


def chosen_steps(num_steps: int, wanted: int) -> list[int]:
    """Indices of `wanted` of `num_steps` decode steps, evenly spread, including the last."""
    if wanted >= num_steps:
        return list(range(num_steps))
    return sorted({round((i + 1) * num_steps / wanted) - 1 for i in range(wanted)})


def summarise(steps: Sequence[TraceStep], page_size: int) -> dict[str, Any]:
    """Convert traced steps to arrays.

    Returns:
        positions [S]; captured_mass, relative_error, entropy [S, L, H_q]; tokens_for_mass [S, L, H_q, 4];
        attended [S, L, H_kv]; overlap: {"tokens", "pages"}, each {"jaccard", "kept"}: [L, H_kv], means over pairs of
        consecutive steps (empty lists if there are none).
    """

    def stacked(name: str) -> np.ndarray:
        return np.array([[getattr(layer, name) for layer in step.layers] for step in steps])

    return {
        "positions": [step.position for step in steps],
        **{name: stacked(name) for name in ("captured_mass", "relative_error", "entropy", "tokens_for_mass")},
        "attended": stacked("num_attended"),
        "overlap": _overlap(steps, page_size),
    }


def _overlap(steps: Sequence[TraceStep], page_size: int) -> dict[str, Any]:
    pairs = [(one, two) for one, two in itertools.pairwise(steps) if two.position == one.position + 1]
    found: dict[str, Any] = {"tokens": {"jaccard": [], "kept": []}, "pages": {"jaccard": [], "kept": []}}
    if not pairs:
        return found
    for kind, size in (("tokens", 1), ("pages", page_size)):
        each = np.array([[_of_layer(a, b, size) for a, b in zip(one.layers, two.layers)] for one, two in pairs])
        found[kind] = {"jaccard": each[..., 0].mean(0), "kept": each[..., 1].mean(0)}  # [pairs, L, H_kv, 2]
    return found


def _of_layer(one: LayerTrace, two: LayerTrace, size: int) -> list[tuple[float, float]]:
    """Per KV head: |both| / |either|, and the share of the later step's reads that the earlier step had read too."""
    found = []
    for before, after in zip(one.indices, two.indices):
        earlier, later = np.unique(before // size), np.unique(after // size)
        both = len(np.intersect1d(earlier, later, assume_unique=True))
        found.append((both / (len(earlier) + len(later) - both), both / len(later)))
    return found
