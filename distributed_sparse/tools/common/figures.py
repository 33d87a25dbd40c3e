"""figures: matplotlib figures without a display; they need the extra `eval`."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def check_plots() -> None:
    """Raise ValueError, with the remedy, if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("plots need matplotlib, which is not installed; run pip install -e '.[eval]', or add --no-plots")


def new_figure(width: float = 6.4, height: float = 4.2, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Make a figure of `width` x `height` inches with `columns` axes side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")  # pyplot would keep figures and choose a display
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def plain_log_axis(axes: Axes, which: Literal["x", "y"]) -> None:
    """Make an axis logarithmic with plain tick labels, such as 0.1 0.2 0.5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
