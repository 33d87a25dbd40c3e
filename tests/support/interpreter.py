"""Triton's interpreter, with matrix products whose bits do not depend on the machine's BLAS."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process runs Triton kernels in the interpreter, on CPU tensors: the second of the two pytest processes."""


def sum_dots_in_order() -> None:
    """Replace numpy.matmul behind `tl.dot` by a sum over k in ascending order.

    On a GPU every row of a tile is summed alike. A BLAS may sum rows near a tile's edge in another order (OpenBLAS does with
    AVX2), and tests of equal bits would then test the BLAS.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        rows, columns = (operand.data.astype(d.data.dtype) for operand in (a, b))  # [.., M, K], [.., K, N]
        out = np.zeros_like(d.data)
        for k in range(rows.shape[-1]):
            out += rows[..., k, None] * columns[..., k, None, :]
        return TensorHandle(out + d.data, d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot
