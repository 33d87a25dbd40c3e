"""bench_plots: a benchmark's rows as a PNG. matplotlib is the extra `eval`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed_sparse.tools.common.figures import horizontal_bars, new_figure, plain_log_axis, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[dict[str, Any]]


def write_plot(path: str | Path, benchmark: str, rows: Rows, title: str) -> None:
    """Draw the measured rows of a benchmark.

    Raises:
        ValueError: nothing was measured.
    """
    draw, needed = PLOTS[benchmark]
    measured = [row for row in rows if row.get(needed) is not None]
    if not measured:
        raise ValueError(f"--plot {path}: nothing was measured, so there is nothing to draw")
    save_figure(draw(measured), path, title)


def _kernels(rows: Rows) -> Figure:
    """A panel per op: median ms of every implementation and point, with a mark at the bytes' time."""
    names = list(dict.fromkeys(row["op"] for row in rows))
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure, panels = new_figure(3.4 * columns, 2.6 * lines, columns, lines)
    for panel in panels[len(names) :]:
        panel.remove()
    for panel, name in zip(panels, names):
        _bars(panel, [row for row in rows if row["op"] == name], "ms", _kernel_label, "bytes_ms")
        panel.set_title(name, fontsize=8)
    figure.supxlabel("ms (median, 10th to 90th percentile; | the bytes at the copy bandwidth)", fontsize=8)
    return figure


def _kernel_label(row: dict[str, Any]) -> str:
    point = [f"{short}{row[name]}" for name, short in KERNEL_AXES.items() if name in row]
    return " ".join([row["implementation"], *point])


KERNEL_AXES = {"context": "n", "batch": "B", "token_budget": "k", "page_size": "S"}


def _layer(rows: Rows) -> Figure:
    figure, (axes,) = new_figure(6.4, 1 + 0.25 * len(rows))
    _bars(axes, rows, "ms", lambda row: f"{row['method']} n{row['context']} B{row['batch']}", "bytes_ms")
    axes.set_xlabel("ms (median, 10th to 90th percentile; | the bytes at the read bandwidth)", fontsize=8)
    return figure


def _step(rows: Rows) -> Figure:
    parts = ("step_p50", "shard_p50", "overhead_p50", "gap_p50", "driver_p50")
    figure, (axes,) = new_figure(6.4, 2.4)
    horizontal_bars(axes, parts, [rows[0][part] for part in parts])
    axes.set_xlabel("ms (median over decode steps)", fontsize=8)
    return figure


def _decode(rows: Rows) -> Figure:
    """A panel per batch: TPOT against the context, a line per contestant; dotted: its bytes at the read bandwidth."""
    batches = sorted({row["batch"] for row in rows})
    figure, panels = new_figure(1 + 3.6 * len(batches), 3.8, len(batches))
    contestants = list(dict.fromkeys((row["contestant"], row["tensor_parallel_size"]) for row in rows))
    for panel, batch in zip(panels, batches):
        for number, key in enumerate(contestants):
            own = [row for row in rows if row["batch"] == batch and (row["contestant"], row["tensor_parallel_size"]) == key]
            own.sort(key=lambda row: row["context"])
            x, y = [row["context"] for row in own], [row["tpot_ms"] for row in own]
            around = [[row["tpot_ms"] - row["p10_ms"] for row in own], [row["p90_ms"] - row["tpot_ms"] for row in own]]
            label = f"{key[0]}, TP {key[1]}" if key[1] > 1 else key[0]
            panel.errorbar(x, y, yerr=around, marker="o", markersize=3, capsize=2, color=f"C{number}", label=label)
            panel.plot(x, [row["bytes_ms"] for row in own], ":", marker="_", color=f"C{number}")
        panel.set_title(f"batch {batch}", fontsize=8)
        panel.set(xlabel="context (tokens)")
        plain_log_axis(panel, "x")
        plain_log_axis(panel, "y")
    panels[0].set_ylabel("ms per token (dotted: limit by bytes)")
    panels[0].legend(fontsize=7)
    return figure


def _ttft(rows: Rows) -> Figure:
    figure, (axes,) = new_figure(6.4, 1 + 0.25 * len(rows))
    _bars(axes, rows, "ttft_ms", lambda row: f"{row['contestant']} {row['prompt_len']}")
    axes.set_xlabel("ms from a prompt to its first token (median, 10th to 90th percentile)", fontsize=8)
    return figure


def _serve(rows: Rows) -> Figure:
    """A panel per latency: mean, median and p99 of each method and rate."""
    figure, panels = new_figure(13.0, 1.2 + 0.35 * len(rows), len(LATENCIES))
    labels = [f"{row['method']} at {row['request_rate']}/s" for row in rows]
    for panel, name in zip(panels, LATENCIES):
        for offset, statistic in zip((-0.27, 0.0, 0.27), ("mean", "median", "p99")):
            places = [place + offset for place in range(len(rows))]
            values = [row[f"{statistic}_{name}_ms"] or 0.0 for row in rows]
            panel.barh(places, values, height=0.25, label=statistic)
        panel.set_yticks(range(len(rows)), labels if name == LATENCIES[0] else [""] * len(rows), fontsize=7)
        panel.invert_yaxis()
        panel.set_title(f"{name.upper()} (ms)", fontsize=8)
    panels[0].legend(fontsize=7)
    return figure


LATENCIES = ("ttft", "tpot", "itl", "e2el")


def _bars(axes: Axes, rows: Rows, value: str, label: Callable[[dict[str, Any]], str], limit: str | None = None) -> None:
    """A bar per row with its spread, and a mark at its limit."""
    around = [[row[value] - row["p10_ms"] for row in rows], [row["p90_ms"] - row[value] for row in rows]]
    labels, values = [label(row) for row in rows], [row[value] for row in rows]
    horizontal_bars(axes, labels, values, 6, xerr=around, height=0.7, color="C0", error_kw={"linewidth": 1})
    if limit is not None:
        axes.plot([row[limit] for row in rows], range(len(rows)), "|", markersize=9, color="black")
    axes.tick_params(axis="x", labelsize=6)


PLOTS: dict[str, tuple[Callable[[Rows], Figure], str]] = {
    "kernels": (_kernels, "ms"),
    "layer": (_layer, "ms"),
    "step": (_step, "step_p50"),
    "decode": (_decode, "tpot_ms"),
    "ttft": (_ttft, "ttft_ms"),
    "serve": (_serve, "duration"),
}
"""Benchmark -> its figure, and a key that only measured rows have."""
