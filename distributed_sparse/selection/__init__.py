"""Sparse attention methods, one per file: `base` is the contract (`Policy`, `Selection`), `top_k` ranks by score (`Scorer`).

vLLM has no counterpart: a `Policy` chooses the KV cache entries that the attention backend reads. `registry` lists all methods.
"""

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
