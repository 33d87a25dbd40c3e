"""append: pages hold exactly what was written, and their min and max are a pure function of what they hold."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from distributed_sparse.kernels.reference import append_reference
from tests.support.kernels import Implementation, bits, poison_

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(16, 3, 64), (32, 1, 96), (64, 2, 128), (16, 2, 256)]  # page_size, KV heads, head_dim


@dataclass
class Sequence:
    """The pages of one sequence, in logical order, and the tokens that they hold."""

    table: list[int]
    length: int = 0


class Cache:
    """K, V and metadata, poisoned, of one layer."""

    def __init__(self, implementation: Implementation, page_size: int, heads: int, dim: int, dtype: torch.dtype) -> None:
        self.implementation, self.page_size, self.heads, self.dim, self.dtype = implementation, page_size, heads, dim, dtype
        shapes = [(40, heads, page_size, dim)] * 2 + [(40, heads, 2, dim)]
        self.k_pages, self.v_pages, self.page_min_max = (poison_(torch.empty(shape, dtype=dtype)) for shape in shapes)

    def append(self, work: list[tuple[Sequence, int]], k: Tensor, v: Tensor, with_metadata: bool = True) -> None:
        """Append new tokens of sequences, and compare K and V of the whole cache, bit for bit, with the reference."""
        pages, starts, offsets, counts = self.runs(work)
        expected_k, expected_v, _ = append_reference(k, v, pages, starts, offsets, counts, self.k_pages, self.v_pages)
        device = self.implementation.device
        k_pages, v_pages, page_min_max = (x.to(device) for x in (self.k_pages, self.v_pages, self.page_min_max))
        batch = [x.to(device) for x in (k, v, pages, starts, offsets, counts)]
        self.implementation.function("append")(*batch, k_pages, v_pages, page_min_max if with_metadata else None)
        self.k_pages, self.v_pages, self.page_min_max = k_pages.cpu(), v_pages.cpu(), page_min_max.cpu()
        assert torch.equal(bits(self.k_pages[1:]), bits(expected_k[1:]))  # what the null page holds is nobody's business
        assert torch.equal(bits(self.v_pages[1:]), bits(expected_v[1:]))

    def runs(self, work: list[tuple[Sequence, int]]) -> Tensor:
        """The runs (pages, starts, offsets, counts: int32 [4, T]) of new tokens, cut where pages end."""
        runs, start = [], 0
        for sequence, new in work:
            end = sequence.length + new
            while sequence.length < end:
                offset = sequence.length % self.page_size
                count = min(self.page_size - offset, end - sequence.length)
                runs.append((sequence.table[sequence.length // self.page_size], start, offset, count))
                sequence.length, start = sequence.length + count, start + count
        return torch.tensor(runs, dtype=torch.int32).T.contiguous()

    def keys(self, tokens: int) -> Tensor:
        """Random keys in which zeros of both signs are common."""
        shape = (tokens, self.heads, self.dim)
        return (torch.randn(shape) * torch.randint(-1, 2, shape)).to(self.dtype)

    def values(self, tokens: int) -> Tensor:
        return torch.randn(tokens, self.heads, self.dim).to(self.dtype)

    def assert_metadata_is_exact(self, sequence: Sequence) -> None:
        """The kept min and max of every page equal those of the keys that lie in it, bit for bit."""
        for i in range(0, sequence.length, self.page_size):
            page = sequence.table[i // self.page_size]
            held = self.k_pages[page, :, : sequence.length - i]  # [H_kv, <= page_size, d]
            exact = torch.stack([held.amin(dim=1), held.amax(dim=1)], dim=1)
            assert torch.equal(bits(self.page_min_max[page]), bits(exact)), f"page {page} of {sequence}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("page_size", "heads", "dim"), SHAPES)
def test_prefill_chunks_and_decode_tokens_of_one_batch_land_in_their_pages(implementation, page_size, heads, dim, dtype):
    torch.manual_seed(0)
    cache = Cache(implementation, page_size, heads, dim, dtype)
    long, short, exact = Sequence([7, 3, 9]), Sequence([2]), Sequence([30, 31])
    cache.append([(long, page_size + 3), (exact, page_size)], cache.keys(2 * page_size + 3), cache.values(2 * page_size + 3))
    work = [(short, 1), (long, page_size), (exact, 1)]
    cache.append(work, cache.keys(page_size + 2), cache.values(page_size + 2))
    for sequence in (long, short, exact):
        cache.assert_metadata_is_exact(sequence)
    others = [page for page in range(40) if page not in (7, 3, 9, 2, 30, 31)]
    assert cache.page_min_max[others].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_metadata_stays_exact_through_odd_chunks_page_borders_and_recycled_pages(implementation, dtype):
    torch.manual_seed(1)
    cache = Cache(implementation, 16, 2, 64, dtype)
    for largest in (100.0, 0.01):  # keys of the pages' second owner lie inside the range that the first one left
        sequence = Sequence([5, 1, 8, 2])
        for new in (5, 10, 1, 1, 17, 13, 1):
            cache.append([(sequence, new)], (cache.keys(new) * largest).to(dtype), cache.values(new))
            cache.assert_metadata_is_exact(sequence)


def test_a_page_metadata_does_not_depend_on_how_its_tokens_were_cut_into_runs(implementation):
    torch.manual_seed(2)
    whole, pieces = (Cache(implementation, 16, 2, 64, torch.float32) for _ in range(2))
    k, v = whole.keys(16), whole.values(16)
    whole.append([(Sequence([1]), 16)], k, v)
    sequence = Sequence([1])
    for piece in ([0], [1], [2, 3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15]):
        pieces.append([(sequence, len(piece))], k[piece], v[piece])
    assert torch.equal(bits(whole.page_min_max[1]), bits(pieces.page_min_max[1]))


def test_negative_zero_is_stored_as_positive_zero(implementation):
    cache = Cache(implementation, 16, 1, 64, torch.float16)
    cache.append([(Sequence([1]), 2)], torch.full((2, 1, 64), -0.0, dtype=torch.float16), cache.values(2))
    assert (bits(cache.k_pages[1, :, :2]) == 0).all()
    assert (bits(cache.page_min_max[1]) == 0).all()


def test_runs_of_no_tokens_and_padded_rows_on_the_null_page_leave_every_page_alone(implementation):
    cache = Cache(implementation, 16, 2, 64, torch.float32)
    batch = torch.randn(3, 2, 64)
    columns = [[0, 0, 4, 5], [0, 1, 2, 2], [0, 0, 3, 15], [1, 1, 1, 0]]  # pages, starts, offsets, counts
    cache.page_min_max[4] = 0.0
    before = cache.page_min_max.clone()
    on_device = [x.to(implementation.device) for x in (cache.k_pages, cache.v_pages, cache.page_min_max)]
    runs = [torch.tensor(column, dtype=torch.int32, device=implementation.device) for column in columns]
    batch = batch.to(implementation.device)
    implementation.function("append")(batch, batch, *runs, *on_device)
    k_pages, v_pages, page_min_max = (x.cpu() for x in on_device)
    assert k_pages[4, :, 3].eq(batch[2].cpu()).all() and v_pages[4, :, 3].eq(batch[2].cpu()).all()
    assert not page_min_max[4].equal(before[4])
    assert k_pages[5].isnan().all() and v_pages[5].isnan().all() and page_min_max[5].isnan().all()
    assert k_pages.isnan()[4].sum() == 2 * 15 * 64  # one of 16 slots was written


def test_a_batch_of_empty_runs_alone_changes_nothing(implementation):
    cache = Cache(implementation, 16, 2, 64, torch.float32)
    on_device = [x.to(implementation.device) for x in (cache.k_pages, cache.v_pages, cache.page_min_max)]
    nothing = torch.zeros(2, dtype=torch.int32, device=implementation.device)
    batch = torch.zeros(1, 2, 64, device=implementation.device)
    implementation.function("append")(batch, batch, nothing, nothing, nothing, nothing, *on_device)
    assert all(x.isnan().all() for x in on_device)


def test_a_cache_without_metadata_is_written_the_same(implementation):
    torch.manual_seed(3)
    cache = Cache(implementation, 16, 2, 128, torch.float32)
    cache.append([(Sequence([3, 2]), 19)], cache.keys(19), cache.values(19), with_metadata=False)
    assert cache.page_min_max.isnan().all()


def test_keys_and_values_may_be_views_of_a_fused_projection(implementation):
    torch.manual_seed(4)
    cache = Cache(implementation, 16, 2, 64, torch.float32)
    fused = cache.keys(18).repeat(1, 3, 1)  # [N, H_q + 2 H_kv, d]
    sequence = Sequence([3, 2])
    cache.append([(sequence, 18)], fused[:, 2:4], fused[:, 4:6])
    cache.assert_metadata_is_exact(sequence)
