"""methods: the methods that an evaluation compares, parsed from the command line, and the controls of each."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from distributed_sparse.selection import layer_configs, policy_class, resolve_sparse_config
from distributed_sparse.selection.base import SparseConfig
from distributed_sparse.selection.dense import DenseConfig
from distributed_sparse.utils.validation import check_int, shown

Settings = dict[str, Any]
"""A `sparse:` section."""

COMMON = ("dense_layers", "min_context", "sink_pages", "recent_pages")
"""Keys of every method; the configuration's values apply to all methods."""
CONTROLS = ("window", "random", "oracle_topk")


def parse_methods(
    texts: Sequence[str], budgets: Sequence[int] = (), sweeps: Sequence[str] = (), base: Mapping[str, Any] | None = None
) -> list[Settings]:
    """Parse `--methods`, `--budgets` and `--sweep` into the settings of each run, in order, without duplicates.

    Args:
        texts: each a comma-separated list of names ("quest,twilight"), or a YAML object ("{method: vattention, epsilon: 0.05}")
            or list of objects and names.
        budgets: one run for each, of every method that has a token_budget and does not set its own.
        sweeps: "twilight.p=0.85,0.95": one run for each value; several sweeps of one method are combined.
        base: the configuration's `sparse:` section; its common keys apply to all methods, the others to its own method.

    Raises:
        ValueError: a wrong method, key, value, budget or sweep.
    """
    base = base or {}
    swept = _parse_sweeps(sweeps)
    found: dict[str, Settings] = {}
    seen = set()
    for given in _given(texts):
        settings = _with_base(given, base)
        seen.add(settings["method"])
        own_sweeps = swept.get(settings["method"], {})
        for chosen in itertools.product(*own_sweeps.values()):
            values = dict(zip(own_sweeps, chosen))
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
        try:  # names and objects separated by commas are a YAML list without its brackets
            items = yaml.safe_load(text if text.lstrip().startswith("[") else f"[{text}]")
        except yaml.YAMLError as error:
            raise ValueError(f"--methods {text!r} is not YAML ({error}); write '{{method: quest, token_budget: 64}}'") from None
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


def _with_base(given: Settings, base: Mapping[str, Any]) -> Settings:
    """Settings with the keys that the method inherits from the configuration's section."""
    own = base
    if base.get("method") != given["method"]:
        config = policy_class(given["method"]).config_class
        # a method whose default differs (tova's sink_pages) accepts only that value
        common = [key for key in COMMON if getattr(config, key) == getattr(SparseConfig, key)]
        own = {key: base[key] for key in common if key in base}
    return {"method": given["method"], **{key: value for key, value in own.items() if key != "method"}, **given}


def _budgets(settings: Settings, budgets: Sequence[int], explicit: bool) -> list[Settings]:
    """The token budgets to run, as settings; [{}] for a method without one."""
    if not hasattr(policy_class(settings["method"]).config_class, "token_budget"):
        return [{}]
    if explicit or not budgets:
        return [{"token_budget": resolve_sparse_config(settings).token_budget}]  # type: ignore[attr-defined]
    return [
        {"token_budget": check_int("--budgets", budget, 1, remedy="give tokens per KV head and step")} for budget in budgets
    ]


def controls_of(settings: Settings, attended: float, page_size: int) -> list[Settings]:
    """The controls that attend as many tokens as a run of `settings` did; for a method without a budget, Quest too.

    Args:
        attended: mean tokens that a (sequence, KV head) row attended in the layers that select; rounded up to whole pages.
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
    """Whether the method has a fixed `token_budget`; adaptive methods do not."""
    return "token_budget" in settings


def selecting_layers(settings: Settings, num_layers: int, page_size: int) -> list[int]:
    """The layers that select; the others are dense with any method. All layers for `dense`."""
    configs = layer_configs(resolve_sparse_config(settings), num_layers, page_size)
    found = [layer for layer, config in enumerate(configs) if not isinstance(config, DenseConfig)]
    return found or list(range(num_layers))


def settings_key(settings: Settings) -> str:
    """A short unique name of settings, independent of the order of their keys."""
    return f"{settings['method']}-{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]}"


def label(settings: Settings) -> str:
    """A run's name in tables: `quest 128`, `vattention epsilon=0.05`."""
    own = [f"{key}={value}" for key, value in settings.items() if key not in ("method", "token_budget", "layers", *COMMON)]
    own += ["layers"] if settings.get("layers") else []
    budget = [str(settings["token_budget"])] if has_budget(settings) else []
    return " ".join([settings["method"], *budget, *own])
