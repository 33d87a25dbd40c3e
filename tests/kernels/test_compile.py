"""Every Triton kernel compiles ahead of time, without a GPU, for what it specialises on, and spills no register.

The interpreter accepts what the compiler refuses; this is where that shows.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distributed_sparse.kernels.append_triton import append_triton
from distributed_sparse.kernels.page_scores_triton import page_scores_triton
from distributed_sparse.kernels.rms_norm_triton import add_rms_norm_triton, rms_norm_triton
from distributed_sparse.kernels.rotary_triton import rotary_triton
from distributed_sparse.kernels.top_k_pages_triton import top_k_pages_triton
from tests.support.kernels import ARCHITECTURES, assert_compiles, compile_launches

HEAD_DIMS = [64, 96, 128, 256]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

pytestmark = pytest.mark.parametrize("architecture", ARCHITECTURES)


def integers(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_append_compiles(architecture, dim, dtype):
    k, pages = torch.zeros(3, 8, dim, dtype=dtype), torch.zeros(5, 8, 16, dim, dtype=dtype)
    batch = (k, k, integers(3), integers(3), integers(3), integers(3), pages, pages)
    assert_compiles(append_triton, *batch, torch.zeros(5, 8, 2, dim, dtype=dtype), architecture=architecture)
    assert_compiles(append_triton, *batch, architecture=architecture)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_page_scores_compiles(architecture, dim, dtype):
    q, page_min_max = torch.zeros(2, 32, dim, dtype=dtype), torch.zeros(5, 8, 2, dim, dtype=dtype)
    assert_compiles(page_scores_triton, q, page_min_max, integers(2, 128), integers(2), architecture=architecture)


@pytest.mark.parametrize("group_reduction", ["max", "sum"])
@pytest.mark.parametrize("group", [1, 5, 16])
def test_page_scores_compiles_for_every_kind_of_group(architecture, group, group_reduction):
    q, page_min_max = torch.zeros(2, 2 * group, 128), torch.zeros(5, 2, 2, 128)
    table = integers(2, 128)
    assert_compiles(page_scores_triton, q, page_min_max, table, integers(2), group_reduction, architecture=architecture)


def test_float32_scores_take_no_tf32_product(architecture):
    """TF32 keeps ten bits of the mantissa: the scores would be no upper bound. The interpreter cannot show it."""
    q, page_min_max = torch.zeros(2, 8, 128), torch.zeros(5, 2, 2, 128)
    launches = compile_launches(page_scores_triton, q, page_min_max, integers(2, 128), integers(2), architecture=architecture)
    assert all("fma.rn.f32" in launch.ptx and "tf32" not in launch.ptx for launch in launches)


def test_append_keeps_the_addition_that_turns_minus_zero_into_zero(architecture):
    """A compiler that folded ``k + 0.0`` into ``k`` would leave the metadata dependent on the order of folding."""
    k, pages = torch.zeros(3, 8, 64), torch.zeros(5, 8, 16, 64)
    columns = [integers(3)] * 4
    (launch,) = compile_launches(append_triton, k, k, *columns, pages, pages, architecture=architecture)
    assert "add.f32" in launch.ptx.replace(".rn", "") and "0f00000000" in launch.ptx


@pytest.mark.parametrize("width", [40, 2048, 32768])
def test_top_k_pages_compiles(architecture, width):
    rows = (torch.zeros(2, 8, width), integers(2, width), integers(2), integers(2))
    forced = {"sink_pages": 1, "recent_pages": 1, "capacity": 128}
    assert_compiles(top_k_pages_triton, *rows, **forced, architecture=architecture)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 96, 128, 256, 2048, 4096, 5120, 16384])
def test_rms_norm_compiles(architecture, dim, dtype):
    x, weight = torch.zeros(2, dim, dtype=dtype), torch.zeros(dim, dtype=dtype)
    if dim <= 256:  # the norm of queries and keys, which have no residual
        assert_compiles(rms_norm_triton, x.view(1, 2, dim), weight, 1e-6, architecture=architecture)
    else:
        assert_compiles(add_rms_norm_triton, x, x, weight, 1e-6, architecture=architecture)
        assert_compiles(rms_norm_triton, x, weight, 1e-6, architecture=architecture)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_rotary_compiles(architecture, dim, dtype):
    q, k, angle = torch.zeros(2, 32, dim, dtype=dtype), torch.zeros(2, 8, dim, dtype=dtype), torch.zeros(2, dim // 2)
    assert_compiles(rotary_triton, q, k, angle, angle, architecture=architecture)
