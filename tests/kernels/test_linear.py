"""linear, in whatever form, is the product with the weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from distributed_sparse.kernels import native
from distributed_sparse.kernels.layer.linear import FEW_ROWS, linear


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("size", [96, 97, 99])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 4, 6, FEW_ROWS, FEW_ROWS + 1])
def test_it_is_x_times_the_weights_and_the_bias(
    threads: int, num_rows: int, size: int, has_bias: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(num_rows + size)
    x = torch.randn(num_rows, 64, generator=generator).to(dtype)
    weight = torch.randn(size, 64, generator=generator).to(dtype)
    bias = torch.randn(size, generator=generator).to(dtype) if has_bias else None
    expected = x.double() @ weight.double().T + (bias.double() if bias is not None else 0.0)
    out = linear(x, weight, bias)
    assert (out.shape, out.dtype, out.is_contiguous()) == ((num_rows, size), dtype, True)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), expected, atol=tolerance * 16, rtol=tolerance)


def test_rows_that_are_views_of_a_larger_tensor_are_read_as_they_lie(threads: int) -> None:
    x = torch.randn(2, 5, 64)[:, 2]
    weight = torch.randn(96, 64)
    torch.testing.assert_close(linear(x, weight), x.contiguous() @ weight.T, atol=1e-4, rtol=1e-5)


@pytest.mark.skipif(not native.serves(torch.empty(1, 16)), reason="a product of torch's promises no bits")
def test_a_row_has_the_same_bits_at_any_number_of_threads_and_beside_any_others() -> None:
    x, weight = torch.randn(FEW_ROWS, 1024), torch.randn(515, 1024)
    before = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found += [linear(x, weight)[5], linear(x[5:6], weight)[0], linear(x[3:8], weight)[2]]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)
