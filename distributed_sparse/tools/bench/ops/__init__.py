"""The kernels that are timed: their inputs, the bytes that they must move, and their float64 references."""

from __future__ import annotations

from distributed_sparse.tools.bench.ops import attention, layer, sampling, selection
from distributed_sparse.tools.bench.ops.base import Op

OPS: dict[str, type[Op]] = {op.name: op for op in (*layer.OPS, *selection.OPS, *sampling.OPS, *attention.OPS)}
"""Op by name, in the order of the printed table."""
