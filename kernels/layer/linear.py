"""linear: matrix product with a layer's weights; memory-bound C++ for few rows on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distributed_sparse.kernels import native

FEW_ROWS = 16
"""Up to this many float32 rows, `linear.cpp` is faster than torch: it reads the weights once, with all threads."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias.

    Args:
        x: [N, in].
        weight: [out, in], contiguous, dtype of x.
        bias: [out] or None.

    Returns:
        [N, out], contiguous, in the dtype of x.
    """
    if x.dtype != torch.float32 or not 0 < len(x) <= FEW_ROWS or not native.serves(x):
        return F.linear(x, weight, bias)
    assert weight.is_contiguous()
    x, out = x.contiguous(), torch.empty(len(x), len(weight))
    native.run("linear_float32", x, weight, len(x), len(weight), weight.shape[1], out)
    return out if bias is None else out.add_(bias)
