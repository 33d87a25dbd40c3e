"""PNG plots of an evaluation. matplotlib is the extra `eval`; nothing here runs without it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from distributed_sparse.evaluation.methods import Settings, label, settings_key
from distributed_sparse.evaluation.profile_report import rows_by_entropy, tokens_needed
from distributed_sparse.evaluation.report import summarise_group
from distributed_sparse.evaluation.suite import Suite
from distributed_sparse.evaluation.summary import RunSummary, of_run
from distributed_sparse.reporting.figures import new_figure
from distributed_sparse.reporting.results import Record
from distributed_sparse.trace import MASSES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def write_plots(
    directory: Path, suite: Suite, methods: Sequence[Settings], records: Sequence[Record], page_size: int
) -> list[Path]:
    """Every plot that the records allow, by group; the files."""
    written = []
    for group in dict.fromkeys(record["group"] for record in records):
        runs = [run for block in summarise_group(records, methods, group, page_size) for run in block]
        own = {settings_key(settings) for settings in methods} | {settings_key({"method": "dense"})}
        figures = {
            "score": _score(suite, runs),
            "density": _density([run for run in runs if run.run in own and run.settings["method"] != "dense"]),
            "mass": _mass([run for run in runs if run.run in own]),
            "tokens": _tokens(records, group),
        }
        if suite.traces_only:
            figures["error"] = _error(records, methods, group)
        for name, figure in figures.items():
            if figure is not None:
                figure.suptitle(f"{suite.name}: {group}", fontsize=10)
                path = directory / f"{name}-{re.sub(r'[^a-z0-9]+', '-', group.lower()).strip('-')}.png"
                figure.savefig(path, dpi=120)
                written.append(path)
    return written


def _whole_numbers(axes: Axes, axis: Literal["both", "x"]) -> None:
    """Ticks at layers and heads only."""
    axes.locator_params(axis=axis, integer=True)


def _score(suite: Suite, runs: list[RunSummary]) -> Figure | None:
    """Score against density, a line for each method."""
    points: dict[str, set[tuple[float, float]]] = {}
    for run in runs:
        if np.isfinite(run.score) and np.isfinite(run.density):
            points.setdefault(run.settings["method"], set()).add((run.density, run.score))
    if not points:
        return None
    figure, (axes,) = new_figure()
    for method, of_method in points.items():
        x, y = zip(*sorted(of_method))
        control = method in ("window", "random", "oracle_topk")
        axes.plot(x, y, marker="o" if method != "dense" else "*", linestyle="--" if control else "-", label=method)
    axes.set(xlabel="density (tokens attended / tokens in context)", ylabel=suite.score_label, xscale="log")
    axes.legend(fontsize=8)
    return figure


def _density(runs: list[RunSummary]) -> Figure | None:
    """Heat maps of density per layer and KV head, side by side."""
    shown = [(run.label, run.layer_density) for run in runs if run.layer_density is not None]
    if not shown:
        return None
    figure, places = new_figure(1.2 + 2.4 * len(shown), 4.2, len(shown))
    for axes, (name, density) in zip(places, shown):
        image = axes.imshow(density, vmin=0, vmax=1, aspect="auto", origin="lower", cmap="viridis")
        axes.set_title(name, fontsize=8)
        axes.set(xlabel="KV head", ylabel="layer")
        _whole_numbers(axes, "both")
    figure.colorbar(image, ax=places, label="density")
    return figure


def _mass(runs: list[RunSummary]) -> Figure | None:
    """Captured softmax mass by layer."""
    shown = [(run.label, run.layer_mass) for run in runs if run.layer_mass is not None]
    if not shown:
        return None
    figure, (axes,) = new_figure()
    for name, mass in shown:
        axes.plot(mass, marker="o", label=name)
    axes.set(xlabel="layer", ylabel="captured softmax mass", ylim=(0, 1.05))
    _whole_numbers(axes, "x")
    axes.legend(fontsize=8)
    return figure


def _tokens(records: Sequence[Record], group: str) -> Figure | None:
    """Tokens that hold a mass, by layer: mean over heads and steps, and the range of the heads' means."""
    needed = tokens_needed(records, group)
    if needed is None:
        return None
    figure, (axes,) = new_figure()
    layers = np.arange(len(needed.mean))
    for place, mass in enumerate(MASSES):
        (line,) = axes.plot(layers, needed.mean[:, place], marker="o", label=f"mass {mass:g}")
        of_heads: Any = needed.heads[..., place]
        axes.fill_between(layers, of_heads.min(1), of_heads.max(1), alpha=0.15, color=line.get_color())
    axes.set(xlabel="layer", ylabel="tokens needed (band: from head to head)", yscale="log")
    _whole_numbers(axes, "x")
    axes.legend(fontsize=8)
    return figure


def _error(records: Sequence[Record], methods: Sequence[Settings], group: str) -> Figure | None:
    """Error against entropy, a cloud for each run."""
    figure, (axes,) = new_figure()
    dense = of_run(records, "trace", settings_key({"method": "dense"}), group)
    for settings in methods:
        units = of_run(records, "trace", settings_key(settings), group)
        if units:
            entropy, error, density = rows_by_entropy(units, dense)
            sparse = density < 1
            axes.scatter(entropy[sparse], error[sparse], s=6, alpha=0.5, label=label(settings))
    if not axes.collections:
        return None
    axes.set(xlabel="entropy of the row's softmax (nats)", ylabel="relative L2 error")
    axes.legend(fontsize=8)
    return figure
