"""grid: the points of a scaling YAML, each a complete set of settings."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from distributed_sparse.config import EngineConfig, read_yaml, set_override
from distributed_sparse.selection import policy_class
from distributed_sparse.tools.evaluation.methods import label
from distributed_sparse.tools.scaling.checks import Checks
from distributed_sparse.tools.scaling.grid_workload import Workload
from distributed_sparse.utils.validation import check_int, check_keys, shown

SECTIONS = ("base", "workload", "grid", "exclude", "checks")
SHORT = {"context": "workload.input_len", "batch": "workload.batch", "token_budget": "sparse.token_budget"}
"""Short names of axes."""
PLACEMENT = ("tensor_parallel_size", "distributed_executor_backend", "startup_timeout_s", "step_timeout_s")
"""Engine settings that, like `nodes`, do not change the tokens."""


@dataclass(frozen=True)
class Point:
    """One engine and its workload.

    Attributes:
        engine: its settings, complete.
        workload: the requests.
        nodes: nodes on which its ranks must be placed; None: any number.
        axes: the point's place in the grid for tables: axis -> value as text.
    """

    engine: EngineConfig
    workload: Workload
    nodes: int | None = None
    axes: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def settings(self) -> dict[str, Any]:
        """All settings on which the results depend, as plain JSON."""
        return {"engine": asdict(self.engine), "workload": asdict(self.workload), "nodes": self.nodes}

    @property
    def key(self) -> str:
        """A unique name of the settings."""
        return digest(self.settings)

    @property
    def group(self) -> str:
        """A name shared by points that differ only in placement and so must generate the same tokens."""
        engine = {name: value for name, value in asdict(self.engine).items() if name not in PLACEMENT}
        return digest({"engine": engine, "workload": asdict(self.workload)})

    @property
    def label(self) -> str:
        return ", ".join(f"{axis}={value}" for axis, value in self.axes.items()) or "the only point"


@dataclass(frozen=True)
class ScalingConfig:
    """A scaling YAML: its distinct points in the order of the grid (last axis fastest), and its checks."""

    points: list[Point]
    checks: Checks

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> ScalingConfig:
        """Read `base` (keys of EngineConfig), `workload`, `grid` (axis -> values), `exclude` and `checks`.

        Args:
            path: the YAML file.
            overrides: "key=value" texts, dots descend: "workload.output_len=16", "grid.tensor_parallel_size=[1]".

        Raises:
            ValueError: an unknown key or axis (with the nearest valid one), or a wrong value, of any point.
        """
        given = read_yaml(path)
        for override in overrides:
            set_override(given, override)
        return cls.from_dict(given, os.fspath(path))

    @classmethod
    def from_dict(cls, given: Mapping[str, Any], where: str) -> ScalingConfig:
        """`from_yaml` with a mapping; `where` names its origin in errors."""
        check_keys(given, SECTIONS, where)
        sections = {name: _section(given, name, where) for name in ("base", "workload", "grid", "checks")}
        base, workload, grid = sections["base"], sections["workload"], sections["grid"]
        check_keys(base, _names(EngineConfig), f"{where}: base")
        check_keys(workload, _names(Workload), f"{where}: workload")
        check_keys(grid, _axes(base, grid), f"{where}: grid")
        for axis, values in grid.items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"{where}: grid.{axis}={shown(values)} must be a list of values; write {axis}: [...]")
        exclude = _exclude(given.get("exclude"), grid, where)
        points: dict[str, Point] = {}
        for values in itertools.product(*grid.values()):
            chosen = {axis: _method(value) if axis == "sparse" else value for axis, value in zip(grid, values)}
            chosen = _that_apply(base, chosen)
            if any(_matches(chosen, one) for one in exclude):
                continue
            try:
                point = _point(base, workload, chosen)
            except ValueError as error:
                raise ValueError(f"{where}: {error}, at {', '.join(f'{a}={shown(v)}' for a, v in chosen.items())}") from None
            points.setdefault(point.key, point)
        if not points:
            raise ValueError(f"{where}: exclude leaves no point; take an entry out")
        return cls(list(points.values()), Checks.from_dict(sections["checks"], f"{where}: checks"))


def digest(settings: Any) -> str:
    """A short name for settings, independent of the order of their keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _names(of: type) -> list[str]:
    return [f.name for f in fields(of)]


