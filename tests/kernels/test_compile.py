"""Every Triton kernel compiles ahead of time, without a GPU, for what it specialises on, and spills no register.

The interpreter accepts what the compiler refuses; this is where that shows.
"""

from __future__ import annotations

import re
import struct

import pytest
import torch
from torch import Tensor

from distributed_sparse.kernels.attend.count_attended_triton import count_attended_triton
from distributed_sparse.kernels.cache.append_triton import append_triton, rotary_append_triton
from distributed_sparse.kernels.cache.whole_rows_triton import whole_rows_triton
from distributed_sparse.kernels.hash.hamming_scores_triton import hamming_scores_triton
from distributed_sparse.kernels.hash.signatures_triton import append_signatures_triton, pack_signs_triton
from distributed_sparse.kernels.layer.rms_norm_triton import add_rms_norm_triton, rms_norm_triton
from distributed_sparse.kernels.quest.page_scores_triton import page_scores_triton
from distributed_sparse.kernels.quest.top_k_pages_triton import top_k_pages_triton
from distributed_sparse.kernels.twilight.int4_logits_triton import int4_logits_triton
from distributed_sparse.kernels.twilight.top_p_triton import top_p_triton
from distributed_sparse.kernels.vattention.residual_statistics import ResidualStatistics
from distributed_sparse.kernels.vattention.residual_statistics_triton import residual_statistics_triton
from distributed_sparse.kernels.vattention.sample_plan import GUARANTEES
from distributed_sparse.kernels.vattention.sample_plan_triton import plan_pilot_triton, plan_samples_triton
from distributed_sparse.kernels.vattention.sample_residual_triton import sample_residual_triton
from tests.support.grids import corners
from tests.support.kernels import ARCHITECTURES, assert_compiles, compile_launches

HEAD_DIMS = corners([64, 96, 128, 256], kept=(64, 256))
DTYPES = corners([torch.float32, torch.float16, torch.bfloat16], kept=(torch.float32, torch.bfloat16))
BITS = corners([2, 4, 8], kept=(4,))

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
@pytest.mark.parametrize("dim", corners([64, 96, 128, 256, 2048, 4096, 5120, 16384], kept=(96, 4096, 16384)))
def test_rms_norm_compiles(architecture, dim, dtype):
    x, weight = torch.zeros(2, dim, dtype=dtype), torch.zeros(dim, dtype=dtype)
    if dim <= 256:  # the norm of queries and keys, which have no residual
        assert_compiles(rms_norm_triton, x.view(1, 2, dim), weight, 1e-6, architecture=architecture)
    else:
        assert_compiles(add_rms_norm_triton, x, x, weight, 1e-6, architecture=architecture)
        assert_compiles(rms_norm_triton, x, weight, 1e-6, architecture=architecture)


