"""accuracy: comparisons that keep a benchmark from reporting the speed of a wrong result."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_ERROR = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""RMS error over RMS of the float64 result, above which a result is wrong."""


class WrongResult(AssertionError):
    """A result differs from its reference."""


def check_close(what: str, found: Tensor, expected: Tensor, limit: float, of: str = "its own float64 result") -> None:
    """Compare with a reference: infinities at the same places, and the RMS error of the rest.

    Raises:
        WrongResult: the error is above `limit` times the RMS of `expected`, or NaN.
    """
    got, want = found.detach().cpu().double(), expected.detach().cpu().double()
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, the reference has {tuple(want.shape)}"
    infinite = want.isinf()
    if not torch.equal(got[infinite], want[infinite]):
        raise WrongResult(f"{what}: other infinities than {of}")
    got, want = got[~infinite], want[~infinite]
    error = ((got - want).square().mean().sqrt() / want.square().mean().sqrt()).item() if want.numel() else 0.0
    if not error <= limit:  # also if NaN
        raise WrongResult(f"{what}: RMS error {error:.2e} of {of}, above {limit:g}")


def check_equal(what: str, found: object, expected: object) -> None:
    """Check for exact equality.

    Raises:
        WrongResult: the values differ.
    """
    same = torch.equal(found, expected) if isinstance(found, Tensor) and isinstance(expected, Tensor) else found == expected
    if not same:
        raise WrongResult(f"{what}: not what the reference gives")
