"""philox: the published bits, and the same bits as Triton's, so that a seed means the same on every device."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from distributed_sparse.kernels.philox import philox, uniform

KNOWN_ANSWERS = [  # counter, key, result: Random123's known-answer vectors for philox4x32-10
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_the_published_vectors_come_out(counter, key, words):
    assert tuple(int(word) for word in philox(key, counter)) == words


def test_keys_and_counters_broadcast_to_the_words_of_each_pair():
    keys, counters = torch.tensor([[3], [2**32 - 1]]), torch.arange(5)
    words = philox((keys, 7), (counters, 1, 2, 3))
    assert all(word.shape == (2, 5) and word.dtype == torch.int64 for word in words)
    for i in range(2):
        for j in range(5):
            alone = philox((int(keys[i, 0]), 7), (j, 1, 2, 3))
            assert [int(word[i, j]) for word in words] == [int(word) for word in alone]


@triton.jit
def _philox_kernel(p_counters, p_key, p_words, BLOCK: tl.constexpr):
    """Words of four counters each under one 64-bit key, by Triton's own generator."""
    offset = tl.arange(0, BLOCK)
    c0, c1, c2, c3 = (
        tl.load(p_counters + offset).to(tl.uint32, bitcast=True),
        tl.load(p_counters + BLOCK + offset).to(tl.uint32, bitcast=True),
        tl.load(p_counters + 2 * BLOCK + offset).to(tl.uint32, bitcast=True),
        tl.load(p_counters + 3 * BLOCK + offset).to(tl.uint32, bitcast=True),
    )
    w0, w1, w2, w3 = tl.philox(tl.load(p_key), c0, c1, c2, c3)
    tl.store(p_words + offset, w0.to(tl.int32, bitcast=True))
    tl.store(p_words + BLOCK + offset, w1.to(tl.int32, bitcast=True))
    tl.store(p_words + 2 * BLOCK + offset, w2.to(tl.int32, bitcast=True))
    tl.store(p_words + 3 * BLOCK + offset, w3.to(tl.int32, bitcast=True))


@pytest.mark.implementations("interpreter", "triton")
def test_triton_draws_the_same_bits(implementation):
    generator = torch.Generator().manual_seed(0)
    counters = torch.randint(2**32, (4, 64), generator=generator)
    low, high = 0x9ABCDEF0, 0x12345678
    words = torch.empty(4, 64, dtype=torch.int32, device=implementation.device)
    key = torch.tensor([(high << 32) | low], device=implementation.device)
    _philox_kernel[(1,)](counters.to(torch.int32).to(implementation.device), key, words, BLOCK=64)
    expected = torch.stack(philox((low, high), tuple(counters)))
    assert torch.equal(words.cpu().long() & 0xFFFFFFFF, expected)


def test_uniform_never_gives_zero_or_one():
    ends = uniform(torch.tensor([0, 2**32 - 1]))
    assert ends.dtype == torch.float32
    assert 0.0 < ends[0] < 1e-6 and 1 - 1e-6 < ends[1] < 1.0


def test_uniform_fills_the_interval_evenly():
    words = philox((1, 2), (torch.arange(25_000), 0, 0, 0))
    u = uniform(torch.stack(words)).double()  # 100,000 draws
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / u.numel()) ** 0.5  # 4 standard errors
    counts = torch.histc(u, bins=64, min=0.0, max=1.0)
    expected = u.numel() / 64
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 63 + 4 * (2 * 63) ** 0.5