def low_bit_copy(bits: int, dim: int, heads: int = 8) -> tuple[Tensor, Tensor]:
    codes = torch.zeros(5, heads, 16, dim * bits // 8, dtype=torch.uint8)
    return codes, torch.zeros(5, heads, 16, 2, dtype=torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_append_with_a_low_bit_copy_compiles(architecture, dim, bits, dtype):
    k, pages = torch.zeros(3, 8, dim, dtype=dtype), torch.zeros(5, 8, 16, dim, dtype=dtype)
    batch = (k, k, integers(3), integers(3), integers(3), integers(3), pages, pages)
    page_min_max, offset = torch.zeros(5, 8, 2, dim, dtype=dtype), torch.zeros(8, dim)
    assert_compiles(append_triton, *batch, page_min_max, *low_bit_copy(bits, dim), offset, architecture=architecture)
    assert_compiles(append_triton, *batch, None, *low_bit_copy(bits, dim), architecture=architecture)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", corners([1, 4, 5], kept=(5,)))
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_rotary_append_compiles(architecture, dim, group, dtype):
    q, k = torch.zeros(3, 8 * group, dim, dtype=dtype), torch.zeros(3, 8, dim, dtype=dtype)
    angle, pages = torch.zeros(3, dim // 2), torch.zeros(5, 8, 16, dim, dtype=dtype)
    batch = (q, k, k, angle, angle, integers(3), integers(3), integers(3), integers(3), pages, pages)
    assert_compiles(rotary_append_triton, *batch, architecture=architecture)
    page_min_max = torch.zeros(5, 8, 2, dim, dtype=dtype)
    assert_compiles(rotary_append_triton, *batch, page_min_max, architecture=architecture, return_keys=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_rotary_append_with_a_low_bit_copy_compiles(architecture, dim, bits, dtype):
    q, k = torch.zeros(3, 32, dim, dtype=dtype), torch.zeros(3, 8, dim, dtype=dtype)
    angle, pages = torch.zeros(3, dim // 2), torch.zeros(5, 8, 16, dim, dtype=dtype)
    batch = (q, k, k, angle, angle, integers(3), integers(3), integers(3), integers(3), pages, pages)
    page_min_max, offset = torch.zeros(5, 8, 2, dim, dtype=dtype), torch.zeros(8, dim)
    metadata = (page_min_max, *low_bit_copy(bits, dim), offset)
    assert_compiles(rotary_append_triton, *batch, *metadata, architecture=architecture)
    assert_compiles(rotary_append_triton, *batch, None, *low_bit_copy(bits, dim), architecture=architecture)


def test_no_product_of_the_rotation_is_fused_into_its_sum(architecture):
    """A fused one rounds once instead of twice: other bits than the CPU's."""
    q, pages, angle = torch.zeros(3, 8, 64), torch.zeros(5, 8, 16, 64), torch.zeros(3, 32)
    batch = (q, q, q, angle, angle, *[integers(3)] * 4, pages, pages)
    (launch,) = compile_launches(rotary_append_triton, *batch, architecture=architecture)
    assert "mul.f32" in launch.ptx.replace(".rn", "") and "fma" not in launch.ptx


def test_keys_are_quantised_by_ieee_division_alone(architecture):
    """An approximate one gives other codes than the CPU, for keys near halfway between two."""
    k, pages = torch.zeros(3, 8, 64), torch.zeros(5, 8, 16, 64)
    columns = [integers(3)] * 4
    arguments = (k, k, *columns, pages, pages, None, *low_bit_copy(4, 64))
    (launch,) = compile_launches(append_triton, *arguments, architecture=architecture)
    assert "div.rn.f32" in launch.ptx and "div.full" not in launch.ptx and "rcp.approx" not in launch.ptx


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_int4_logits_compiles(architecture, dim, bits, dtype):
    rows = (integers(2, 8, 128), integers(2, 8), integers(2))
    q = torch.zeros(2, 32, dim, dtype=dtype)
    assert_compiles(int4_logits_triton, q, *low_bit_copy(bits, dim), *rows, 0.125, architecture=architecture)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", corners([1, 8, 9, 16], kept=(1, 9)))
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_int4_logits_compiles_for_every_kind_of_group(architecture, dim, group, dtype):
    rows = (integers(2, 2, 128), integers(2, 2), integers(2))
    q = torch.zeros(2, 2 * group, dim, dtype=dtype)
    assert_compiles(int4_logits_triton, q, *low_bit_copy(4, dim, heads=2), *rows, 0.125, architecture=architecture)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bits", "dim"), [(2, 128), (4, 64), (4, 96), (4, 128), (4, 256)])
def test_codes_become_numbers_where_they_are_loaded_and_without_conversions(architecture, bits, dim, dtype):
    """Converting integers, or moving the numbers between threads, takes longer than reading the codes."""
    rows = (integers(2, 8, 128), integers(2, 8), integers(2))
    q = torch.zeros(2, 32, dim, dtype=dtype)
    (launch,) = compile_launches(int4_logits_triton, q, *low_bit_copy(bits, dim), *rows, 0.125, architecture=architecture)
    assert not re.search(r"cvt\.r[nz]\.b?f(16|32)\.[us]\d", launch.ptx)
    assert launch.shared < 64 * 16 * 4  # the words of one step


def test_float32_estimates_take_no_tf32_product(architecture):
    rows = (integers(2, 8, 128), integers(2, 8), integers(2))
    q = torch.zeros(2, 32, 128)
    launches = compile_launches(int4_logits_triton, q, *low_bit_copy(4, 128), *rows, 0.125, architecture=architecture)
    assert all("fma.rn.f32" in launch.ptx and "tf32" not in launch.ptx for launch in launches)


@pytest.mark.parametrize("page_size", corners([16, 32, 64], kept=(16, 64)))
@pytest.mark.parametrize("group", corners([1, 3, 4, 8, 16], kept=(1, 3, 16)))
def test_top_p_compiles_for_every_kind_of_group(architecture, group, page_size):
    rows = (torch.zeros(2, 2 * group, 8 * page_size), integers(2, 2, 8), integers(2, 2), integers(2))
    forced = {"page_size": page_size, "sink_pages": 1, "recent_pages": 1}
    assert_compiles(top_p_triton, *rows, 0.95, **forced, architecture=architecture)


def test_top_k_pages_of_counts_compiles(architecture):
    rows = (integers(2, 8, 32768), integers(2, 32768), integers(2), integers(2))
    forced = {"sink_pages": 1, "recent_pages": 1, "capacity": 1024}
    assert_compiles(top_k_pages_triton, *rows, **forced, architecture=architecture)


@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("of_pages", [False, True])
def test_sample_residual_compiles(architecture, page_size, of_pages):
    rows = (integers(2, 8, 200), integers(2, 8), integers(2, 128), integers(2), integers(2, 8))
    key = torch.zeros(4, 2, dtype=torch.int64)
    options = {"block_tokens": page_size if of_pages else 1, "page_size": page_size, "layer": 3, "first_kv_head": 8, "draw": 1}
    assert_compiles(sample_residual_triton, *rows, key, **options, capacity=1500, architecture=architecture)


def pilot(dim: int, dtype: torch.dtype, page_size: int = 16, group: int = 4) -> tuple[Tensor, ...]:
    """The arguments of residual_statistics up to ``partial``."""
    q, pages = torch.zeros(2, 2 * group, dim, dtype=dtype), torch.zeros(5, 2, page_size, dim, dtype=dtype)
    return q, pages, pages, integers(2, 2, 700), integers(2, 2), integers(2, 2)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_residual_statistics_compiles(architecture, dim, dtype, centred):
    partial = (torch.zeros(2, 8, dim), torch.zeros(2, 8))
    arguments = (*pilot(dim, dtype), partial, 0.125)
    assert_compiles(residual_statistics_triton, *arguments, centred=centred, architecture=architecture)


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("group", [1, 5, 16])
def test_residual_statistics_compiles_for_every_kind_of_group(architecture, group, page_size):
    partial = (torch.zeros(2, 2 * group, 128), torch.zeros(2, 2 * group))
    arguments = (*pilot(128, torch.bfloat16, page_size, group), partial, 0.125)
    assert_compiles(residual_statistics_triton, *arguments, centred=True, architecture=architecture)


def test_float32_statistics_take_no_tf32_product(architecture):
    """TF32 would leave three digits of the covariance's squares."""
    arguments = (*pilot(128, torch.float32), (torch.zeros(2, 8, 128), torch.zeros(2, 8)), 0.125)
    (launch,) = compile_launches(residual_statistics_triton, *arguments, centred=True, architecture=architecture)
    assert "tf32" not in launch.ptx


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "words"), [(1, 1), (4, 1), (5, 3), (16, 32)])
def test_signatures_and_hamming_scores_compile(architecture, group, words, dtype):
    x, signatures = torch.zeros(3, 2 * group, 32 * words, dtype=dtype), integers(5, 2, 16, group, words)
    runs = [integers(3)] * 4
    assert_compiles(pack_signs_triton, x, architecture=architecture)
    assert_compiles(append_signatures_triton, x, *runs, signatures, architecture=architecture)
    queries = integers(2, 2 * group, words)
    assert_compiles(hamming_scores_triton, queries, signatures, integers(2, 128), integers(2), architecture=architecture)


@pytest.mark.parametrize("page_size", [16, 64])
def test_count_attended_compiles(architecture, page_size):
    counters, counts = torch.zeros(3, 8, dtype=torch.int64), integers(5, 8)
    rows = (*counters, counts, integers(5), integers(5), page_size)
    assert_compiles(count_attended_triton, *rows, architecture=architecture)
    every = dict.fromkeys(("num_tokens", "partial_num_pages", "partial_num_tokens", "extra_tokens_read"), counts)
    assert_compiles(count_attended_triton, *rows, **every, architecture=architecture)


@pytest.mark.parametrize("guarantee", GUARANTEES)
@pytest.mark.parametrize("group", [1, 4, 16])
def test_plans_of_samples_compile(architecture, group, guarantee):
    statistics = ResidualStatistics(*torch.ones(7, 2, 8 * group).unbind(0))
    counts, lens = (integers(2, 8),) * 3, (integers(2),) * 2
    settings = {"guarantee": guarantee, "epsilon": 0.1, "delta": 0.1, "min_context": 0, "max_sample": None}
    lse = torch.ones(2, 8 * group)
    assert_compiles(plan_samples_triton, statistics, lse, *counts, *lens, **settings, architecture=architecture)


@pytest.mark.parametrize("block_tokens", [1, 16])
def test_plans_of_pilots_compile_and_multiply_in_float64(architecture, block_tokens):
    """A float argument of a kernel is float32: the host's own count of a pilot would differ."""
    settings = {"block_tokens": block_tokens, "base_fraction": 0.02}
    (launch,) = compile_launches(plan_pilot_triton, integers(2, 8), integers(2), **settings, architecture=architecture)
    assert f"0d{struct.pack('>d', 0.02).hex().upper()}" in launch.ptx


def test_whole_rows_compiles(architecture):
    assert_compiles(whole_rows_triton, integers(2, 8), integers(2), integers(2), 100, architecture=architecture)
