"""combine: merge normalised partial attention results over disjoint sets of tokens by their log-sum-exp."""

from __future__ import annotations

from torch import Tensor


def combine(
    outs: Tensor, lses: Tensor, num_partials: Tensor, partial: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """out = sum_c e^(lse_c - m) out_c / sum_c e^(lse_c - m), summed in index order, ``partial`` last.

    Args:
        outs: float32 [R, C, G, d] normalised outputs of R rows; entries at and past ``num_partials[r]`` are undefined.
        lses: float32 [R, C, G]; -inf marks an empty partial (its output is undefined too).
        num_partials: int32 [R].
        partial: (float32 [R, G, d], float32 [R, G]) one more, merged last; lse -inf: none.

    Returns:
        out float32 [R, G, d], lse float32 [R, G]; 0 and -inf for a row of empty partials.
    """
    if outs.is_cuda:
        from distributed_sparse.kernels.attend_triton import combine_triton as impl
    else:
        from distributed_sparse.kernels.attend_torch import combine_torch as impl
    return impl(outs, lses, num_partials, partial)
