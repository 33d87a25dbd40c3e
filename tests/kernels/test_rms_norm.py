"""rms_norm: transformers' values to rounding, over rows of any layout, with the residual added first where asked."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from distributed_sparse.kernels.reference import rms_norm_reference
from tests.support.kernels import TOLERANCE, assert_near

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(3, 64), (1, 100), (5, 3, 96), (7, 2, 128), (2, 5, 256), (2, 1, 3, 4096), (2, 5120), (1, 16384), (0, 64)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_norm_equals_the_reference(implementation, shape, dtype):
    torch.manual_seed(0)
    x, weight = (torch.randn(shape) * 3).to(dtype), (torch.rand(shape[-1]) + 0.5).to(dtype)
    y = implementation.function("rms_norm")(x.to(implementation.device), weight.to(implementation.device), 1e-5)
    assert y.dtype == dtype and y.is_contiguous()
    assert_near(y, rms_norm_reference(x, weight, 1e-5), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 64), (5, 1000), (2, 4096)], ids=str)
def test_the_residual_is_added_and_returned_before_the_norm(implementation, shape, dtype):
    torch.manual_seed(1)
    x, residual = torch.randn(shape).to(dtype), (torch.randn(shape) * 4).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    device = implementation.device
    add_rms_norm = implementation.function("add_rms_norm", file="rms_norm")
    y, total = add_rms_norm(x.to(device), residual.to(device), weight.to(device), 1e-6)
    assert torch.equal(total.cpu(), x + residual)  # rounded to the dtype, as a plain addition rounds
    assert torch.equal(y, implementation.function("rms_norm")(total, weight.to(device), 1e-6))  # and only then normed
    assert_near(y, rms_norm_reference(x + residual, weight, 1e-6), TOLERANCE[dtype])


def test_the_norm_of_heads_in_a_fused_projection_needs_no_copy_of_them(implementation):
    """Qwen3 norms q and k, which are strided views of one projection's output."""
    torch.manual_seed(2)
    fused = torch.randn(6, 8, 128, device=implementation.device)
    weight = torch.rand(128, device=implementation.device)
    rms_norm = implementation.function("rms_norm")
    for heads in (slice(0, 4), slice(4, 6)):
        view = fused[:, heads]
        assert torch.equal(rms_norm(view, weight, 1e-6), rms_norm(view.contiguous(), weight, 1e-6))
    transposed = fused.transpose(0, 2)  # even the last dimension strided
    weight = torch.rand(6, device=implementation.device)
    assert_near(rms_norm(transposed, weight, 1e-6), rms_norm(transposed.contiguous(), weight, 1e-6), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_that_of_transformers(implementation, dtype):
    """The norm is rounded before the weight: the other order is one unit away in a quarter of the values."""
    torch.manual_seed(3)
    module = LlamaRMSNorm(512, eps=1e-5).to(dtype)
    module.weight.data.uniform_(0.5, 2.0)
    x = torch.randn(64, 512).to(dtype)
    y = implementation.function("rms_norm")(x.to(implementation.device), module.weight.to(implementation.device), 1e-5)
    expected = module(x)
    share_of_equal = (y.cpu() == expected).double().mean()
    assert share_of_equal > (0.5 if dtype == torch.float32 else 0.995), share_of_equal


def test_a_row_of_zeros_gives_zeros(implementation):
    x = torch.zeros(2, 64, device=implementation.device)
    y = implementation.function("rms_norm")(x, torch.ones(64, device=implementation.device), 1e-6)
    assert torch.equal(y.cpu(), torch.zeros(2, 64))
