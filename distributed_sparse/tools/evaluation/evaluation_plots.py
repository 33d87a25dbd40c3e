"""evaluation_plots: PNG plots of an evaluation; they need the extra `eval` (matplotlib)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distributed_sparse.tools.common.figures import new_figure, plain_log_axis
from distributed_sparse.tools.common.results import Record
from distributed_sparse.tools.evaluation.evaluation_report import summarise_group
from distributed_sparse.tools.evaluation.evaluation_summary import DENSE, RunSummary, of_run
from distributed_sparse.tools.evaluation.methods import CONTROLS, Settings, label, settings_key
from distributed_sparse.tools.evaluation.profile_report import rows_by_entropy, tokens_needed
from distributed_sparse.tools.evaluation.suite import Suite
from distributed_sparse.trace import MASSES

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_plots(
    directory: Path, suite: Suite, methods: Sequence[Settings], records: Sequence[Record], page_size: int
) -> list[Path]:
    """Write every plot for which there are records, by group; return the files."""
    written = []
    for group in dict.fromkeys(record["group"] for record in records):
        runs = [run for block in summarise_group(records, methods, group, page_size) for run in block]
        own = {settings_key(settings) for settings in (DENSE, *methods)}
        figures = {
            "agreement": _agreement(runs, own),
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


def _by_method(runs: Sequence[RunSummary], y: Callable[[RunSummary], float]) -> dict[str, list[RunSummary]]:
    """The distinct runs in which `y` was measured, by method, sorted by density."""
    found: dict[str, dict[str, RunSummary]] = {}
    for run in sorted(runs, key=lambda run: run.density):
        if np.isfinite(y(run)) and np.isfinite(run.density):
            found.setdefault(run.settings["method"], {})[run.run] = run
    # sorted, so that a method keeps its colour
    return {method: list(of_method.values()) for method, of_method in sorted(found.items())}


def _score(suite: Suite, runs: list[RunSummary]) -> Figure | None:
    """Score over density, a line for each method."""
    by_method = _by_method(runs, lambda run: run.score.mean)
    if not by_method:
        return None
    figure, (axes,) = new_figure()
    for method, of_method in by_method.items():
        scores = [float(np.exp(run.score.mean)) if suite.is_log else run.score.mean for run in of_method]
        axes.plot([run.density for run in of_method], scores, **_style(method))
    axes.set(xlabel="density (tokens attended / tokens in context)", ylabel=suite.score_label)
    plain_log_axis(axes, "x")
    axes.legend(fontsize=8)
    return figure


def _agreement(runs: list[RunSummary], own: set[str]) -> Figure | None:
    """Top-1 agreement with dense over the share of dense's bytes, with intervals; the methods' own runs are labelled."""
    by_method = _by_method(runs, lambda run: run.top1.mean)
    if not by_method:
        return None
    figure, (axes,) = new_figure(8, 5)
    for method, of_method in by_method.items():
        x, y = [run.read_share for run in of_method], [100 * run.top1.mean for run in of_method]
        (line,) = axes.plot(x, y, **_style(method))
        for run, share, mean in zip(of_method, x, y):
            if run.run in own and method != "dense":
                own_part = run.label.removeprefix(method).strip()
                axes.annotate(
                    own_part, (share, mean), xytext=(4, -9), textcoords="offset points", fontsize=7, color=line.get_color()
                )
            low, high = (100 * end for end in run.top1.interval)
            if np.isfinite(low) and run.sparse_share > 0:
                axes.vlines(share, low, high, color=line.get_color(), alpha=0.4)
    axes.set(xlabel="bytes read / dense's (K, V and metadata)", ylabel="top-1 agreement with dense (%)")
    plain_log_axis(axes, "x")
    axes.set_xlim(left=min(0.1, 0.9 * axes.dataLim.x0))
    axes.legend(fontsize=8)
    return figure


def _style(method: str) -> dict[str, Any]:
    control = method in CONTROLS
    return {"marker": "*" if method == "dense" else "o", "linestyle": "--" if control else "-", "label": method,
            "markerfacecolor": "none" if control else None}  # fmt: skip


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
        axes.locator_params(integer=True)
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
    axes.locator_params(axis="x", integer=True)
    axes.legend(fontsize=8)
    return figure


def _tokens(records: Sequence[Record], group: str) -> Figure | None:
    """Tokens that hold a share of the mass, by layer: mean over heads and steps, and the range of the heads' means."""
    needed = tokens_needed(records, group)
    if needed is None:
        return None
    figure, (axes,) = new_figure()
    layers = np.arange(len(needed.mean))
    for place, mass in enumerate(MASSES):
        (line,) = axes.plot(layers, needed.mean[:, place], marker="o", label=f"mass {mass:g}")
        of_heads: Any = needed.heads[..., place]
        axes.fill_between(layers, of_heads.min(1), of_heads.max(1), alpha=0.15, color=line.get_color())
    axes.set(xlabel="layer", ylabel="tokens needed (band: from head to head)")
    plain_log_axis(axes, "y")
    axes.locator_params(axis="x", integer=True)
    axes.legend(fontsize=8)
    return figure


def _error(records: Sequence[Record], methods: Sequence[Settings], group: str) -> Figure | None:
    """Error over entropy, a scatter plot for each run."""
    figure, (axes,) = new_figure()
    dense = of_run(records, "trace", settings_key(DENSE), group)
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
