"""The report: an evaluation's results as Markdown tables, each method with its controls at equal density."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from distributed_sparse.evaluation.methods import Settings, controls_of, has_budget, settings_key
from distributed_sparse.evaluation.profile_report import profile_sections
from distributed_sparse.evaluation.suite import Suite
from distributed_sparse.evaluation.summary import RunSummary, attended_of, summarise_run
from distributed_sparse.reporting.results import Record
from distributed_sparse.reporting.tables import megabytes, number, small, table

REACHED = 0.95
"""Share of right answers at which a recall budget is enough."""

LEGEND = """\
Every run went through the engine. Prompts were prefilled densely up to the question; the question's tokens (at most
{question}) and the answer's were decoded one by one, so the method read the question too.

- density: tokens attended / tokens in context, in the layers that select; attended: tokens per row (step, layer, KV head)
  there; sparse rows: rows that read less than their context.
- held: KV bytes, and bytes of what the method keeps beside them, of the pages of the longest example's sequence; read: bytes
  of K, V and metadata per decode step of one sequence. Over all ranks and layers, MB = 10^6 bytes.
- error: relative L2 error of a head's attention output against dense over the same cache, mean / 90th percentile; mass:
  softmax mass that was read, mean / 10th percentile. Of traced steps, over the query heads of the layers that select;
  heads whose dense output is zero but for rounding have no error.
- KL: KL(dense || run) of the next-token distribution in nats, at the same tokens in both runs; top-1: how often the most
  likely token is the dense run's.
- Rows that begin with `=` are controls with the token budget that the run above them attended on average.
- `-`: not measured (evicting methods cannot be traced; for KL, log-probabilities of the whole vocabulary must fit into
  memory)."""


def report(configuration: dict[str, Any], suite: Suite, methods: Sequence[Settings], records: Sequence[Record]) -> str:
    """The Markdown text. `methods`: settings of the runs to show, beside dense and their controls."""
    engine, options = configuration["engine"], configuration[suite.name]
    settings = ", ".join(f"{name}={_option(value)}" for name, value in options.items() if _is_shown(name, value))
    parts = [
        f"# {suite.name}: {engine['model']}",
        f"tensor_parallel_size={engine['tensor_parallel_size']}, dtype={engine['dtype']}, device={engine['device']}, "
        f"page_size={engine['page_size']}, seed={engine['seed']}.\n\nSuite: {settings}.",
    ]
    if suite.traces_only:
        return "\n\n".join([*parts, *profile_sections(methods, records)]) + "\n"
    groups = list(dict.fromkeys(record["group"] for record in records))
    page_size = engine["page_size"]
    sections, question = [], 0
    for group in groups:
        blocks = summarise_group(records, methods, group, page_size)
        question = max([question, *(run.question_tokens for block in blocks for run in block)])
        sections += _group_sections(suite, group, blocks)
    return "\n\n".join([*parts, LEGEND.format(question=question), *sections]) + "\n"


def summarise_group(
    records: Sequence[Record], methods: Sequence[Settings], group: str, page_size: int
) -> list[list[RunSummary]]:
    """The dense run, then each method followed by its controls; runs that are not there are left out."""
    dense = summarise_run(records, settings_key({"method": "dense"}), group)
    blocks = [[dense]] if dense else []
    for settings in methods:
        own = summarise_run(records, settings_key(settings), group)
        if own is None or settings["method"] == "dense":
            continue
        attended = attended_of(records, own.run, group)
        wanted = [] if attended is None else controls_of(settings, attended, page_size)
        controls = [summarise_run(records, settings_key(control), group) for control in wanted]
        blocks.append([own, *(control for control in controls if control is not None)])
    return blocks


def _group_sections(suite: Suite, group: str, blocks: list[list[RunSummary]]) -> list[str]:
    parts = [f"## {group}", _main_table(suite, blocks), *gains(suite, blocks)]
    if suite.name == "recall":
        parts.append(_smallest_budgets(blocks))
    runs = [run for block in blocks for run in block]
    for what, of in (("task", lambda run: run.task_scores), ("depth", lambda run: run.depth_scores)):
        columns = list(dict.fromkeys(key for run in runs for key in of(run)))
        if len(columns) > 1:
            rows = [[label, *(number(of(run).get(key, math.nan), 1) for key in columns)] for label, run in _labelled(blocks)]
            parts.append(f"{suite.score_label} by {what}\n\n" + table([what, *map(_column, columns)], rows))
    return parts


def _is_shown(name: str, value: Any) -> bool:
    return value not in (None, (), []) and not name.endswith("sha256")


def _option(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _column(key: Any) -> str:
    return f"{key:g}" if isinstance(key, float) else str(key)


def _labelled(blocks: list[list[RunSummary]]) -> list[tuple[str, RunSummary]]:
    return [(f"{'= ' if place else ''}{run.label}", run) for block in blocks for place, run in enumerate(block)]


def _main_table(suite: Suite, blocks: list[list[RunSummary]]) -> str:
    head = [
        "run", suite.score_label, "density", "attended", "sparse rows", "held KV MB", "held metadata MB", "read MB / step",
        "error", "mass", "KL", "top-1",
    ]  # fmt: skip
    rows = [
        [
            label,
            number(run.score),
            number(run.density),
            number(run.attended, 0),
            number(run.sparse_share, 2),
            megabytes(run.held_kv),
            megabytes(run.held_metadata),
            megabytes(run.read_per_step),
            f"{small(run.error)} / {small(run.error_p90)}",
            f"{number(run.mass)} / {number(run.mass_p10)}",
            small(run.kl),
            number(run.top1),
        ]
        for label, run in _labelled(blocks)
    ]
    return table(head, rows)


def gains(suite: Suite, blocks: list[list[RunSummary]]) -> list[str]:
    """A line for each adaptive method: what it gains over Quest at equal density, a loss with its sign."""
    lines = []
    for own, *controls in blocks:
        quest = next((run for run in controls if run.settings["method"] == "quest"), None)
        if has_budget(own.settings) or own.settings["method"] == "dense":
            continue
        if quest is None:
            lines.append(f"- {own.label}: every row was dense, or controls were left out; nothing to compare at equal density")
            continue
        gain = own.score - quest.score if suite.higher_is_better else quest.score - own.score
        lines.append(
            f"- {own.label}: gain over quest at equal density: {gain:+.2f}{' (a loss)' if gain < 0 else ''} "
            f"({own.score:.3f} at density {own.density:.3f}, {quest.label} {quest.score:.3f} at {quest.density:.3f})"
        )
    return ["\n".join(lines)] if lines else []


def _smallest_budgets(blocks: list[list[RunSummary]]) -> str:
    tried: dict[str, dict[int, float]] = {}
    for run in (run for block in blocks for run in block):
        if has_budget(run.settings):
            tried.setdefault(run.settings["method"], {})[run.settings["token_budget"]] = run.score
    rows = []
    for method, scores in tried.items():
        enough = [budget for budget, score in scores.items() if score >= REACHED]
        rows.append([method, str(min(enough)) if enough else "none of them", ", ".join(map(str, sorted(scores)))])
    head = ["method", f"smallest budget with a score of {REACHED}", "budgets tried"]
    return table(head, rows) if rows else "No method with a token_budget was run."
