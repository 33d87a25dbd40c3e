"""evaluation_summary: the records of one run and group as the numbers of one table row (`RunSummary`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distributed_sparse.tools.common.results import Record
from distributed_sparse.tools.evaluation.intervals import NO_INTERVAL, Interval, interval, units_of
from distributed_sparse.tools.evaluation.methods import Settings, label, settings_key
from distributed_sparse.tools.evaluation.suite import Suite

NAN = math.nan
DENSE: Settings = {"method": "dense"}
NOISE = 0.05
"""If dense attention's own relative error exceeds this, the output is rounding noise; bfloat16's error is below .01."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval (`intervals.interval`)."""

    mean: float = NAN
    interval: Interval = NO_INTERVAL


UNKNOWN = Estimate()


@dataclass(frozen=True)
class RunSummary:
    """One run of one group; nan means not measured.

    Attributes:
        num_examples, num_tokens: examples, and their judged or generated tokens.
        score: mean over the tasks of each task's mean.
        change: the same of the differences from the dense run's score, paired by position or example.
        task_scores: by task, if examples have one.
        depth_scores: by depth, if examples have one.
        density: tokens attended over tokens in context, mean over the layers that select.
        layer_density: float64 [layers, kv_heads].
        attended: mean tokens per (step, layer, KV head) row of the layers that select.
        sparse_share: share of those layers' rows that read less than their context.
        dense_shares: shares of all layers' rows: "sparse", and those that read the whole context because the layer is dense
            ("layers"), the context is below min_context ("short"), or the budget covers it or all was selected ("whole").
        held_kv, held_metadata: bytes that the longest example's sequence holds, over all ranks.
        read_per_step: bytes that a decode step of one sequence reads, over all ranks.
        read_share: `read_per_step` over the dense run's.
        error, error_p90, mass, mass_p10: relative L2 error and captured softmax mass per query head in the layers that select.
        kl, top1: compared with the dense run at `compared` positions: nats, and share of equal most likely tokens.
    """

    settings: Settings
    run: str
    num_examples: int = 0
    num_tokens: int = 0
    score: Estimate = UNKNOWN
    change: Estimate = UNKNOWN
    task_scores: dict[str, Estimate] = field(default_factory=dict)
    depth_scores: dict[float, Estimate] = field(default_factory=dict)
    density: float = NAN
    layer_density: np.ndarray | None = None
    attended: float = NAN
    sparse_share: float = NAN
    dense_shares: dict[str, float] = field(default_factory=dict)
    held_kv: float = NAN
    held_metadata: float = NAN
    read_per_step: float = NAN
    read_share: float = NAN
    error: float = NAN
    error_p90: float = NAN
    mass: float = NAN
    mass_p10: float = NAN
    layer_mass: np.ndarray | None = None
    kl: Estimate = UNKNOWN
    top1: Estimate = UNKNOWN
    compared: int = 0
    question_tokens: int = 0

    @property
    def label(self) -> str:
        return label(self.settings)


def of_run(records: Iterable[Record], kind: str, run: str, group: str) -> list[Record]:
    """The records of one kind ("answers", "trace") of a run and group."""
    return [r for r in records if (r["kind"], r["run"], r["group"]) == (kind, run, group)]


def attended_of(records: Iterable[Record], run: str, group: str) -> float | None:
    """Mean tokens per row that a run attended in the layers that select; None if it read everything, or has no records."""
    units = of_run(records, "answers", run, group)
    if not units:
        return None
    attended, rows, context = _attention(units)
    return attended / rows if attended < context else None


def _attention(units: Sequence[Record]) -> tuple[int, int, int]:
    """Tokens attended, rows, and tokens in context, over the layers that select."""
    attended = rows = context = 0
    for unit in units:
        counters, layers = unit["counters"], unit["selecting_layers"]
        of_layers = np.array(counters["attended"])[layers]
        attended += int(of_layers.sum())
        rows += counters["steps"] * of_layers.size
        context += counters["context"] * of_layers.size
    return attended, rows, context


def summarise_run(records: Sequence[Record], run: str, group: str) -> RunSummary | None:
    """Summarise one run and group; None if it has no records."""
    answers, traces = (of_run(records, kind, run, group) for kind in ("answers", "trace"))
    if not answers and not traces:
        return None
    settings = (answers or traces)[0]["settings"]
    dense_answers, dense_traces = (of_run(records, kind, settings_key(DENSE), group) for kind in ("answers", "trace"))
    return RunSummary(settings, run, **_answers(answers, dense_answers), **_traces(traces, dense_traces))


def dense_failures(suite: Suite, records: Sequence[Record], groups: Iterable[str]) -> list[str]:
    """A warning for each group and task in which dense attention itself scores too low to compare methods."""
    found = []
    for group in groups:
        rows = [row for unit in of_run(records, "answers", settings_key(DENSE), group) for row in unit["examples"]]
        for task, own in _by(rows, "task").items():
            score, needed = (float(np.mean(floats([of(row) for row in own]))) for of in (_score, lambda row: row.get("needed")))
            if score < needed if suite.higher_is_better else score > needed:
                score, needed = (math.exp(value) if suite.is_log else value for value in (score, needed))
                found.append(
                    f"{suite.name}, {group}{f', {task}' if task else ''}: dense attention itself has {suite.score_label} "
                    f"{score:.3g} over {len(own)} examples, {'below' if suite.higher_is_better else 'above'} {needed:.3g}: no "
                    "method can be judged by it here. Use an easier task, shorter lengths, a better model, or --chat."
                )
    return found


