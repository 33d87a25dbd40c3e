"""planner_plot: expected and least time per token against the context. matplotlib is the extra `eval`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from distributed_sparse.tools.common.figures import new_figure, plain_log_axis, save_figure

STYLES = {"tpot_s": "-", "limit_s": ":"}


def write_plot(path: str | Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Write a PNG with a panel per batch and tensor_parallel_size. Each method has a colour; dotted lines are limits."""
    sizes, batches = (sorted({row[name] for row in rows}) for name in ("tensor_parallel_size", "batch"))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, panels = new_figure(1 + 3 * len(batches), 0.8 + 2.6 * len(sizes), len(batches), len(sizes), sharex=True)
    for axes, (size, batch) in zip(panels, product(sizes, batches)):
        point = [row for row in rows if row["tensor_parallel_size"] == size and row["batch"] == batch]
        for number, method in enumerate(methods):
            own = sorted((row for row in point if row["method"] == method), key=lambda row: row["context"])
            x = [row["context"] for row in own]
            for name, style in STYLES.items():
                y = [row[name] * 1e3 for row in own]
                label = method if name == "tpot_s" else None
                axes.plot(x, y, style, marker="o", markersize=3, color=f"C{number}", label=label)
        axes.set_title(f"TP {size}, batch {batch}", fontsize=8)
        plain_log_axis(axes, "x")
        plain_log_axis(axes, "y")
    panels[0].legend(fontsize=7)
    figure.supxlabel("context (tokens)", fontsize=9)
    figure.supylabel("ms per token (dotted: limit by bytes)", fontsize=9)
    save_figure(figure, path, title)
