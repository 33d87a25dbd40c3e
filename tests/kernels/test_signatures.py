"""signatures: every sign at its bit, and every word in its page."""

from __future__ import annotations

import pytest
import torch

from distributed_sparse.kernels.reference import signatures_reference
from tests.support.kernels import poison_

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 32), (7, 64), (1, 1, 96), (2, 8, 1024), (0, 4, 32)])
def test_words_equal_the_reference(implementation, shape, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    words = implementation.function("pack_signs", "signatures")(x.to(implementation.device)).cpu()
    assert words.dtype == torch.int32
    assert torch.equal(words, signatures_reference(x))


def test_only_what_is_above_zero_gives_a_one(implementation):
    """-0.0, 0.0 and NaN give none; the smallest and infinite values count; bit 31 is the sign of the word."""
    x = torch.tensor([0.0, -0.0, float("nan"), -1.0, float("-inf"), 1e-45, float("inf")] + [-1.0] * 24 + [1.0])
    (word,) = implementation.function("pack_signs", "signatures")(x.to(implementation.device)).tolist()
    assert word & 0xFFFFFFFF == 1 << 5 | 1 << 6 | 1 << 31


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "group", "words"), [(2, 4, 1), (3, 1, 2), (1, 5, 3)])
def test_new_tokens_are_written_into_their_pages_and_nothing_else_is(implementation, heads, group, words, dtype):
    torch.manual_seed(1)
    page_size = 16
    x = torch.randn(30, heads * group, 32 * words).to(dtype)
    runs = [(4, 0, 0, 16), (2, 16, 3, 5), (5, 21, 15, 1), (0, 22, 0, 0), (1, 25, 0, 5)]  # page, start, offset, count
    columns = torch.tensor(runs, dtype=torch.int32).T.contiguous()
    before = poison_(torch.empty(6, heads, page_size, group, words, dtype=torch.int32))
    expected = before.clone()
    for page, start, offset, count in runs:
        packed = signatures_reference(x[start : start + count]).view(count, heads, group, words)
        expected[page, :, offset : offset + count] = packed.transpose(0, 1)
    signatures = before.to(implementation.device)
    arguments = [tensor.to(implementation.device) for tensor in (x, *columns.unbind(0))]
    implementation.function("append_signatures", "signatures")(*arguments, signatures)
    assert torch.equal(signatures.cpu(), expected)


def test_a_step_without_new_tokens_writes_nothing(implementation):
    signatures = poison_(torch.empty(2, 1, 16, 1, 1, dtype=torch.int32)).to(implementation.device)
    before = signatures.clone()
    op, x = implementation.function("append_signatures", "signatures"), torch.ones(1, 1, 32, device=implementation.device)
    for runs in (0, 2):
        op(x, *[torch.zeros(runs, dtype=torch.int32, device=implementation.device)] * 4, signatures)
    assert torch.equal(signatures, before)
