"""count_attended: the numbers that a report is made of, exactly, whatever the batch is padded with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distributed_sparse.kernels.reference import count_attended_reference
from tests.support.kernels import Implementation

LISTS = {  # which of a selection's counts there are
    "pages": (),
    "pages and tokens": ("num_tokens",),
    "a partial result": ("num_tokens", "partial_num_pages", "partial_num_tokens"),
    "tokens read apart": ("num_tokens", "extra_tokens_read"),
    "everything": ("num_tokens", "partial_num_pages", "partial_num_tokens", "extra_tokens_read"),
}
GARBAGE = torch.iinfo(torch.int32).min


def counts_of(batch: int, heads: int, most: int) -> Tensor:
    """Counts in which none at all is common."""
    return torch.randint(most, (batch, heads), dtype=torch.int32) * torch.randint(2, (batch, heads), dtype=torch.int32)


def rows(batch: int, heads: int, page_size: int, lists: tuple[str, ...]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """num_pages, last_page_len, context_lens, and the optional counts, of contexts that some rows read whole."""
    context_lens = torch.randint(1, 40 * page_size, (batch,), dtype=torch.int32)
    last_page_len = (context_lens - 1) % page_size + 1
    whole = (context_lens + page_size - 1) // page_size
    num_pages = torch.where(torch.rand(batch, heads) < 0.3, whole[:, None], counts_of(batch, heads, 40)).int()
    return [num_pages, last_page_len, context_lens], {name: counts_of(batch, heads, 40) for name in lists}


def count(implementation: Implementation, required: list[Tensor], page_size: int, optional: dict[str, Tensor]) -> list[Tensor]:
    """The three counters, which have counted before."""
    device = implementation.device
    heads = required[0].shape[1]
    counters = [torch.arange(heads, device=device) + 10**i for i in (12, 3, 0)]
    on_device = {name: value.to(device) for name, value in optional.items()}
    op = implementation.function("count_attended")
    op(*counters, *(x.to(device) for x in required), page_size, **on_device)
    return [counter.cpu() - torch.arange(heads) - 10**i for counter, i in zip(counters, (12, 3, 0))]


@pytest.mark.parametrize("lists", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize(("batch", "heads", "page_size"), [(1, 1, 16), (5, 3, 32), (130, 2, 64), (300, 8, 16)])
def test_counters_grow_by_what_the_reference_counts(implementation, batch, heads, page_size, lists):
    torch.manual_seed(0)
    required, optional = rows(batch, heads, page_size, lists)
    found = count(implementation, required, page_size, optional)
    expected = count_attended_reference(*required, page_size, **optional)
    assert [counter.tolist() for counter in found] == list(expected)


@pytest.mark.parametrize("lists", LISTS.values(), ids=LISTS)
def test_padded_rows_count_nothing_whatever_they_list(implementation, lists):
    torch.manual_seed(1)
    required, optional = rows(7, 3, 16, lists)
    alone = count(implementation, required, 16, optional)

    def pad(counts: Tensor, value: int) -> Tensor:
        return torch.cat([counts, torch.full_like(counts[:4], value)])

    for junk in (1, 7, GARBAGE):
        padded = [pad(required[0], junk), pad(required[1], junk), pad(required[2], 0)]
        together = count(implementation, padded, 16, {name: pad(counts, junk) for name, counts in optional.items()})
        assert all(torch.equal(one, other) for one, other in zip(alone, together))


def test_a_row_that_reads_its_whole_context_is_not_sparse_and_one_token_less_is(implementation):
    num_pages = torch.tensor([[3, 2], [1, 0], [0, 1]], dtype=torch.int32)
    num_tokens = torch.tensor([[0, 4], [0, 3], [16, 0]], dtype=torch.int32)
    required = [num_pages, torch.tensor([5, 4, 1], dtype=torch.int32), torch.tensor([37, 4, 17], dtype=torch.int32)]
    attended, sparse, apart = count(implementation, required, 16, {"num_tokens": num_tokens})
    assert attended.tolist() == [37 + 4 + 16, 21 + 4 + 3 + 1]
    assert sparse.tolist() == [1, 3]
    assert apart.tolist() == [0, 0]


def test_counts_that_are_the_same_for_every_head_need_no_copy(implementation):
    torch.manual_seed(2)
    (_, last_page_len, context_lens), _ = rows(9, 3, 16, ())
    whole = ((context_lens + 15) // 16)[:, None].expand(-1, 3)
    attended, sparse, _ = count(implementation, [whole, last_page_len, context_lens], 16, {})
    assert attended.tolist() == [int(context_lens.sum())] * 3
    assert sparse.tolist() == [0, 0, 0]


def test_a_batch_of_no_rows_counts_nothing(implementation):
    nothing = torch.zeros(0, dtype=torch.int32)
    counters = count(implementation, [torch.zeros(0, 2, dtype=torch.int32), nothing, nothing], 16, {})
    assert [counter.tolist() for counter in counters] == [[0, 0]] * 3
