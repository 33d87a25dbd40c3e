"""rms_norm: root-mean-square layer norm, with an optional residual addition before it."""

from __future__ import annotations

from torch import Tensor

from distributed_sparse.kernels.dispatch import op


@op
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = weight * (x / sqrt(mean(x^2) + eps)), over the last dimension (arXiv 1910.07467).

    As Hugging Face computes it: the norm in float32, rounded to x's dtype, then multiplied by ``weight``.

    Args:
        x: [..., D] float32 | float16 | bfloat16 (also [N, H, head_dim] for q/k norms; need not be contiguous).
        weight: [D], dtype of x.
        eps: added to the mean square.

    Returns:
        [..., D] in x's dtype.
    """


@op
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """residual = residual + x (in x's dtype), y = rms_norm(residual). Returns (y, residual). Shapes as in `rms_norm`."""
