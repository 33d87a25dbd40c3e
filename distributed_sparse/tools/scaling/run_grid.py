"""run_grid: measure every point of a grid, one engine after the other, and keep each finished point at once."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

from distributed_sparse.config import EngineConfig
from distributed_sparse.llm import LLM
from distributed_sparse.model.checkpoint import resolve_checkpoint
from distributed_sparse.model.config import ModelConfig
from distributed_sparse.model.limits import resolve_max_model_len
from distributed_sparse.model.sharding import check_divisibility
from distributed_sparse.selection import layer_configs
from distributed_sparse.tools.common.environment import environment
from distributed_sparse.tools.common.results import Record, Results
from distributed_sparse.tools.scaling.checks import Outcome, check_points
from distributed_sparse.tools.scaling.grid import Point, ScalingConfig
from distributed_sparse.tools.scaling.leaks import Surroundings
from distributed_sparse.tools.scaling.measure_point import OpenEngine, measure
from distributed_sparse.utils.progress import Progress

logger = logging.getLogger(__name__)


class Scaling:
    """Runs the points of a configuration.

    Args:
        config: the grid.
        open_engine: opens an engine; one is open at a time. None: `LLM.from_config`.

    Raises:
        ValueError: a point's settings are invalid for its model, found before anything is measured.
    """

    def __init__(self, config: ScalingConfig, open_engine: OpenEngine | None = None) -> None:
        self.points, self.checks = config.points, config.checks
        for point in self.points:
            _check_model(point)
        self._open_engine = open_engine or LLM.from_config
        self._groups: dict[str, list[Point]] = {}
        for point in self.points:
            self._groups.setdefault(point.group, []).append(point)
        for members in self._groups.values():
            members.sort(key=lambda point: point.engine.tensor_parallel_size)

    @property
    def engines(self) -> list[EngineConfig]:
        return [point.engine for point in self.points]

    def run(self, results: Results) -> None:
        """Measure what `results` lacks, in each group the points of fewest ranks first. Failed points are kept as such."""
        surroundings = Surroundings()  # before the first point: leaks of a point must not become the baseline
        with Progress(total=len(self.points), unit="point", line_interval_s=0.0) as bar:
            for members in self._groups.values():
                for point in members:
                    bar.set_description(point.label)
                    if not self._is_done(point, results):
                        results.append(self._measured(point, results, surroundings))
                    bar.update()

    def records(self, results: Results) -> list[tuple[Point, Record]]:
        """The tried points in the order of the grid, with their records."""
        return [(point, results.records[point.key]) for point in self.points if point.key in results]

    def outcomes(self, results: Results) -> list[Outcome]:
        """The outcome of every check of every point."""
        found = {point.key: record for point, record in self.records(results)}
        ordered = [
            (point.label, point.group, found[point.key])
            for members in self._groups.values()
            for point in members
            if point.key in found
        ]
        return check_points(ordered, self.checks)

    # ---- inside

    def _reference_of(self, point: Point) -> Point | None:
        """The group's point of fewest ranks; None if the point is alone or tokens are not checked."""
        members = self._groups[point.group]
        return members[0] if self.checks.tokens and len(members) > 1 else None

    def _is_done(self, point: Point, results: Results) -> bool:
        """Whether a point was measured before and its record suffices for the checks."""
        record = results.records.get(point.key)
        if record is None or "error" in record:
            return False
        reference = self._reference_of(point)
        if reference is None:
            return True
        if len(record["token_ids"]) < self._compared(point):
            return False
        if reference is point:
            return len(record.get("reference", {}).get("token_ids", ())) >= self._compared(point)
        return record["dtype"] == "float32" or record.get("compared_with") == reference.key

    def _compared(self, point: Point) -> int:
        return min(self.checks.compared_prompts, point.workload.num_prompts or 0)

    def _measured(self, point: Point, results: Results, surroundings: Surroundings) -> Record:
        reference = self._reference_of(point)
        given = results.records.get(reference.key) if reference is not None and reference is not point else None
        named: Record = {"key": point.key, "point": point.axes, "settings": point.settings}
        try:
            found = measure(
                point,
                self._open_engine,
                surroundings,
                self._compared(point),
                makes_reference=reference is point,
                reference=given if given is not None and "reference" in given else None,
            )
        except Exception as error:  # the other points go on
            logger.exception("%s failed", point.label)
            found = {"error": f"{type(error).__name__}: {error}"}
        try:
            left = surroundings.left_behind()  # the exception and its frames, which hold the engine, are gone by now
        except Exception as error:
            logger.exception("%s: looking for leaks failed", point.label)
            left = [f"unknown: {type(error).__name__}: {error}"]
        return named | found | {"left_behind": left}


def source_hash(package: Path) -> str:
    """Hash of the paths and contents of all Python files below a folder and its symlinked folders: 12 hex digits."""
    names = (Path(folder) / name for folder, _, files in os.walk(package, followlinks=True) for name in files)
    digest = hashlib.sha256()
    for path in sorted(name for name in names if name.suffix == ".py"):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12]


def identity() -> dict[str, Any]:
    """The code and the machine, which all points of a directory share so that their numbers are comparable.

    The sources are hashed, as installed packages have no commit and a commit does not include local changes.
    """
    common = {name: value for name, value in environment().items() if name != "command"}
    return {"kind": "scaling", "sources": source_hash(Path(__file__).resolve().parents[2])} | common


def _check_model(point: Point) -> None:
    engine = point.engine
    try:
        model = ModelConfig.from_pretrained(resolve_checkpoint(engine.model, engine.load_format))
        check_divisibility(model, engine.tensor_parallel_size)
        layer_configs(engine.resolve_sparse(), model.num_hidden_layers, engine.page_size)
        max_model_len = resolve_max_model_len(engine.max_model_len, model)
    except ValueError as error:
        raise ValueError(f"{point.label}: {error}") from None
    needed = point.workload.input_len + point.workload.output_len
    if needed > max_model_len:
        raise ValueError(
            f"{point.label}: input_len + output_len = {needed} tokens are over max_model_len={max_model_len}; "
            "raise it, or leave it out"
        )
