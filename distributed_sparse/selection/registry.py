"""registry: all sparse methods by name; turns the `sparse:` section of a config into one policy per layer."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import msgspec

from distributed_sparse.cache import Geometry
from distributed_sparse.selection.base import Policy, SparseConfig, named_class
from distributed_sparse.selection.dense import DenseConfig, DensePolicy
from distributed_sparse.selection.hash import HashPolicy
from distributed_sparse.selection.oracle import OraclePolicy
from distributed_sparse.selection.quest import QuestPolicy
from distributed_sparse.selection.random import RandomPolicy
from distributed_sparse.selection.sketch import SketchPolicy
from distributed_sparse.selection.tova import TovaPolicy
from distributed_sparse.selection.twilight import TwilightPolicy
from distributed_sparse.selection.vattention import VAttentionPolicy
from distributed_sparse.selection.window import WindowPolicy
from distributed_sparse.utils.validation import check_keys

POLICIES: dict[str, type[Policy]] = {
    policy.config_class.method: policy
    for policy in (
        DensePolicy,
        QuestPolicy,
        SketchPolicy,
        TwilightPolicy,
        VAttentionPolicy,
        HashPolicy,
        WindowPolicy,
        TovaPolicy,
        RandomPolicy,
        OraclePolicy,
    )
}


def policy_class(method: str) -> type[Policy]:
    """The policy class of a method: one of `POLICIES`, or the import path "package.module:Policy".

    Raises:
        ValueError: there is no such method, or it cannot be imported on this node.
    """
    return named_class("sparse.method", method, POLICIES, Policy)


def resolve_sparse_config(sparse: dict[str, Any] | None) -> SparseConfig:
    """The typed config of a `sparse:` section; None is dense.

    Raises:
        ValueError: unknown method or key (names the nearest valid one), wrong type or value.
    """
    if sparse is None:
        return DenseConfig()
    if "method" not in sparse:
        raise ValueError(f"sparse has no method; use one of {', '.join(POLICIES)} or 'package.module:Policy'")
    settings = {key: value for key, value in sparse.items() if key != "method"}
    if sparse["method"] == "quest" and settings.get("bound") == "minmax":
        del settings["bound"]
        warnings.warn("sparse.bound was removed, as it had only one value; leave it out", FutureWarning, stacklevel=2)
    config = _typed(policy_class(sparse["method"]).config_class, settings, "sparse")
    for override in config.layers:
        _override(config, override)
    return config


def layer_configs(config: SparseConfig, num_layers: int, page_size: int) -> list[SparseConfig]:
    """Each layer's config: `config` with the overrides of `layers`; the first `dense_layers` layers are dense.

    Raises:
        ValueError: an override goes beyond the last layer, or covers only layers that are dense anyway; or settings do not
            work with this page size.
    """
    configs = [config] * num_layers
    for override in config.layers:
        first, last = layer_range(override)
        if last >= num_layers:
            raise ValueError(
                f"sparse.layers range {override['range']!r} goes beyond the model's last layer, {num_layers - 1}; shorten it"
            )
        configs[first : last + 1] = [_override(own, override) for own in configs[first : last + 1]]
        below = all(layer < configs[layer].dense_layers for layer in range(first, last + 1))
        if below and "dense_layers" not in override:
            raise ValueError(
                f"sparse.layers range {override['range']!r} lies below dense_layers={configs[first].dense_layers}: "
                "it would change nothing; set dense_layers: 0 beside it, or in it"
            )
    configs = [DenseConfig() if layer < own.dense_layers else own for layer, own in enumerate(configs)]
    for own in configs:
        own.check(page_size)
    return configs


def build_policies(method: str, config: SparseConfig, num_layers: int, geometry: Geometry) -> list[Policy]:
    """One policy per layer; layers with equal configs share one. Raises like `layer_configs`."""
    made: list[tuple[SparseConfig, Policy]] = []
    policies: list[Policy] = []
    for own in layer_configs(config, num_layers, geometry.page_size):
        policy = next((policy for known, policy in made if type(known) is type(own) and known == own), None)
        if policy is None:
            kind = DensePolicy if isinstance(own, DenseConfig) else policy_class(method)
            policy = kind(own, geometry)
            made.append((own, policy))
        policies.append(policy)
    return policies


def layer_range(override: dict[str, Any]) -> tuple[int, int]:
    """First and last layer of an override's `range`, "2-15" or "7"."""
    text = str(override.get("range", ""))
    first, _, last = text.partition("-")
    if not first.isdigit() or not (last or first).isdigit() or int(last or first) < int(first):
        raise ValueError(f"sparse.layers range {text!r} is not understood; write '2-15', first and last layer included")
    return int(first), int(last or first)


def _override(config: SparseConfig, override: dict[str, Any]) -> SparseConfig:
    layer_range(override)
    if "layers" in override:
        raise ValueError("sparse.layers: an override cannot have layers of its own; write another entry with its range")
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name != "layers"}
    return _typed(type(config), settings | {k: v for k, v in override.items() if k != "range"}, "sparse.layers")


def _typed(config_class: type[SparseConfig], settings: dict[str, Any], where: str) -> SparseConfig:
    check_keys(settings, [field.name for field in dataclasses.fields(config_class)], where)
    try:
        return msgspec.convert(settings, config_class)
    except msgspec.ValidationError as error:
        named = str(error).startswith("sparse.")  # raised by the config's own checks
        raise ValueError(str(error) if named else f"{where}: {error}") from error
