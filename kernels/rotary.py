"""rotary: rotary position embedding of queries and keys, in the half-rotation layout of Hugging Face."""

from __future__ import annotations

from torch import Tensor


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate channel pairs (i, i + d/2) of q and k by the angle of their token (RoFormer, arXiv 2104.09864).

    Args:
        q: [N, H_q, d]; k: [N, H_kv, d]; float32 | float16 | bfloat16; need not be contiguous (views of a fused qkv).
        cos, sin: float32 [N, d/2] of position * inverse frequency, the attention factor of the rope type folded in.

    Returns:
        New contiguous (q, k) in the dtype given; computed in float32 and rounded once.
    """
    if q.is_cuda:
        from distributed_sparse.kernels.rotary_triton import rotary_triton as impl
    else:
        from distributed_sparse.kernels.rotary_torch import rotary_torch as impl
    return impl(q, k, cos, sin)
