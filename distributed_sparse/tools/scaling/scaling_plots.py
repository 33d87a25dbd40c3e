"""scaling_plots: PNG plots of scaling points: speed-up and efficiency, TPOT against context, split of a step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from distributed_sparse.tools.common.figures import horizontal_bars, new_figure, plain_log_axis
from distributed_sparse.tools.evaluation.methods import label
from distributed_sparse.tools.scaling.grid import Point
from distributed_sparse.tools.scaling.scaling_summary import PARTS, Tried, speed_ups, split_ms, varying

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_plots(directory: Path, tried: Tried) -> list[Path]:
    """Write every plot for which there are records; returns the files."""
    done = [(point, record) for point, record in tried if "error" not in record]
    written = []
    for name, figure in {"speed-up": _speed_up(done), "tpot": _tpot(done), "split": _split(done)}.items():
        if figure is not None:
            path = directory / f"{name}.png"
            figure.savefig(path, dpi=120)
            written.append(path)
    return written


def _without(point: Point, done: Tried, *left_out: str) -> str:
    """A point's values of the varying axes, without some of them."""
    kept = [f"{axis}={point.axes[axis]}" for axis in varying(done) if axis in point.axes and axis not in left_out]
    return ", ".join(kept).replace("sparse=", "") or label(point.engine.sparse or {"method": "dense"})


def _speed_up(done: Tried) -> Figure | None:
    """Speed-up and efficiency against the number of ranks, side by side, a line per group of several points."""
    gains = speed_ups(done)
    lines: dict[str, list[tuple[int, float, float]]] = {}
    for point, _ in done:
        if point.key in gains:
            name = _without(point, done, "tensor_parallel_size", "nodes")
            lines.setdefault(name, []).append((point.engine.tensor_parallel_size, *gains[point.key]))
    lines = {name: sorted(line) for name, line in lines.items() if len(line) > 1}
    if not lines:
        return None
    figure, (left, right) = new_figure(10.0, 4.2, 2)
    for name, line in lines.items():
        ranks, speed_up, efficiency = zip(*line)
        left.plot(ranks, speed_up, marker="o", label=name)
        right.plot(ranks, efficiency, marker="o", label=name)
    sizes = sorted({rank for line in lines.values() for rank, _, _ in line})
    left.plot(sizes, [size / sizes[0] for size in sizes], linestyle=":", color="grey", label="linear")
    left.set(ylabel="speed-up of TPOT", ylim=(0, None))
    right.set(ylabel="efficiency", ylim=(0, None))
    for axes in (left, right):
        axes.set(xlabel="tensor_parallel_size", xticks=sizes)
    left.legend(fontsize=7)
    return figure


def _tpot(done: Tried) -> Figure | None:
    """Median TPOT against the context, a line per method."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for point, record in done:
        if record["tpot_ms"] is not None:
            name = _without(point, done, "context", "workload.input_len")
            lines.setdefault(name, []).append((point.workload.input_len, record["tpot_ms"]["median"]))
    if len({context for line in lines.values() for context, _ in line}) < 2:
        return None
    figure, (axes,) = new_figure()
    for name, line in lines.items():
        contexts, ms = zip(*sorted(line))
        axes.plot(contexts, ms, marker="o", label=name)
    axes.set(xlabel="context (prompt tokens)", ylabel="median TPOT (ms)", ylim=(0, None))
    plain_log_axis(axes, "x")
    axes.legend(fontsize=7)
    return figure


def _split(done: Tried) -> Figure | None:
    """The parts of a step, a stacked bar for each point with a profiled step."""
    bars = [(_without(point, done), split) for point, record in done if (split := split_ms(record))["shard"] is not None]
    if not bars:
        return None
    figure, (axes,) = new_figure(8.0, 1.6 + 0.3 * len(bars))
    names, left = [name for name, _ in bars], [0.0] * len(bars)
    for part in PARTS:
        widths = [split[part] or 0.0 for _, split in bars]
        horizontal_bars(axes, names, widths, left=left, label=part.replace("_", "-"))
        left = [start + width for start, width in zip(left, widths)]
    axes.set(xlabel="ms of a step")
    axes.legend(fontsize=7)
    return figure
