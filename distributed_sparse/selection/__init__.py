"""Sparse methods, one per file. `base` is the contract, `top_k` ranks pages or tokens by score, `registry` lists them."""

from distributed_sparse.selection.base import SparseConfig
from distributed_sparse.selection.registry import (
    POLICIES,
    build_policies,
    layer_configs,
    layer_range,
    policy_class,
    resolve_sparse_config,
)

__all__ = [
    "POLICIES",
    "SparseConfig",
    "build_policies",
    "layer_configs",
    "layer_range",
    "policy_class",
    "resolve_sparse_config",
]
