"""profile_report: tokens that hold the softmax mass, their overlap from step to step, and errors by entropy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from distributed_sparse.tools.common.results import Record
from distributed_sparse.tools.common.tables import number, small, table
from distributed_sparse.tools.evaluation.evaluation_summary import DENSE, errors, floats, of_run
from distributed_sparse.tools.evaluation.methods import Settings, label, settings_key
from distributed_sparse.trace import MASSES

QUARTERS = 4


@dataclass(frozen=True)
class Needed:
    """Tokens that hold the masses .5, .9, .95 and .99 in the dense run, over steps and query heads.

    Attributes:
        mean, p90, most: float64 [layers, 4].
        heads: float64 [layers, H_q, 4], means over the steps.
        entropy: float64 [layers], nats.
    """

    mean: np.ndarray
    p90: np.ndarray
    most: np.ndarray
    heads: np.ndarray
    entropy: np.ndarray


def tokens_needed(records: Sequence[Record], group: str) -> Needed | None:
    """The numbers of one group; None if the dense run was not traced."""
    traces = [unit["trace"] for unit in of_run(records, "trace", settings_key(DENSE), group)]
    if not traces:
        return None
    needed = np.concatenate([floats(trace["tokens_for_mass"]) for trace in traces])  # [steps, L, H_q, 4]
    entropy = np.concatenate([floats(trace["entropy"]) for trace in traces])
    return Needed(
        needed.mean((0, 2)), np.quantile(needed, 0.9, axis=(0, 2)), needed.max((0, 2)), needed.mean(0), entropy.mean((0, 2))
    )


def profile_sections(methods: Sequence[Settings], records: Sequence[Record]) -> list[str]:
    """The report's sections of all groups."""
    parts = [
        "The last tokens of every text were decoded one by one, and each step's attention was compared with dense attention "
        "over the same cache."
    ]
    for group in dict.fromkeys(record["group"] for record in records):
        traces = of_run(records, "trace", settings_key(DENSE), group)
        steps = sum(len(unit["trace"]["positions"]) for unit in traces)
        parts.append(
            f"## {group}\n\n{len(traces)} texts, {steps} decode steps in all; no intervals: steps of one text are alike."
        )
        needed = tokens_needed(records, group)
        if needed is not None:
            parts.append(_needed_table(needed))
        traced = {label(settings): of_run(records, "trace", settings_key(settings), group) for settings in methods}
        traced = {name: units for name, units in traced.items() if units}
        if traced:
            dense = of_run(records, "trace", settings_key(DENSE), group)
            parts += [_overlap_table(traced), _error_table(traced, dense)]
    return parts


def _needed_table(needed: Needed) -> str:
    head = ["layer", *(f"mass {mass:g}" for mass in MASSES), f"most for {MASSES[-1]:g}", "entropy (nats)"]
    rows = [
        [str(layer), *(number(tokens, 0) for tokens in mean), number(most[-1], 0), number(entropy, 2)]
        for layer, (mean, most, entropy) in enumerate(zip(needed.mean, needed.most, needed.entropy))
    ]
    heads = needed.heads[..., MASSES.index(0.95)]  # [L, H_q]
    by_head = table(
        ["layer", *(f"head {head}" for head in range(heads.shape[1]))],
        [[str(layer), *(number(tokens, 0) for tokens in of_layer)] for layer, of_layer in enumerate(heads)],
    )
    return (
        "Tokens that hold a share of the softmax mass: means over steps and query heads\n\n"
        f"{table(head, rows)}\n\nTokens for a mass of 0.95 by query head\n\n{by_head}"
    )


def _overlap_table(traced: dict[str, list[Record]]) -> str:
    head = ["run", "tokens: Jaccard", "tokens: read before", "pages: Jaccard", "pages: read before"]
    rows = []
    for name, units in traced.items():
        overlaps = [unit["trace"]["overlap"] for unit in units if unit["trace"]["overlap"]["tokens"]["jaccard"]]
        cells = [
            number(float(np.mean([overlap[kind][of] for overlap in overlaps])) if overlaps else math.nan)
            for kind in ("tokens", "pages")
            for of in ("jaccard", "kept")
        ]
        rows.append([name, *cells])
    return "Share of a step's reads that the previous step had read too: means over steps, layers and KV heads\n\n" + table(
        head, rows
    )


def rows_by_entropy(units: Sequence[Record], dense: Sequence[Record]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(entropy, relative error, density) of each (step, layer, query head) with an error (see `errors`), sorted by entropy."""
    entropy = np.concatenate([floats(unit["trace"]["entropy"]).ravel() for unit in units])
    error = np.concatenate([errors(unit, dense).ravel() for unit in units])
    density = np.concatenate([_density(unit["trace"]).ravel() for unit in units])
    kept = np.flatnonzero(np.isfinite(error))
    order = kept[np.argsort(entropy[kept], kind="stable")]
    return entropy[order], error[order], density[order]


def _density(trace: dict[str, Any]) -> np.ndarray:
    """Share of the context that each query head read, [steps, L, H_q]."""
    attended = floats(trace["attended"])
    group_size = floats(trace["entropy"]).shape[2] // attended.shape[2]
    context = np.array(trace["positions"], dtype=np.float64)[:, None, None] + 1
    return np.repeat(attended / context, group_size, axis=2)


def _error_table(traced: dict[str, list[Record]], dense: list[Record]) -> str:
    head = ["run", "density", *(f"error, entropy quarter {i + 1}" for i in range(QUARTERS)), "error, all rows"]
    rows = []
    for name, units in traced.items():
        entropy, error, density = rows_by_entropy(units, dense)
        quarters = [
            f"{small(float(part.mean()))} (H {of_entropy.mean():.2f})" if part.size else "-"
            for part, of_entropy in zip(np.array_split(error, QUARTERS), np.array_split(entropy, QUARTERS))
        ]
        whole = small(float(error.mean())) if error.size else "-"
        rows.append([name, number(float(density.mean()) if density.size else math.nan), *quarters, whole])
    return (
        "Relative L2 error of a head's output by the entropy H (nats, mean of the quarter) of its softmax: if attention is "
        "flat, top-k misses mass that a sample estimates\n\n" + table(head, rows)
    )


def layer_budgets(needed: Needed, page_size: int, dense_layers: int, forced_pages: int) -> list[dict[str, Any]]:
    """`layers:` overrides with the tokens that hold .95 of the mass in 90% of a layer's (step, query head) rows.

    Budgets are whole pages, at least `forced_pages`. The first `dense_layers` layers are left out; neighbouring layers with
    equal budgets share an entry.
    """
    wanted = needed.p90[:, MASSES.index(0.95)]
    budgets = [max(math.ceil(tokens / page_size), forced_pages) * page_size for tokens in wanted]
    found: list[tuple[int, int, int]] = []
    for layer in range(dense_layers, len(budgets)):
        if found and found[-1][2] == budgets[layer]:
            found[-1] = (found[-1][0], layer, budgets[layer])
        else:
            found.append((layer, layer, budgets[layer]))
    return [{"range": f"{a}-{b}" if b > a else str(a), "token_budget": budget} for a, b, budget in found]


def write_layers(path: str | Path, overrides: Sequence[dict[str, Any]], group: str) -> None:
    """Write `layers:` overrides as YAML to insert below `sparse:`."""
    text = yaml.safe_dump({"layers": list(overrides)}, sort_keys=False)
    head = (
        f"# Tokens that hold .95 of the softmax mass in 90% of the rows ({group}), in whole pages: the need of exact top-k.\n"
    )
    Path(path).write_text(head + text, encoding="utf-8")
