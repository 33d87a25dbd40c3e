"""figures: matplotlib figures without a screen. matplotlib is the extra `eval`; nothing here runs without it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def check_plots(needed_by: str = "plots need", remedy: str = "add --no-plots") -> None:
    """Raise ValueError, with the remedy, where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"{needed_by} matplotlib, which is not installed; run pip install -e '.[eval]', or {remedy}")


def new_figure(
    width: float = 6.4, height: float = 4.2, columns: int = 1, rows: int = 1, *, sharex: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure, sizes in inches, and its axes row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")  # no pyplot: it would keep figures and pick a screen
    return figure, list(figure.subplots(rows, columns, squeeze=False, sharex=sharex).flat)


def save_figure(figure: Figure, path: str | Path, title: str) -> None:
    """Write a PNG with a title; makes the folder."""
    figure.suptitle(title, fontsize=9)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def horizontal_bars(axes: Axes, labels: Sequence[str], values: Sequence[float], size: int = 7, **bars: Any) -> None:
    """A labelled bar per value, the first at the top; `bars` go to `barh`."""
    axes.barh(range(len(labels)), values, **bars)
    axes.set_yticks(range(len(labels)), labels, fontsize=size)
    if not axes.yaxis_inverted():
        axes.invert_yaxis()


def plain_log_axis(axes: Axes, which: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, with ticks such as 0.1 0.2 0.5 instead of 10^-1."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