def _section(given: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    section = given.get(name)
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise ValueError(f"{where}: {name}={shown(section)} must be a mapping; write {name}: {{key: value}}")
    return section


def _axes(base: Mapping[str, Any], grid: Mapping[str, Any]) -> list[str]:
    """Every valid axis: keys of the engine, of the workload, and of the grid's methods."""
    methods = [_method(one) for one in grid["sparse"]] if isinstance(grid.get("sparse"), list) else [base.get("sparse")]
    of_methods = [name for sparse in methods for name in _method_keys(sparse)]
    keys = [f"workload.{name}" for name in _names(Workload)] + [f"sparse.{name}" for name in dict.fromkeys(of_methods)]
    return [*_names(EngineConfig), "nodes", *SHORT, *keys]


def _method(value: Any) -> dict[str, Any]:
    """A `sparse:` section, from a method's name or a mapping."""
    if isinstance(value, str):
        return {"method": value}
    if not isinstance(value, dict) or not isinstance(value.get("method"), str):
        raise ValueError(f"grid.sparse: {shown(value)} is no method; write quest, or {{method: quest, token_budget: 1024}}")
    return value


def _method_keys(sparse: Any) -> list[str]:
    method = sparse.get("method", "dense") if isinstance(sparse, dict) else "dense"
    return _names(policy_class(method).config_class)


def _that_apply(base: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The axes without keys that the point's method does not have: a dense point has no token_budget."""
    keys = _method_keys(chosen.get("sparse", base.get("sparse")))
    found = {}
    for axis, value in chosen.items():
        section, _, key = SHORT.get(axis, axis).rpartition(".")
        if section != "sparse" or key in keys:
            found[axis] = value
    return found


def _exclude(entries: Any, grid: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    if entries is None:
        return []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and entry for entry in entries):
        raise ValueError(f"{where}: exclude={shown(entries)} must be a list of mappings; write [{{context: 8192, batch: 64}}]")
    for entry in entries:
        check_keys(entry, grid, f"{where}: exclude")
    return entries


def _matches(chosen: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    """Whether a point has all values of an entry (for a list, one of them). A method's name matches any of its settings."""

    def same(axis: str, value: Any) -> bool:
        if axis == "sparse" and isinstance(value, str):
            return chosen[axis]["method"] == value
        return chosen[axis] == value

    return all(
        axis in chosen and any(same(axis, value) for value in (wanted if isinstance(wanted, list) else [wanted]))
        for axis, wanted in entry.items()
    )


def _point(base: Mapping[str, Any], workload: Mapping[str, Any], chosen: Mapping[str, Any]) -> Point:
    """The settings of a point. max_num_seqs and max_model_len default to what the workload needs."""
    engine, load, nodes = dict(base), dict(workload), None
    if isinstance(chosen.get("sparse"), dict):
        engine["sparse"] = chosen["sparse"]
    for axis, value in chosen.items():
        section, _, key = SHORT.get(axis, axis).rpartition(".")
        if section == "workload":
            load[key] = value
        elif section == "sparse":
            engine["sparse"] = {**(engine.get("sparse") or {"method": "dense"}), key: value}
        elif axis == "nodes":
            nodes = check_int("nodes", value, 1, remedy="give the number of nodes for the ranks")
        elif axis != "sparse":
            engine[axis] = value
    settled = Workload.from_dict(load, "workload")
    engine.setdefault("max_num_seqs", settled.batch)
    engine.setdefault("max_model_len", settled.input_len + settled.output_len)
    if engine.setdefault("profile_interval", None) is not None:
        raise ValueError(
            f"profile_interval={shown(engine['profile_interval'])} would time the parts of steps whose latencies are measured; "
            "leave it out: a separate batch is profiled afterwards"
        )
    config = EngineConfig.from_dict(engine, "base")
    config.resolve_sparse()
    if config.max_num_seqs < settled.batch:
        raise ValueError(f"max_num_seqs={config.max_num_seqs} is below batch={settled.batch}; raise it, or leave it out")
    texts = {
        axis: label(value) if isinstance(value, dict) and "method" in value else str(value) for axis, value in chosen.items()
    }
    return Point(config, settled, nodes, texts)
