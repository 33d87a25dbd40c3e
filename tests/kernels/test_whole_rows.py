"""whole_rows: a row reads its page table or its list of tokens, never both."""

from __future__ import annotations

import pytest
import torch

from tests.support.kernels import Implementation


@pytest.mark.parametrize("min_context", [0, 1, 40, 10**6])
@pytest.mark.parametrize("heads", [1, 3, 8])
def test_rows_that_list_everything_or_are_short_are_read_whole(
    implementation: Implementation, heads: int, min_context: int
) -> None:
    lens = [0, 1, 17, 39, 40, 41, 200, 131072] * 5  # more rows than a block
    generator = torch.Generator().manual_seed(0)
    context = torch.tensor(lens, dtype=torch.int32)
    listed = torch.randint(0, 3, (len(lens), heads), generator=generator)
    listed = torch.where(listed == 2, context[:, None], torch.where(listed == 1, context[:, None] - 1, context[:, None] // 3))
    listed = listed.clamp_min(0).int()
    pages = (context + 15) // 16
    op, device = implementation.function("whole_rows"), implementation.device
    found = op(listed.to(device), pages.to(device), context.to(device), min_context)
    of_pages, of_tokens = (x.cpu() for x in found)
    assert of_pages.dtype == of_tokens.dtype == torch.int32
    for b, n in enumerate(lens):
        for h in range(heads):
            whole = int(listed[b, h]) >= n or n < min_context
            assert int(of_pages[b, h]) == (int(pages[b]) if whole else 0)
            assert int(of_tokens[b, h]) == (0 if whole else int(listed[b, h]))


def test_counts_may_be_expanded_over_heads(implementation: Implementation) -> None:
    op, device = implementation.function("whole_rows"), implementation.device
    context = torch.tensor([20, 30], dtype=torch.int32, device=device)
    listed = torch.tensor([[20], [7]], dtype=torch.int32, device=device).expand(2, 4)
    of_pages, of_tokens = op(listed, context // 16 + 1, context)
    assert of_pages.tolist() == [[2] * 4, [0] * 4] and of_tokens.tolist() == [[0] * 4, [7] * 4]


def test_no_rows_have_no_counts(implementation: Implementation) -> None:
    none = torch.empty(0, dtype=torch.int32, device=implementation.device)
    of_pages, of_tokens = implementation.function("whole_rows")(none.view(0, 4), none, none)
    assert of_pages.shape == of_tokens.shape == (0, 4)
