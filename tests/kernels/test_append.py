"""append: pages hold exactly what was written, min and max are a pure function of what they hold, codes of each key."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from distributed_sparse.kernels.reference import append_reference, quantise_reference
from tests.support.kernels import Implementation, bits, poison_

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(16, 3, 64), (32, 1, 96), (64, 2, 128), (16, 2, 256)]  # page_size, KV heads, head_dim
BITS = [2, 4, 8]


@dataclass
class Sequence:
    """The pages of one sequence, in logical order, and the tokens that they hold."""

    table: list[int]
    length: int = 0


class Cache:
    """K, V and metadata, poisoned, of one layer; with ``key_bits``, the low-bit copy of the keys too."""

    def __init__(
        self,
        implementation: Implementation,
        page_size: int,
        heads: int,
        dim: int,
        dtype: torch.dtype,
        key_bits: int | None = None,
        key_offset: Tensor | None = None,
    ) -> None:
        self.implementation, self.page_size, self.heads, self.dim, self.dtype = implementation, page_size, heads, dim, dtype
        shapes = [(40, heads, page_size, dim)] * 2 + [(40, heads, 2, dim)]
        self.k_pages, self.v_pages, self.page_min_max = (poison_(torch.empty(shape, dtype=dtype)) for shape in shapes)
        self.key_bits, self.key_offset = key_bits, key_offset
        if key_bits is not None:
            self.key_codes = torch.randint(256, (40, heads, page_size, dim * key_bits // 8), dtype=torch.uint8)
            self.key_scales = poison_(torch.empty(40, heads, page_size, 2, dtype=torch.float16))

    def append(self, work: list[tuple[Sequence, int]], k: Tensor, v: Tensor, with_metadata: bool = True) -> None:
        """Append new tokens of sequences, and compare K and V of the whole cache, bit for bit, with the reference."""
        runs = self.runs(work)
        pages, starts, offsets, counts = runs
        expected_k, expected_v, _ = append_reference(k, v, pages, starts, offsets, counts, self.k_pages, self.v_pages)
        device = self.implementation.device
        k_pages, v_pages, page_min_max = (x.to(device) for x in (self.k_pages, self.v_pages, self.page_min_max))
        batch = [x.to(device) for x in (k, v, pages, starts, offsets, counts)]
        written = [k_pages, v_pages, page_min_max if with_metadata else None]
        if self.key_bits is not None:
            key_codes, key_scales = self.key_codes.to(device, copy=True), self.key_scales.to(device, copy=True)
            written += [key_codes, key_scales, None if self.key_offset is None else self.key_offset.to(device)]
        self.implementation.function("append")(*batch, *written)
        self.k_pages, self.v_pages, self.page_min_max = k_pages.cpu(), v_pages.cpu(), page_min_max.cpu()
        assert torch.equal(bits(self.k_pages[1:]), bits(expected_k[1:]))  # what the null page holds is nobody's business
        assert torch.equal(bits(self.v_pages[1:]), bits(expected_v[1:]))
        if self.key_bits is not None:
            self.assert_only_the_new_keys_were_quantised(k, runs, key_codes, key_scales)

    def assert_only_the_new_keys_were_quantised(self, k: Tensor, runs: Tensor, codes: Tensor, scales: Tensor) -> None:
        """Compare the whole low-bit copy, bit for bit, with what it held and the reference's codes of the new keys."""
        assert self.key_bits is not None
        new_codes, new_scales = quantise_reference(k, self.key_bits, self.key_offset)
        for page, start, offset, count in runs.T.tolist():
            for i in range(count):
                self.key_codes[page, :, offset + i] = new_codes[start + i]
                self.key_scales[page, :, offset + i] = new_scales[start + i]
        assert torch.equal(codes.cpu()[1:], self.key_codes[1:])
        assert torch.equal(bits(scales.cpu()[1:]), bits(self.key_scales[1:]))

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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key_bits", BITS)
@pytest.mark.parametrize(("page_size", "heads", "dim"), SHAPES)
def test_the_low_bit_copy_equals_a_straightforward_quantiser_in_every_append_path(
    implementation, page_size, heads, dim, key_bits, dtype
):
    """A prompt over several pages, a chunk that starts amid a page, one decode token, and all of them in one batch."""
    torch.manual_seed(5)
    cache = Cache(implementation, page_size, heads, dim, dtype, key_bits)
    long, short = Sequence([7, 3, 9]), Sequence([2])
    for work in ([(long, page_size + 3)], [(long, 1)], [(long, 5), (short, 1)]):
        tokens = sum(new for _, new in work)
        cache.append(work, cache.keys(tokens), cache.values(tokens))
    assert cache.key_scales.isnan().any(dim=-1).sum() == heads * (40 * page_size - long.length - short.length)


