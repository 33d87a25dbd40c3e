"""The kernel tests' own instruments tell right from wrong: what they let through, no kernel test would see."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.support.kernels import assert_compiles, assert_near, compile_launches, error_ratio, poison_

INFINITY, NAN = float("inf"), float("nan")


def test_the_error_ratio_is_relative_to_the_reference():
    assert error_ratio(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert error_ratio(torch.tensor([0.25, 0.25]), torch.zeros(2)) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("result", "reference"),
    [([1.0, NAN], [1.0, 2.0]), ([NAN], [NAN]), ([1.0, INFINITY], [1.0, 2.0]), ([1.0, 2.0], [1.0, -INFINITY])],
)
def test_a_nan_or_a_misplaced_infinity_is_an_error_of_any_size(result, reference):
    assert error_ratio(torch.tensor(result), torch.tensor(reference)) == INFINITY
    with pytest.raises(AssertionError):
        assert_near(torch.tensor(result), torch.tensor(reference), 1e30)


def test_infinities_in_their_places_are_no_error():
    assert error_ratio(torch.tensor([-INFINITY, 1.0]), torch.tensor([-INFINITY, 1.0])) == 0.0


def test_what_a_kernel_leaves_unwritten_is_poison():
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(2, dtype=torch.bfloat16)).isnan().all()
    assert torch.zeros(1).new_empty(4).isnan().all()
    assert torch.empty(2, dtype=torch.int32).tolist() == [-(2**31)] * 2
    assert poison_(torch.zeros(2, dtype=torch.bool)).all()


@triton.jit
def _spilling_kernel(p_x, SIZE: tl.constexpr, ROWS: tl.constexpr):
    """Holds more values at once than its registers can: the sum waits for all loads."""
    offset = tl.arange(0, ROWS)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    b_x = tl.load(p_x + offset)
    tl.store(p_x + offset, b_x / tl.sum(tl.sum(b_x, axis=1), axis=0))


def spilling(x: Tensor) -> None:
    _spilling_kernel[(1,)](x, SIZE=64, ROWS=64, num_warps=1, maxnreg=64, enable_fp_fusion=False)


def test_a_kernel_that_spills_is_caught():
    (launch,) = compile_launches(spilling, torch.zeros(64, 64))
    assert launch.stack > 0
    with pytest.raises(AssertionError, match="spills"):
        assert_compiles(spilling, torch.zeros(64, 64))


def test_a_launcher_that_launches_nothing_is_caught():
    with pytest.raises(AssertionError, match="nothing was launched"):
        assert_compiles(lambda: None)
