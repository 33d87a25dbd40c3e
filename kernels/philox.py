"""philox: counter-based random bits (Philox4x32-10, Salmon et al., SC 2011), identical on every device."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TOKEN_SAMPLING, SAMPLE_RESIDUAL, RANDOM_PAGES = 0, 1, 2
"""Purpose of a random number, in the lowest 4 bits of the last counter word: different uses never share a number."""

_MUL_0, _MUL_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF

Words = TypeVar("Words", Tensor, NDArray[np.int64])
"""32-bit words in int64."""


def philox(key: tuple[Tensor | int, Tensor | int], counter: tuple[Tensor | int, ...]) -> tuple[Tensor, ...]:
    """Four 32-bit random words for each (key, counter); a pure function, bit for bit ``triton.language.philox``.

    Args:
        key: two words, counter: four words; each an int or an int64 tensor holding a value in [0, 2^32); broadcast.

    Returns:
        Four int64 tensors of the broadcast shape, each in [0, 2^32).
    """
    return philox_rounds(
        *(torch.as_tensor(word) for word in key), *torch.broadcast_tensors(*(torch.as_tensor(word) for word in counter))
    )


def philox_rounds(k0: Words, k1: Words, c0: Words, c1: Words, c2: Words, c3: Words) -> tuple[Words, Words, Words, Words]:
    """`philox` on int64 tensors or numpy int64 arrays (cheaper calls for few numbers). All counters have one shape."""
    for _ in range(10):
        high_0, low_0 = _multiply(c0, _MUL_0)
        high_1, low_1 = _multiply(c2, _MUL_1)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


def uniform(words: Tensor) -> Tensor:
    """float32 in the open interval (0, 1) from 32-bit words: (top 23 bits + 1/2) / 2^23, so neither 0 nor 1 occurs."""
    return ((words >> 9).to(torch.float32) + 0.5) * 2.0**-23


def _multiply(a: Words, b: int) -> tuple[Words, Words]:
    """High and low words of the 64-bit product of a word and a constant. int64 wraps around but keeps all 64 bits."""
    product = a * b
    return (product >> 32) & _MASK, product & _MASK
