"""RunSummary: the units of one run and one group as the numbers of one table row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distributed_sparse.evaluation.methods import Settings, label, settings_key
from distributed_sparse.reporting.results import Record

NAN = math.nan
NOISE = 0.05
"""Relative error of dense attention itself above which an output is rounding noise; bfloat16's is below .01."""


@dataclass(frozen=True)
class RunSummary:
    """One run of one group; nan where a number was not measured.

    Attributes:
        score: mean over the tasks of each task's mean.
        task_scores: by task, where examples have one.
        depth_scores: depth -> mean score, where examples have one.
        density: tokens attended over tokens in context, mean over the layers that select.
        layer_density: float64 [layers, kv_heads].
        attended: mean tokens per row of the layers that select.
        sparse_share: share of those layers' rows that read less than their context.
        held_kv, held_metadata: bytes that the longest example's sequence holds, over all ranks.
        read_per_step: bytes that one sequence's decode step reads, over all ranks.
        error, error_p90, mass, mass_p10: relative L2 error and captured softmax mass per query head in the layers that select.
        kl, top1: against the dense run: nats, and share of equal most likely tokens; `compared` positions.
    """

    settings: Settings
    run: str
    group: str
    num_examples: int = 0
    score: float = NAN
    task_scores: dict[str, float] = field(default_factory=dict)
    depth_scores: dict[float, float] = field(default_factory=dict)
    density: float = NAN
    layer_density: np.ndarray | None = None
    attended: float = NAN
    sparse_share: float = NAN
    held_kv: float = NAN
    held_metadata: float = NAN
    read_per_step: float = NAN
    error: float = NAN
    error_p90: float = NAN
    mass: float = NAN
    mass_p10: float = NAN
    layer_mass: np.ndarray | None = None
    kl: float = NAN
    top1: float = NAN
    compared: int = 0
    question_tokens: int = 0

    @property
    def label(self) -> str:
        return label(self.settings)


def of_run(records: Iterable[Record], kind: str, run: str, group: str) -> list[Record]:
    """The units of one kind of a run's group."""
    return [r for r in records if (r["kind"], r["run"], r["group"]) == (kind, run, group)]


def attended_of(records: Iterable[Record], run: str, group: str) -> float | None:
    """Mean tokens per row that a run attended in the layers that select; None where it was dense, or is not there."""
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
    """The summary of one run and group; None where it has no units."""
    answers, traces = (of_run(records, kind, run, group) for kind in ("answers", "trace"))
    if not answers and not traces:
        return None
    settings = (answers or traces)[0]["settings"]
    dense = of_run(records, "trace", settings_key({"method": "dense"}), group)
    return RunSummary(settings, run, group, **_answers(answers), **_traces(traces, dense))


def _answers(units: Sequence[Record]) -> dict[str, Any]:
    if not units:
        return {}
    examples = [example for unit in units for example in unit["examples"]]
    attended, rows, context = _attention(units)
    counters = [unit["counters"] for unit in units]
    total_context, steps = (sum(c[name] for c in counters) for name in ("context", "steps"))
    by_task = _means((example["task"], example["scores"]["score"]) for example in examples)
    kl = [value for example in examples for value in example["kl"]]
    top1 = [value for example in examples for value in example["top1"]]
    pages, of_page = max(example["pages"] for example in examples), units[0]["page_bytes"]
    return {
        "num_examples": len(examples),
        "score": float(np.mean(list(by_task.values()))),
        "task_scores": {task: score for task, score in by_task.items() if task is not None},
        "depth_scores": _means((e["depth"], e["scores"]["score"]) for e in examples if e["depth"] is not None),
        "density": attended / context,
        "layer_density": sum(np.array(c["attended"], dtype=np.float64) for c in counters) / total_context,
        "attended": attended / rows,
        "sparse_share": sum(c["rows_sparse"] for c in counters) / rows,
        "held_kv": pages * of_page["kv"],
        "held_metadata": pages * of_page["metadata"],
        "read_per_step": sum(c["bytes_read"] for c in counters) / steps,
        "kl": float(np.mean([math.inf if value is None else value for value in kl])) if kl else NAN,
        "top1": float(np.mean(top1)) if top1 else NAN,
        "compared": len(kl),
        "question_tokens": max(example["num_question_tokens"] for example in examples),
    }


def _means(pairs: Iterable[tuple[Any, float | None]]) -> dict[Any, float]:
    values: dict[Any, list[float]] = {}
    for name, value in pairs:
        values.setdefault(name, []).append(NAN if value is None else value)
    return {name: float(np.mean(of_name)) for name, of_name in values.items()}


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
    """A trace's relative errors [steps, L, H_q], nan where there is nothing to be near to.

    A head whose output is 0 but for rounding (its attention rests on a token without a value) has no relative error: there
    even the dense run's own exceeds `NOISE`.

    Args:
        dense: the dense run's traces, among them that of the same example.
    """
    error = floats(unit["trace"]["relative_error"])
    for other in dense:
        if other["example"] == unit["example"]:
            own = floats(other["trace"]["relative_error"])
            error = np.where(np.isfinite(own) & (own <= NOISE), error, NAN)
    return error


def floats(values: Any) -> np.ndarray:
    """Nested lists in which None stands for nan, as float64."""
    return np.array(values, dtype=np.float64)
