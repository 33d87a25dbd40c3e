"""evaluation_report: an evaluation's results as Markdown tables, each method with its controls at equal density."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from distributed_sparse.tools.common.results import Record
from distributed_sparse.tools.common.tables import megabytes, number, small, table
from distributed_sparse.tools.evaluation.evaluation_summary import (
    DENSE,
    UNKNOWN,
    Estimate,
    RunSummary,
    attended_of,
    dense_failures,
    summarise_run,
)
from distributed_sparse.tools.evaluation.methods import Settings, controls_of, has_budget, label, settings_key
from distributed_sparse.tools.evaluation.profile_report import profile_sections
from distributed_sparse.tools.evaluation.suite import Suite

REACHED = 0.95
"""Share of right answers at which a recall budget suffices."""

LEGEND = """\
Every run went through the engine. Prompts were prefilled densely up to the question; the question's tokens (at most
{question}) and the answer's were decoded one by one, so the method read the question too.

- examples, tokens: prompts, and their tokens that were judged or generated. In brackets: 95% bootstrap intervals over
  {units}, resampled within each task or text; they cover other examples of the same tasks and texts.
  If all numbers are 0, or all are the best possible, the interval is the rule of three's.
- against dense: {change}, on the same {pairs}.
- bytes / dense: K, V and metadata that a decode step reads, relative to the dense run (the engine's counters).
- top-1: share of positions with the dense run's most likely token; KL: KL(dense || run) of the next-token distribution in
  nats; both runs are given the same tokens.
- density: tokens attended / tokens in context, in the layers that select; attended: tokens per (step, layer, KV head) row
  there.
- held: bytes of KV, and of the method's metadata, in the pages of the longest example's sequence; read: bytes of K, V and
  metadata per decode step of one sequence. Over all ranks and layers, MB = 10^6 bytes.
- error: relative L2 error of a head's attention output against dense over the same cache, mean / 90th percentile; mass:
  softmax mass that was read, mean / 10th percentile. Of traced steps, over the query heads of the layers that select;
  heads whose dense output is zero up to rounding have no error.
- sparse rows, and why the others were dense: the layer is dense (`dense_layers`, `layers`), the context is below
  `min_context`, or the row read its whole context (the budget covers it, or the method selected all of it). Shares of all rows.
- Lines that begin with `=` are controls; their token budget is what the run above them attended on average.
- `-`: not measured (evicting methods cannot be traced; for KL, log-probabilities of the whole vocabulary must fit into
  memory), or no interval."""


def report(configuration: dict[str, Any], suite: Suite, methods: Sequence[Settings], records: Sequence[Record]) -> str:
    """The report in Markdown. `methods`: settings of the runs to show, in addition to dense and the controls."""
    engine, options = configuration["engine"], configuration[suite.name]
    settings = ", ".join(
        f"{name}={','.join(map(str, value)) if isinstance(value, (list, tuple)) else value}"
        for name, value in options.items()
        if value not in (None, (), []) and not name.endswith("sha256")
    )
    parts = [
        f"# {suite.name}: {engine['model']}",
        f"tensor_parallel_size={engine['tensor_parallel_size']}, dtype={engine['dtype']}, device={engine['device']}, "
        f"page_size={engine['page_size']}, seed={engine['seed']}.\n\nSuite: {settings}.",
    ]
    if suite.traces_only:
        return "\n\n".join([*parts, *profile_sections(methods, records)]) + "\n"
    page_size = engine["page_size"]
    sections, question = [], 0
    for group in dict.fromkeys(record["group"] for record in records):
        blocks = summarise_group(records, methods, group, page_size)
        question = max([question, *(run.question_tokens for block in blocks for run in block)])
        sections += [f"## {group}", *(f"**{failure}**" for failure in dense_failures(suite, records, [group]))]
        sections += _group_sections(suite, blocks)
        sections += _missing_controls(records, blocks, group, page_size)
    units = {0: "examples", 1: "judged positions"}.get(suite.block, f"blocks of {suite.block} judged positions")
    change = f"{suite.score_label} over the dense run's, minus one" if suite.is_log else "score minus the dense run's"
    pairs = "positions" if suite.block else "examples"
    legend = LEGEND.format(question=question, units=units, change=change, pairs=pairs)
    return "\n\n".join([*parts, legend, *sections]) + "\n"


def summarise_group(
    records: Sequence[Record], methods: Sequence[Settings], group: str, page_size: int
) -> list[list[RunSummary]]:
    """The dense run, then each method followed by its controls; runs without records are left out."""
    dense = summarise_run(records, settings_key(DENSE), group)
    blocks = [[dense]] if dense else []
    for settings in methods:
        own = summarise_run(records, settings_key(settings), group)
        if own is None or settings["method"] == "dense":
            continue
        wanted = _wanted_controls(records, settings, group, page_size)
        controls = [summarise_run(records, settings_key(control), group) for control in wanted]
        blocks.append([own, *(control for control in controls if control is not None)])
    return blocks


def _wanted_controls(records: Sequence[Record], settings: Settings, group: str, page_size: int) -> list[Settings]:
    attended = attended_of(records, settings_key(settings), group)
    return [] if attended is None else controls_of(settings, attended, page_size)


def _group_sections(suite: Suite, blocks: list[list[RunSummary]]) -> list[str]:
    labelled = [(f"{'= ' if place else ''}{run.label}", run) for block in blocks for place, run in enumerate(block)]
    parts = [_table(labelled, _quality_columns(suite)), *gains(suite, blocks)]
    if suite.name == "recall":
        parts.append(_smallest_budgets(blocks))
    for what, of in (("task", lambda run: run.task_scores), ("depth", lambda run: run.depth_scores)):
        columns = list(dict.fromkeys(key for _, run in labelled for key in of(run)))
        if len(columns) > 1:
            rows = [[name, *(_score(of(run).get(key, UNKNOWN), suite, 1) for key in columns)] for name, run in labelled]
            first = labelled[0][1]
            parts.append(
                f"{suite.score_label} by {what}, {first.num_examples} examples and {first.num_tokens} tokens in all\n\n"
                + table([what, *(f"{key:g}" if isinstance(key, float) else key for key in columns)], rows)
            )
    return [*parts, _table(labelled, ATTENTION_COLUMNS), _table(labelled, ROWS_COLUMNS)]


def _score(estimate: Estimate, suite: Suite, digits: int = 3) -> str:
    """A score with its interval."""
    return _bracketed(estimate, lambda value: number(math.exp(value), 2) if suite.is_log else number(value, digits))


def _change(estimate: Estimate, suite: Suite) -> str:
    """A difference from the dense run with its interval, signed; in per cent if the score is a logarithm."""

    def shown(value: float) -> str:
        if not math.isfinite(value):
            return number(value)
        return f"{100 * math.expm1(value):+.1f}%" if suite.is_log else f"{value:+.3f}"

    return _bracketed(estimate, shown)


def _bracketed(estimate: Estimate, shown: Callable[[float], str]) -> str:
    mean, low, high = map(shown, (estimate.mean, *estimate.interval))
    return mean if low == "-" else f"{mean} [{low}, {high}]"


def _table(labelled: list[tuple[str, RunSummary]], columns: dict[str, Callable[[RunSummary], str]]) -> str:
    """A table with one line per run; `columns`: heading -> cell of a run."""
    rows = [[name, str(run.num_examples), *(cell(run) for cell in columns.values())] for name, run in labelled]
    return table(["run", "examples", *columns], rows)


def _quality_columns(suite: Suite) -> dict[str, Callable[[RunSummary], str]]:
    def compared(run: RunSummary, estimate: Estimate) -> Estimate:
        # a run that read every context entirely is dense attention itself, so it has no interval
        return Estimate(estimate.mean) if run.sparse_share == 0 else estimate

    return {
        "tokens": lambda run: str(run.num_tokens),
        suite.score_label: lambda run: _score(run.score, suite),
        "against dense": lambda run: "-" if run.settings == DENSE else _change(compared(run, run.change), suite),
        "bytes / dense": lambda run: number(run.read_share),
        "top-1": lambda run: _bracketed(compared(run, run.top1), number),
        "KL": lambda run: _bracketed(compared(run, run.kl), small),
    }


ATTENTION_COLUMNS: dict[str, Callable[[RunSummary], str]] = {
    "density": lambda run: number(run.density),
    "attended": lambda run: number(run.attended, 0),
    "held KV MB": lambda run: megabytes(run.held_kv),
    "held metadata MB": lambda run: megabytes(run.held_metadata),
    "read MB / step": lambda run: megabytes(run.read_per_step),
    "error": lambda run: f"{small(run.error)} / {small(run.error_p90)}",
    "mass": lambda run: f"{number(run.mass)} / {number(run.mass_p10)}",
}
ROWS_COLUMNS: dict[str, Callable[[RunSummary], str]] = {
    "sparse rows": lambda run: number(run.dense_shares.get("sparse", math.nan)),
    "dense: layer": lambda run: number(run.dense_shares.get("layers", math.nan)),
    "dense: min_context": lambda run: number(run.dense_shares.get("short", math.nan)),
    "dense: whole context read": lambda run: number(run.dense_shares.get("whole", math.nan)),
}


def _missing_controls(records: Sequence[Record], blocks: list[list[RunSummary]], group: str, page_size: int) -> list[str]:
    """A line for each method some of whose controls were not run, with the reason."""
    lines = []
    for own, *controls in blocks:
        if own.settings["method"] == "dense":
            continue
        wanted = _wanted_controls(records, own.settings, group, page_size)
        missing = [label(control) for control in wanted if settings_key(control) not in {run.run for run in controls}]
        if not wanted:
            lines.append(
                f"- {own.label}: no controls, since all of its rows read the whole context: there is no density to match"
            )
        elif missing:
            lines.append(f"- {own.label}: {', '.join(missing)} not run (--no-controls, or a run that was interrupted)")
    return ["Controls left out:\n\n" + "\n".join(lines)] if lines else []


def gains(suite: Suite, blocks: list[list[RunSummary]]) -> list[str]:
    """A line for each adaptive method: its gain over Quest at equal density, negative for a loss."""
    lines = []
    for own, *controls in blocks:
        quest = next((run for run in controls if run.settings["method"] == "quest"), None)
        if has_budget(own.settings) or quest is None:
            continue
        score, of_quest = (math.exp(run.score.mean) if suite.is_log else run.score.mean for run in (own, quest))
        gain = score - of_quest if suite.higher_is_better else of_quest - score
        lines.append(
            f"- {own.label}: gain over quest at equal density: {gain:+.2f}{' (a loss)' if gain < 0 else ''} "
            f"({score:.3f} at density {own.density:.3f}, {quest.label} {of_quest:.3f} at {quest.density:.3f}; "
            f"{own.num_examples} examples)"
        )
    return ["\n".join(lines)] if lines else []


def _smallest_budgets(blocks: list[list[RunSummary]]) -> str:
    tried: dict[str, dict[int, float]] = {}
    for run in (run for block in blocks for run in block):
        if has_budget(run.settings):
            tried.setdefault(run.settings["method"], {})[run.settings["token_budget"]] = run.score.mean
    rows = []
    for method, scores in tried.items():
        enough = [budget for budget, score in scores.items() if score >= REACHED]
        rows.append([method, str(min(enough)) if enough else "none of them", ", ".join(map(str, sorted(scores)))])
    head = ["method", f"smallest budget with a score of {REACHED}", "budgets tried"]
    if not rows:
        return "No method with a token_budget was run."
    judged = blocks[0][0].num_tokens
    return f"Smallest budgets by the mean score over {judged} questions, whatever its interval\n\n{table(head, rows)}"
