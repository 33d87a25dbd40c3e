"""plot: expected and least time per token against the context. matplotlib is the extra `eval`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distributed_sparse.tools.common.figures import new_figure, plain_log_axis

STYLES = {"tpot_s": "-", "limit_s": ":"}


def write_plot(path: str | Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """A PNG: a panel for each batch and tensor_parallel_size; a colour per method, whole lines expected, dotted ones limits."""
    sizes = sorted({row["tensor_parallel_size"] for row in rows})
    batches = sorted({row["batch"] for row in rows})
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, (whole,) = new_figure(1 + 3 * len(batches), 0.8 + 2.6 * len(sizes))
    whole.remove()  # panels in lines and columns take its place
    places = figure.subplots(len(sizes), len(batches), squeeze=False, sharex=True)
    for line, world_size in enumerate(sizes):
        for column, batch in enumerate(batches):
            axes = places[line][column]
            point = [row for row in rows if row["tensor_parallel_size"] == world_size and row["batch"] == batch]
            for number, method in enumerate(methods):
                of_method = sorted((row for row in point if row["method"] == method), key=lambda row: row["context"])
                x = [row["context"] for row in of_method]
                for name, style in STYLES.items():
                    y = [row[name] * 1e3 for row in of_method]
                    label = method if name == "tpot_s" else None
                    axes.plot(x, y, style, marker="o", markersize=3, color=f"C{number}", label=label)
            axes.set_title(f"TP {world_size}, batch {batch}", fontsize=8)
            plain_log_axis(axes, "x")
            plain_log_axis(axes, "y")
    places[0][0].legend(fontsize=7)
    figure.supxlabel("context (tokens)", fontsize=9)
    figure.supylabel("ms per token (dotted: limit by bytes)", fontsize=9)
    figure.suptitle(title, fontsize=9)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