@pytest.mark.parametrize("key_bits", BITS)
def test_an_offset_is_taken_from_what_is_quantised_and_not_from_the_keys(implementation, key_bits):
    torch.manual_seed(6)
    offset = 3 * torch.randn(2, 96)
    cache = Cache(implementation, 16, 2, 96, torch.float16, key_bits, offset)
    sequence = Sequence([4, 8])
    for new in (14, 3, 1):  # `append` compares the keys in the pages too
        cache.append([(sequence, new)], cache.keys(new), cache.values(new))


@pytest.mark.parametrize("with_metadata", [False, True])
def test_the_low_bit_copy_is_written_with_and_without_min_and_max(implementation, with_metadata):
    torch.manual_seed(7)
    cache = Cache(implementation, 16, 2, 64, torch.float32, 4)
    cache.append([(Sequence([3, 2]), 19)], cache.keys(19), cache.values(19), with_metadata)


@pytest.mark.parametrize("key_bits", BITS)
def test_keys_without_spread_have_scale_and_codes_zero(implementation, key_bits):
    cache = Cache(implementation, 16, 1, 64, torch.float32, key_bits)
    keys = torch.tensor([0.0, -0.0, 2.5, -1e-3]).view(4, 1, 1).repeat(1, 1, 64)
    keys[3, 0, 5] += 1e-9  # a spread that vanishes in the scale's float16
    cache.append([(Sequence([1]), 4)], keys, cache.values(4))
    assert (cache.key_codes[1, :, :4] == 0).all() and (cache.key_scales[1, :, :4, 0] == 0).all()
    assert cache.key_scales[1, 0, :4, 1].tolist() == keys[:, 0, 0].half().tolist()


@pytest.mark.parametrize("key_bits", BITS)
def test_a_key_halfway_between_two_codes_takes_the_upper_one_at_any_scale(implementation, key_bits):
    torch.manual_seed(8)
    levels, tokens, dim = 2**key_bits - 1, 32, 64
    scale = (torch.rand(tokens, 1, 1) + 0.5).half().float()
    code = torch.randint(levels, (tokens, 1, dim)).float()
    keys = (code + 0.5) * scale  # exact in float32
    keys[:, :, 0], keys[:, :, 1] = 0.0, levels * scale[:, :, 0]
    cache = Cache(implementation, 32, 1, dim, torch.float32, key_bits)
    cache.append([(Sequence([1]), tokens)], keys, cache.values(tokens))
    assert torch.equal(cache.key_scales[1, 0, :, 0].float(), scale[:, 0, 0])
    written = torch.cat([cache.key_codes[1, 0] >> shift & levels for shift in range(0, 8, key_bits)], dim=-1)
    assert torch.equal(written[:, 2:].float(), code[:, 0, 2:] + 1)


@pytest.mark.parametrize("key_bits", BITS)
def test_keys_a_rounding_away_from_a_border_between_two_codes_or_two_scales_are_divided_exactly(implementation, key_bits):
    """A multiplication by the reciprocal, or an approximate division, would tell other codes here than the reference."""
    torch.manual_seed(9)
    levels, tokens, dim = 2**key_bits - 1, 64, 256
    images = (torch.rand(tokens, 1, 1) + 0.5).half().view(torch.int16)
    scale, next_scale = images.view(torch.float16).float(), (images + 1).view(torch.float16).float()
    between_codes = (torch.randint(levels, (tokens, 1, dim)).float() + 0.5) * scale
    between_scales = levels * (scale + next_scale) / 2
    keys = (between_codes.view(torch.int32) + torch.randint(-2, 3, between_codes.shape)).int().view(torch.float32)
    greatest = (between_scales.view(torch.int32) + torch.randint(-2, 3, between_scales.shape)).int().view(torch.float32)
    for largest in (levels * scale, greatest):
        cache = Cache(implementation, 64, 1, dim, torch.float32, key_bits)
        keys[:, :, 0], keys[:, :, 1] = 0.0, largest[:, :, 0]
        cache.append([(Sequence([1]), tokens)], keys, cache.values(tokens))


@pytest.mark.parametrize("key_bits", BITS)
def test_a_decoded_key_is_off_by_no_more_than_half_a_step(implementation, key_bits):
    """The layout, read once more from its description: byte i holds the channels i, i + d/n, ..., the first lowest."""
    torch.manual_seed(10)
    cache = Cache(implementation, 16, 2, 96, torch.float32, key_bits)
    keys = torch.randn(16, 2, 96)
    cache.append([(Sequence([1]), 16)], keys, cache.values(16))
    per_byte = 8 // key_bits
    scale, minimum = (cache.key_scales[1].double()[..., i].T for i in (0, 1))  # [16, 2]
    for channel in range(96):
        i_byte, i_part = channel % (96 // per_byte), channel // (96 // per_byte)
        code = (cache.key_codes[1, :, :, i_byte] >> (i_part * key_bits) & 2**key_bits - 1).T.double()
        error = (code * scale + minimum - keys[:, :, channel]).abs()
        assert (error <= scale / 2 + 2e-3 * keys.abs().amax(dim=-1)).all()  # and what rounding both to float16 costs
