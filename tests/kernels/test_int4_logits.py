"""int4_logits: the logits of the decoded keys, and the same bits whatever else is in the batch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from distributed_sparse.kernels.reference import int4_logits_reference, quantise_reference
from distributed_sparse.kernels.twilight.int4_logits import int4_logits
from tests.support.kernels import Implementation, assert_near, bits, poison_

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BITS = [2, 4, 8]
RATIO = 2e-6  # float32 whatever the dtype of q; the minimum's part and the codes' part nearly cancel
SHAPES = [(1, 1, 64, 16), (2, 3, 96, 32), (1, 4, 128, 64), (2, 8, 64, 16), (1, 16, 256, 32)]  # KV heads, group, d, page_size


@dataclass
class Copy:
    """A low-bit copy of random keys. No result may depend on page 0 or on what lies past a row's last token."""

    key_codes: Tensor
    key_scales: Tensor

    @classmethod
    def random(cls, num_pages: int, heads: int, dim: int, page_size: int, key_bits: int) -> Copy:
        codes = torch.randint(256, (num_pages, heads, page_size, dim * key_bits // 8), dtype=torch.uint8)
        spread = torch.rand(num_pages, heads, page_size) + 0.5
        scales = torch.stack([2 * spread / (2**key_bits - 1), -spread], dim=-1).half()
        poison_(scales[0])
        return cls(codes, scales)


def lists(num_pages: list[list[int]], width: int) -> tuple[Tensor, Tensor]:
    """Scattered pages int32 [B, H_kv, width], poisoned past their counts, and the counts."""
    pages = poison_(torch.empty(len(num_pages), len(num_pages[0]), width, dtype=torch.int32))
    for b, of_heads in enumerate(num_pages):
        for h, n in enumerate(of_heads):
            pages[b, h, :n] = torch.randperm(width)[:n] + 1
    return pages, torch.tensor(num_pages, dtype=torch.int32)


def estimate(implementation: Implementation, q: Tensor, copy: Copy, pages: Tensor, num_pages: Tensor, last: Tensor) -> Tensor:
    tensors = (q, copy.key_codes, copy.key_scales, pages, num_pages, last)
    op = implementation.function("int4_logits")
    return op(*(x.to(implementation.device) for x in tensors), q.shape[-1] ** -0.5).cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key_bits", BITS)
@pytest.mark.parametrize(("heads", "group", "dim", "page_size"), SHAPES)
def test_logits_equal_the_reference_and_are_minus_infinity_past_the_row(
    implementation, heads, group, dim, page_size, key_bits, dtype
):
    torch.manual_seed(0)
    width = 160 // page_size + 1  # more than one tile, and no multiple of it
    copy = Copy.random(width + 1, heads, dim, page_size, key_bits)
    pages, num_pages = lists([[width - h for h in range(heads)], [0] * heads, [1] * heads], width)
    last = torch.tensor([page_size - 3, page_size, 1], dtype=torch.int32)
    q = torch.randn(3, heads * group, dim).to(dtype)
    result = estimate(implementation, q, copy, pages, num_pages, last)
    expected = int4_logits_reference(q, copy.key_codes, copy.key_scales, pages, num_pages, last, dim**-0.5)
    assert result.dtype == torch.float32
    assert_near(result, expected, RATIO)


def test_what_lies_past_the_last_token_of_a_page_is_never_read_into_a_logit(implementation):
    torch.manual_seed(1)
    copy = Copy.random(6, 2, 64, 16, 4)
    pages, num_pages = lists([[5, 5]], 5)
    for h in range(2):
        poison_(copy.key_scales[int(pages[0, h, 4]), h, 7:])
    last = torch.tensor([7], dtype=torch.int32)
    q = torch.randn(1, 8, 64)
    result = estimate(implementation, q, copy, pages, num_pages, last)
    assert result[..., :71].isfinite().all() and (result[..., 71:] == float("-inf")).all()


@pytest.mark.parametrize("key_bits", BITS)
@pytest.mark.parametrize("dim", [64, 80])
def test_codes_may_begin_at_any_byte_and_take_any_number_of_bytes(implementation, dim, key_bits):
    torch.manual_seed(8)
    copy = Copy.random(4, 2, dim, 16, key_bits)
    shape = copy.key_codes.shape
    shifted = torch.empty(copy.key_codes.numel() + 1, dtype=torch.uint8, device=implementation.device)[1:].view(shape)
    shifted.copy_(copy.key_codes)
    pages, num_pages = lists([[3, 2]], 3)
    last = torch.tensor([5], dtype=torch.int32)
    q = torch.randn(1, 4, dim).half()
    result = estimate(implementation, q, Copy(shifted, copy.key_scales), pages, num_pages, last)
    expected = int4_logits_reference(q, copy.key_codes, copy.key_scales, pages, num_pages, last, dim**-0.5)
    assert_near(result, expected, RATIO)


@pytest.mark.parametrize("key_bits", BITS)
def test_keys_of_scale_zero_estimate_their_minimum_alone(implementation, key_bits):
    torch.manual_seed(2)
    copy = Copy.random(3, 1, 64, 16, key_bits)
    copy.key_scales[..., 0], copy.key_scales[..., 1] = 0.0, 0.75
    pages, num_pages = lists([[2]], 2)
    q = torch.randn(1, 4, 64)
    result = estimate(implementation, q, copy, pages, num_pages, torch.tensor([16], dtype=torch.int32))
    assert_near(result, (0.75 * q.double().sum(-1) / 8)[..., None].expand(1, 4, 32), RATIO)


@pytest.mark.parametrize(("key_bits", "ratio"), [(2, 0.6), (4, 0.12), (8, 0.008)])
def test_an_estimate_from_quantised_keys_is_near_the_true_logit(implementation, key_bits, ratio):
    """The quantiser and `int4_logits` mean the same layout."""
    torch.manual_seed(3)
    k, q = torch.randn(48, 1, 128), torch.randn(1, 4, 128)
    codes, scales = quantise_reference(k, key_bits)
    pages, num_pages = torch.tensor([[[2, 1]]], dtype=torch.int32), torch.tensor([[2]], dtype=torch.int32)
    copy = Copy(codes.view(3, 1, 16, -1), scales.view(3, 1, 16, 2))
    result = estimate(implementation, q, copy, pages, num_pages, torch.tensor([16], dtype=torch.int32))
    assert_near(result[0], q[0] @ torch.cat([k[32:], k[16:32]])[:, 0].T / 128**0.5, ratio)


def test_one_list_expanded_over_all_heads_is_read_like_its_copy(implementation):
    torch.manual_seed(4)
    copy = Copy.random(9, 3, 64, 16, 4)
    table, counts = lists([[8], [5]], 8)
    last = torch.tensor([16, 2], dtype=torch.int32)
    q = torch.randn(2, 6, 64)
    expanded = estimate(implementation, q, copy, table.expand(-1, 3, -1), counts.expand(-1, 3), last)
    repeated = estimate(implementation, q, copy, table.repeat(1, 3, 1), counts.repeat(1, 3), last)
    assert torch.equal(bits(expanded), bits(repeated))


@pytest.mark.parametrize("key_bits", BITS)
def test_a_row_has_the_same_bits_in_any_batch_with_any_heads_and_any_list_width(implementation, one_thread, key_bits):
    """Promise A: a rank that holds one KV head prunes to the same tokens as one that holds them all."""
    torch.manual_seed(5)
    heads, group, dim, width = 8, 4, 128, 150
    if implementation.is_interpreter:
        heads, width = 2, 20
    copy = Copy.random(width + 1, heads, dim, 16, key_bits)
    lengths = [width - 3, width // 4, width // 2]
    pages, num_pages = lists([[n] * heads for n in lengths], width)
    last = torch.tensor([16, 9, 1], dtype=torch.int32)
    q = torch.randn(3, heads * group, dim)
    together = estimate(implementation, q, copy, pages, num_pages, last).view(3, heads, group, -1)
    for b, n in enumerate(lengths):
        for own in (slice(0, 1), slice(heads // 2, heads)):
            alone = estimate(
                implementation,
                q[b : b + 1].view(1, heads, group, dim)[:, own].reshape(1, -1, dim),
                Copy(copy.key_codes[:, own].contiguous(), copy.key_scales[:, own].contiguous()),
                pages[b : b + 1, own, : n + b],
                num_pages[b : b + 1, own],
                last[b : b + 1],
            )
            expected = together[b, own, :, : (n + b) * 16].reshape(1, -1, (n + b) * 16)
            assert torch.equal(bits(alone), bits(expected))


def test_a_token_has_the_same_bits_at_any_place_of_the_list_and_of_the_cache(implementation, one_thread):
    torch.manual_seed(6)
    copy = Copy.random(20, 2, 64, 16, 4)
    pages, num_pages = lists([[19, 19]], 19)
    last = torch.tensor([16], dtype=torch.int32)
    q = torch.randn(1, 6, 64)
    forward = estimate(implementation, q, copy, pages, num_pages, last).unflatten(-1, (19, 16))
    backward = estimate(implementation, q, copy, pages.flip(2), num_pages, last).unflatten(-1, (19, 16))
    assert torch.equal(bits(forward), bits(backward.flip(2)))
    order = torch.cat([torch.zeros(1, dtype=torch.long), torch.randperm(19) + 1])
    moved = Copy(copy.key_codes[order], copy.key_scales[order])
    elsewhere = order.argsort()[pages.long()].int()
    assert torch.equal(
        bits(estimate(implementation, q, moved, elsewhere, num_pages, last).unflatten(-1, (19, 16))), bits(forward)
    )


def test_a_batch_of_padded_rows_alone_has_no_logits(implementation):
    copy = Copy.random(3, 2, 64, 16, 4)
    pages, num_pages = lists([[0, 0], [0, 0]], 4)
    result = estimate(implementation, torch.randn(2, 4, 64), copy, pages, num_pages, torch.ones(2, dtype=torch.int32))
    assert result.shape == (2, 4, 64) and (result == float("-inf")).all()


def test_the_op_runs_the_path_of_its_device():
    torch.manual_seed(7)
    copy = Copy.random(5, 1, 64, 16, 4)
    pages, num_pages = lists([[4]], 4)
    last = torch.tensor([3], dtype=torch.int32)
    q = torch.randn(1, 2, 64)
    result = int4_logits(q, copy.key_codes, copy.key_scales, pages, num_pages, last, 0.125)
    assert_near(result, int4_logits_reference(q, copy.key_codes, copy.key_scales, pages, num_pages, last, 0.125), RATIO)
