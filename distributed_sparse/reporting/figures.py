"""figures: matplotlib figures without a screen. matplotlib is the extra `eval`; nothing here runs without it."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def check_plots() -> None:
    """Raise ValueError, with the remedy, where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("plots need matplotlib, which is not installed; run pip install -e '.[eval]', or add --no-plots")


def new_figure(width: float = 6.4, height: float = 4.2, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of inches, and its axes side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")  # no pyplot: it would keep figures and pick a screen
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])
