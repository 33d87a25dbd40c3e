"""sketch: pages are written as the definition says in float64, whatever the batch, and logits are those of what is written."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.linalg import hadamard
from torch import Tensor

from distributed_sparse.kernels.sketch.sketch import (
    PageSketches,
    append_sketches,
    select_by_sketch,
    sketch_logits,
    sketch_probabilities,
)
from distributed_sparse.kernels.sketch.sketch_torch import rotate

SHAPES = [(64, 3, 16), (128, 4, 32), (96, 1, 64), (80, 2, 16), (256, 16, 16), (8, 1, 64)]
"""head_dim, group, page size."""


def empty(num_pages: int, heads: int, dim: int, size: int) -> PageSketches:
    return PageSketches(
        torch.full((num_pages, heads, size, dim // 8), 0xA5, dtype=torch.uint8),
        torch.full((num_pages, heads, size // 2), 0xA5, dtype=torch.uint8),
        torch.full((num_pages, heads, dim // 2), 0xA5, dtype=torch.uint8),
        torch.full((num_pages, heads, dim // 4), 0xA5, dtype=torch.uint8),
        torch.full((num_pages, heads, 6), float("nan"), dtype=torch.float16),
    )


def hadamard_blocks(dim: int) -> Tensor:
    block = dim & -dim
    one = torch.tensor(hadamard(block), dtype=torch.float64) / block**0.5
    return torch.block_diag(*[one] * (dim // block))


def codes(packed: Tensor, bits: int) -> list[int]:
    """Of one row of bytes: byte i holds the elements i, i + w, i + 2w, ..."""
    return [(int(byte) >> bits * part) & (2**bits - 1) for part in range(8 // bits) for byte in packed]


def quantised(x: Tensor, bits: int) -> tuple[list[int], Tensor, list[bool]]:
    """Codes of float64 [n], what they decode to, and which of them are clear of a rounding."""
    levels = 2**bits - 1
    minimum = x.min().float().half().double()
    scale = ((x.max() - x.min()).float() / levels).half().double()
    exact = ((x - minimum) / scale + 0.5).clamp(0, levels + 0.5)
    found = exact.floor()
    return found.int().tolist(), found * scale + minimum, ((exact - exact.round()).abs() > 1e-3).tolist()


def full_cache(
    dim: int, size: int, heads: int = 2, pages: int = 7, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(dim + size)
    shape = (pages, heads, size, dim)
    offset = 3 * torch.randn(1, heads, 1, dim, generator=generator)  # keys have a mean, as those of a model
    return (torch.randn(shape, generator=generator) + offset).to(dtype), torch.randn(shape, generator=generator).to(dtype)


def written(k: Tensor, v: Tensor) -> PageSketches:
    """Sketches of all pages but the null page, at once."""
    pages, heads, size, dim = k.shape
    sketches = empty(pages, heads, dim, size)
    runs = torch.arange(1, pages, dtype=torch.int32)
    append_sketches(k, v, runs, torch.zeros_like(runs), torch.full_like(runs, size), sketches)
    return sketches


@pytest.mark.parametrize("dim", [8, 64, 80, 96, 128, 256])
def test_the_rotation_is_the_hadamard_matrix_in_blocks(dim: int) -> None:
    x = torch.randn(5, 3, dim)
    torch.testing.assert_close(rotate(x).double(), x.double() @ hadamard_blocks(dim), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotate(rotate(x)), x, atol=1e-5, rtol=1e-5)  # its own inverse


@pytest.mark.parametrize(("dim", "group", "size"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_page_is_written_as_defined(dim: int, group: int, size: int, dtype: torch.dtype) -> None:
    k, v = full_cache(dim, size, dtype=dtype)
    sketches, matrix = written(k, v), hadamard_blocks(dim)
    for page, head in itertools.product(range(1, len(k)), range(2)):
        keys, values = k[page, head].double(), v[page, head].double()
        of_mean, mean, clear = quantised(keys.mean(0), 4)
        found = codes(sketches.key_means[page, head], 4)
        assert all(a == b for a, b, c in zip(found, of_mean, clear) if c)
        scale, minimum = sketches.scales[page, head, :2].double()
        mean = torch.tensor(found) * scale + minimum  # as written: a code that a rounding decides may be either
        rest = (keys - mean) @ matrix
        for token in range(size):
            signs = codes(sketches.signs[page, head, token], 1)
            assert all(bool(s) == (y > 0) for s, y in zip(signs, rest[token].tolist()) if abs(y) > 1e-3)
        for bits, x, packed in ((4, rest.abs().mean(1), sketches.magnitudes), (2, values.mean(0), sketches.value_means)):
            wanted, _, clear = quantised(x, bits)
            assert all(a == b for a, b, c in zip(codes(packed[page, head], bits), wanted, clear) if c)
            assert sum(clear) > 0.9 * len(clear)


def test_pages_that_are_not_full_and_the_others_are_left_alone() -> None:
    k, v = full_cache(64, 16)
    sketches = empty(7, 2, 64, 16)
    runs = torch.tensor([[1, 0, 15], [2, 3, 13], [3, 0, 0], [4, 15, 1]], dtype=torch.int32)  # page, offset, count
    append_sketches(k, v, *runs.unbind(1), sketches)
    expected = written(k, v)
    for found, full, before in zip(sketches, expected, empty(7, 2, 64, 16)):
        for page in (2, 4):
            assert torch.equal(found[page], full[page])
        for page in (0, 1, 3, 5, 6):
            assert found[page].view(torch.uint8).equal(before[page].view(torch.uint8))


@pytest.mark.parametrize(("dim", "group", "size"), SHAPES)
def test_a_pages_bits_do_not_depend_on_the_batch_or_on_the_heads_beside_it(dim: int, group: int, size: int) -> None:
    k, v = full_cache(dim, size, heads=3)
    together = written(k, v)
    for page in range(1, len(k)):
        alone = empty(len(k), 1, dim, size)
        one = torch.tensor([page], dtype=torch.int32)
        head = page % 3
        of_head = (pages[:, head : head + 1].contiguous() for pages in (k, v))
        append_sketches(*of_head, one, torch.tensor([size - 1]), torch.tensor([1]), alone)
        for found, expected in zip(alone, together):
            assert found[page, 0].equal(expected[page, head])


def estimated(q: Tensor, sketches: PageSketches, table: list[int], head: int, scale: float) -> Tensor:
    """float64 [G, tokens]: logits by the definition, from what is written. q [G, d]."""
    dim, matrix = q.shape[1], hadamard_blocks(q.shape[1])
    found = []
    for page in table:
        scales = sketches.scales[page, head].double()
        mean = torch.tensor(codes(sketches.key_means[page, head], 4)) * scales[0] + scales[1]
        magnitudes = torch.tensor(codes(sketches.magnitudes[page, head], 4)) * scales[2] + scales[3]
        signs = torch.tensor([codes(token, 1) for token in sketches.signs[page, head]], dtype=torch.float64) * 2 - 1
        assert signs.shape[1] == dim
        found.append(q.double() @ mean[:, None] + (q.double() @ matrix @ signs.T) * magnitudes)
    return torch.cat(found, dim=1) * scale


@pytest.mark.parametrize(("dim", "group", "size"), SHAPES)
def test_logits_are_those_of_the_definition(dim: int, group: int, size: int) -> None:
    k, v = full_cache(dim, size, pages=40)
    sketches = written(k, v)
    table = torch.tensor([[5, 9, 1, 30], [2, 7, 2**31 - 1, 8], [3, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.int32)
    num_pages = torch.tensor([4, 2, 1, 0], dtype=torch.int32)
    last = torch.tensor([size, 3, 1, 0], dtype=torch.int32)
    q = torch.randn(4, 2 * group, dim)
    logits = sketch_logits(q, sketches, table, num_pages, last, 0.3)
    for row, full in enumerate((4, 1, 0, 0)):
        assert (logits[row, :, full * size :] == -torch.inf).all()
        for head in range(2 if full else 0):
            own = slice(head * group, (head + 1) * group)
            expected = estimated(q[row, own], sketches, table[row, :full].tolist(), head, 0.3)
            torch.testing.assert_close(logits[row, own, : full * size].double(), expected, atol=1e-4, rtol=1e-4)


def test_logits_of_a_long_row_have_the_bits_that_they_have_alone_and_on_fewer_heads() -> None:
    k, v = full_cache(64, 16, pages=600)
    sketches = written(k, v)
    table = torch.arange(1, 501, dtype=torch.int32).expand(2, -1).contiguous()
    table[1] = table[1].flip(0)
    num_pages, last = torch.tensor([500, 77], dtype=torch.int32), torch.tensor([16, 9], dtype=torch.int32)
    q = torch.randn(2, 4, 64)
    both = sketch_logits(q, sketches, table, num_pages, last, 0.125)
    alone = sketch_logits(q[1:], sketches, table[1:, :80], num_pages[1:], last[1:], 0.125)
    assert both[1, :, : 77 * 16].equal(alone[0, :, : 77 * 16])
    one_head = PageSketches(*(kept[:, 1:].contiguous() for kept in sketches))
    part = sketch_logits(q[:1, 2:], one_head, table[:1], num_pages[:1], last[:1], 0.125)
    assert part[0].equal(both[0, 2:])


def test_signs_rank_real_attention_better_than_chance() -> None:
    """Keys with a direction that the query has, too: the estimate finds them."""
    k, v = full_cache(128, 16, heads=1, pages=257)
    q = torch.randn(1, 1, 128)
    wanted = torch.randperm(4096)[:64]
    k[1:].view(4096, 128)[wanted] += 1.5 * q[0, 0]
    logits = sketch_logits(
        q, written(k, v), torch.arange(1, 257, dtype=torch.int32)[None], torch.tensor([256]), torch.tensor([16]), 1.0
    )
    assert len(set(logits[0, 0].topk(64).indices.tolist()) & set(wanted.tolist())) == 64


# ---- what is kept, and the tail


def test_the_kept_set_and_the_tail_are_those_of_the_definition() -> None:
    size, group, heads = 16, 3, 2
    k, v = full_cache(64, size, pages=90)
    sketches = written(k, v)
    contexts = [1280, 700, 165, 9]
    num_pages = torch.tensor([-(-n // size) for n in contexts], dtype=torch.int32)
    table = torch.stack([torch.randperm(88, dtype=torch.int32)[:80] + 1 for _ in contexts])
    lens = torch.tensor(contexts, dtype=torch.int32)
    q = 2 * torch.randn(4, heads * group, 64)
    logits = sketch_logits(q, sketches, table, num_pages, lens - (num_pages - 1) * size, 0.125)
    settings = {"min_tokens": 40, "sink_pages": 1, "recent_pages": 2}
    found = select_by_sketch(logits, sketches, table, num_pages, lens, 1.6, **settings)
    dropped_somewhere = 0
    for row, n in enumerate(contexts):
        full = n // size
        for head in range(heads):
            own = slice(head * group, (head + 1) * group)
            estimate = logits[row, own, : full * size].double()
            weights = estimate.softmax(1) if full else estimate
            p = weights.mean(0)
            likely = set((p > 1.6 / n).nonzero()[:, 0].tolist()) | set(p.topk(min(40, full * size)).indices.tolist())
            forced = {*range(min(size, n)), *range(max(int(num_pages[row]) - 2, 0) * size, n), *range(full * size, n)}
            kept = sorted(likely | forced)
            assert found.tokens[row, head, : found.num_tokens[row, head]].tolist() == kept
            dropped = sorted(set(range(full * size)) - set(kept))
            if not dropped:
                assert (found.tail_lse[row, own] == -torch.inf).all() and (found.tail_out[row, own] == 0).all()
                continue
            dropped_somewhere += 1
            of_page = [table[row, i // size] for i in dropped]
            scales = sketches.scales[of_page, head].double()
            values = torch.stack(
                [
                    torch.tensor(codes(sketches.value_means[page, head], 2)) * scale[4] + scale[5]
                    for page, scale in zip(of_page, scales)
                ]
            )
            torch.testing.assert_close(
                found.tail_lse[row, own].double(), estimate[:, dropped].logsumexp(1), atol=1e-4, rtol=1e-4
            )
            out = estimate[:, dropped].softmax(1) @ values
            torch.testing.assert_close(found.tail_out[row, own].double(), out, atol=1e-4, rtol=1e-3)
    assert dropped_somewhere >= 4


def test_probabilities_sum_to_one_over_full_pages() -> None:
    k, v = full_cache(64, 16)
    logits = sketch_logits(
        torch.randn(2, 4, 64), written(k, v), torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int32),
        torch.tensor([3, 2], dtype=torch.int32), torch.tensor([16, 5], dtype=torch.int32), 0.125,
    )  # fmt: skip
    found = sketch_probabilities(logits, 2, torch.tensor([48, 16]))
    torch.testing.assert_close(found.sum(2), torch.ones(2, 2))
    assert (found[1, :, 16:] == 0).all()