def _score(row: Record) -> float | None:
    return row["scores"]["score"]


def _answers(units: Sequence[Record], dense: Sequence[Record]) -> dict[str, Any]:
    if not units:
        return {}
    examples = [example for unit in units for example in unit["examples"]]
    attended, rows, context = _attention(units)
    counters = [unit["counters"] for unit in units]
    total_context, steps, read, sparse = (
        sum(c[n] for c in counters) for n in ("context", "steps", "bytes_read", "rows_sparse")
    )
    read_by_dense, dense_steps = (sum(unit["counters"][name] for unit in dense) for name in ("bytes_read", "steps"))
    every = steps * np.array(counters[0]["attended"]).size
    short = sum(unit.get("short_rows", 0) for unit in units)
    block, best = units[0].get("block", 0), units[0].get("best")
    of_dense = {row["id"]: np.array(_values(row)) for unit in dense for row in unit["examples"]}
    changes = {row["id"]: (_values(row) - of_dense.get(row["id"], np.array(NAN))).tolist() for row in examples}
    pages, of_page = max(example["pages"] for example in examples), units[0]["page_bytes"]
    by_task, by_depth = _by(examples, "task"), _by(examples, "depth")
    return {
        "num_examples": len(examples),
        "num_tokens": sum(row.get("num_output_tokens") or len(row.get("values", row["kl"])) for row in examples),
        "score": _estimate(by_task.values(), _values, block, best),
        "change": _estimate(by_task.values(), lambda row: changes[row["id"]], block, None),
        "task_scores": {task: _estimate([own], _values, block, best) for task, own in by_task.items() if task is not None},
        "depth_scores": {d: _estimate([own], _values, block, best) for d, own in by_depth.items() if d is not None},
        "density": attended / context,
        "layer_density": sum(np.array(c["attended"], dtype=np.float64) for c in counters) / total_context,
        "attended": attended / rows,
        "sparse_share": sparse / rows,
        "dense_shares": {
            "layers": 1 - rows / every,
            "short": short / every,
            "whole": (rows - short - sparse) / every,
            "sparse": sparse / every,
        },
        "held_kv": pages * of_page["kv"],
        "held_metadata": pages * of_page["metadata"],
        "read_per_step": read / steps,
        "read_share": read / steps / (read_by_dense / dense_steps) if dense_steps else NAN,
        "kl": _estimate(by_task.values(), lambda row: [math.inf if v is None else v for v in row["kl"]], block, None),
        "top1": _estimate(by_task.values(), lambda row: row["top1"], block, 1.0),
        "compared": sum(len(example["kl"]) for example in examples),
        "question_tokens": max(example["num_question_tokens"] for example in examples),
    }


def _values(row: Record) -> list[float]:
    """The example's `Suite.values`; records of earlier versions have the score alone."""
    return [NAN if value is None else value for value in row.get("values", [_score(row)])]


def _by(examples: Sequence[Record], name: str) -> dict[Any, list[Record]]:
    found: dict[Any, list[Record]] = {}
    for example in examples:
        found.setdefault(example[name], []).append(example)
    return found


def _estimate(
    strata: Iterable[Sequence[Record]], values: Callable[[Record], Sequence[float]], block: int, best: float | None
) -> Estimate:
    """The mean over strata of each stratum's mean, with its interval."""
    units = [[unit for row in rows for unit in units_of(values(row), block)] for rows in strata]
    arrays = [np.concatenate(of_stratum) for of_stratum in units]
    means = [float(array.mean()) for array in arrays if array.size]
    return Estimate(float(np.mean(means)), interval(units, best)) if means else UNKNOWN


def _traces(units: Sequence[Record], dense: Sequence[Record]) -> dict[str, Any]:
    if not units:
        return {}
    mass = np.concatenate([floats(unit["trace"]["captured_mass"]) for unit in units])  # [steps, L, H_q]
    layers = units[0]["selecting_layers"]
    error = np.concatenate([errors(unit, dense)[:, layers].ravel() for unit in units])
    error = error[np.isfinite(error)]
    return {
        "error": float(error.mean()) if error.size else NAN,
        "error_p90": float(np.quantile(error, 0.9)) if error.size else NAN,
        "mass": float(mass[:, layers].mean()),
        "mass_p10": float(np.quantile(mass[:, layers], 0.1)),
        "layer_mass": mass.mean((0, 2)),
    }


def errors(unit: Record, dense: Sequence[Record]) -> np.ndarray:
    """A trace's relative errors [steps, L, H_q]; nan for heads without a meaningful one.

    A head whose output is 0 up to rounding (it attends to a token whose value is 0) has no relative error: even the dense run's
    own error exceeds `NOISE` there.

    Args:
        dense: the dense run's traces, including that of the same example.
    """
    error = floats(unit["trace"]["relative_error"])
    for other in dense:
        if other["example"] == unit["example"]:
            own = floats(other["trace"]["relative_error"])
            error = np.where(np.isfinite(own) & (own <= NOISE), error, NAN)
    return error


def floats(values: Any) -> np.ndarray:
    """Nested lists as a float64 array; None becomes nan."""
    return np.array(values, dtype=np.float64)
