"""The methods that an evaluation compares: what the user asked for, and the controls that belong to each."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from distributed_sparse.config import EngineConfig
from distributed_sparse.selection import layer_configs, policy_class, resolve_sparse_config
from distributed_sparse.selection.base import SparseConfig
from distributed_sparse.selection.dense import DenseConfig
from distributed_sparse.utils.validation import check_int, shown

Settings = dict[str, Any]
"""A `sparse:` section."""

COMMON = ("dense_layers", "min_context", "sink_pages", "recent_pages")
"""Keys that every method has: the configuration's hold for all of them."""
CONTROLS = ("window", "random", "oracle_topk")


def parse_methods(
    texts: Sequence[str], budgets: Sequence[int] = (), sweeps: Sequence[str] = (), base: Mapping[str, Any] | None = None
) -> list[Settings]:
    """The settings of every run that the user asked for, in order, none twice.

    Args:
        texts: each a comma-separated list of names ("quest,twilight"), or a YAML object ("{method: vattention, epsilon: 0.05}")
            or list of objects and names.
        budgets: a run for each, of every method that has a token_budget and does not set its own.
        sweeps: "twilight.p=0.85,0.95": a run for each value, and for each combination of several sweeps of one method.
        base: the configuration's `sparse:` section: its common keys hold for all methods, the others for its own.

    Raises:
        ValueError: a method, key, value, budget or sweep that does not hold.
    """
    base = base or {}
    swept = _parse_sweeps(sweeps)
    found: dict[str, Settings] = {}
    seen = set()
    for given in _given(texts):
        settings = _with_base(given, base)
        seen.add(settings["method"])
        for values in _combinations(swept.get(settings["method"], {})):
            for budget in _budgets(settings | values, budgets, explicit="token_budget" in given | values):
                one = settings | values | budget
                resolve_sparse_config(one)
                found.setdefault(settings_key(one), one)
    for method in swept:
        if method not in seen:
            raise ValueError(f"--sweep {method}.{next(iter(swept[method]))}: --methods has no {method!r}; add it")
    return list(found.values())


def _given(texts: Sequence[str]) -> Iterator[Settings]:
    for text in texts:
        if text.lstrip().startswith(("{", "[")):
            try:
                parsed = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(
                    f"--methods {text!r} is not YAML ({error}); write '{{method: quest, token_budget: 64}}'"
                ) from None
            items: list[Any] = parsed if isinstance(parsed, list) else [parsed]
        else:
            items = [name.strip() for name in text.split(",") if name.strip()]
        for item in items:
            settings = {"method": item} if isinstance(item, str) else item
            if not isinstance(settings, dict) or not isinstance(settings.get("method"), str):
                raise ValueError(
                    f"--methods: {shown(item)} is no name and no object with a method; write quest, or {{method: quest}}"
                )
            yield settings


def _parse_sweeps(sweeps: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """Method -> key -> values."""
    found: dict[str, dict[str, list[Any]]] = {}
    for sweep in sweeps:
        path, equals, text = sweep.partition("=")
        method, dot, key = path.strip().rpartition(".")
        values = yaml.safe_load(f"[{text}]") if equals else []
        if not dot or not method or not key or not values:
            raise ValueError(f"--sweep {sweep!r} is not of the form method.key=value,value; write twilight.p=0.85,0.95")
        found.setdefault(method, {})[key] = values
    return found


def _combinations(values: dict[str, list[Any]]) -> Iterator[Settings]:
    for chosen in itertools.product(*values.values()):
        yield dict(zip(values, chosen))


def _with_base(given: Settings, base: Mapping[str, Any]) -> Settings:
    """What a method inherits of the configuration's section."""
    own = base
    if base.get("method") != given["method"]:
        config = policy_class(given["method"]).config_class
        # a method with a default of its own (tova's sink_pages) takes no other value
        common = [key for key in COMMON if getattr(config, key) == getattr(SparseConfig, key)]
        own = {key: base[key] for key in common if key in base}
    return {"method": given["method"], **{key: value for key, value in own.items() if key != "method"}, **given}


def _budgets(settings: Settings, budgets: Sequence[int], explicit: bool) -> list[Settings]:
    """The token budgets to run, as settings; one without any for a method that has none."""
    if not hasattr(policy_class(settings["method"]).config_class, "token_budget"):
        return [{}]
    if explicit or not budgets:
        return [{"token_budget": resolve_sparse_config(settings).token_budget}]  # type: ignore[attr-defined]
    return [
        {"token_budget": check_int("--budgets", budget, 1, remedy="give tokens per KV head and step")} for budget in budgets
    ]


def controls_of(settings: Settings, attended: float, page_size: int) -> list[Settings]:
    """The controls that attend as many tokens as a run of `settings` did; of a method without a budget, Quest, too.

    Args:
        attended: mean tokens per row that the run attended, in the layers that select; rounded up to whole pages.
    """
    common = {key: settings[key] for key in COMMON if key in settings}
    names = CONTROLS if has_budget(settings) else ("quest", *CONTROLS)
    found = []
    for name in names:
        own = resolve_sparse_config({"method": name, **common})
        pages = max(math.ceil(attended / page_size), own.sink_pages + own.recent_pages)
        found.append({"method": name, **common, "token_budget": pages * page_size})
    return [control for control in found if control["method"] != settings["method"]]


def has_budget(settings: Settings) -> bool:
    """Whether a method is told how many tokens to attend; an adaptive one finds out itself."""
    return "token_budget" in settings


def check_runs(config: EngineConfig, runs: Iterable[Settings], num_layers: int) -> None:
    """Refuse, before any engine is made, settings that do not hold for the model and page size."""
    for settings in runs:
        layer_configs(resolve_sparse_config(settings), num_layers, config.page_size)


def selecting_layers(settings: Settings, num_layers: int, page_size: int) -> list[int]:
    """The layers that select; the others are dense whatever the method is. All of them for `dense`."""
    configs = layer_configs(resolve_sparse_config(settings), num_layers, page_size)
    found = [layer for layer, config in enumerate(configs) if not isinstance(config, DenseConfig)]
    return found or list(range(num_layers))


def settings_key(settings: Settings) -> str:
    """A short name that tells settings apart, whatever the order of their keys."""
    return f"{settings['method']}-{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]}"


def label(settings: Settings) -> str:
    """How a table names a run: `quest 128`, `vattention epsilon=0.05`."""
    own = [f"{key}={value}" for key, value in settings.items() if key not in ("method", "token_budget", "layers", *COMMON)]
    own += ["layers"] if settings.get("layers") else []
    budget = [str(settings["token_budget"])] if has_budget(settings) else []
    return " ".join([settings["method"], *budget, *own])
