"""top_k_pages: exact, forced pages included, ties to the lower page, lists in logical order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distributed_sparse.kernels.reference import top_k_pages_reference
from tests.support.kernels import Implementation, poison_


def select(
    implementation: Implementation,
    scores: Tensor,
    num_pages: list[int],
    k: list[int],
    *,
    sink_pages: int = 1,
    recent_pages: int = 1,
    capacity: int | None = None,
) -> list[list[list[int]]]:
    """The selected physical pages of every row, checked against the reference; scores are poisoned past each row."""
    batch, _, width = scores.shape
    table = poison_(torch.empty(batch, width, dtype=torch.int32))
    for b, n in enumerate(num_pages):
        table[b, :n] = torch.randperm(4 * width)[:n]  # physical order has nothing to do with logical order
        poison_(scores[b, :, n:])
    counts = [min(*pair) for pair in zip(num_pages, k)]
    n_tensor, k_tensor = torch.tensor(num_pages, dtype=torch.int32), torch.tensor(k, dtype=torch.int32)
    pages, result_counts = implementation.function("top_k_pages")(
        *(x.to(implementation.device) for x in (scores, table, n_tensor, k_tensor)),
        sink_pages=sink_pages,
        recent_pages=recent_pages,
        capacity=capacity or max(*counts, 1),
    )
    assert pages.dtype == result_counts.dtype == torch.int32
    assert result_counts.tolist() == [[count] * scores.shape[1] for count in counts]
    rows = [[pages[b, h, :n].tolist() for h in range(scores.shape[1])] for b, n in enumerate(counts)]
    assert rows == top_k_pages_reference(scores, table, n_tensor, k_tensor, sink_pages=sink_pages, recent_pages=recent_pages)
    return rows


@pytest.mark.parametrize(("sink_pages", "recent_pages"), [(0, 0), (1, 1), (0, 3), (2, 1)])
def test_rows_of_unequal_lengths_and_budgets_select_what_a_stable_sort_selects(implementation, sink_pages, recent_pages):
    torch.manual_seed(0)
    num_pages, k = [97, 64, 1, 0, 33, 96, 5], [13, 64, 1, 4, 32, 1, 100]
    select(implementation, torch.randn(7, 3, 100), num_pages, k, sink_pages=sink_pages, recent_pages=recent_pages)


@pytest.mark.parametrize("distinct", [1, 2, 5])
def test_ties_keep_the_lower_pages(implementation, distinct):
    torch.manual_seed(1)
    scores = torch.randint(distinct, (3, 2, 77)).float()
    select(implementation, scores, [77, 70, 50], [20, 33, 49])


def test_zeros_of_both_signs_tie(implementation):
    scores = torch.tensor([[[-0.0, 0.0, -0.0, 0.0, -1.0, 1.0]]])
    select(implementation, scores, [6], [3], sink_pages=0, recent_pages=0)


def test_negative_huge_tiny_and_infinite_scores_keep_their_order(implementation):
    torch.manual_seed(2)
    values = [float("-inf"), -3e38, -1e-40, -1e-45, 0.0, 1e-45, 1e-40, 1.0, 1.0000001, 3e38, float("inf")]
    scores = torch.tensor(values)[torch.randperm(len(values))].view(1, 1, -1)
    for k in range(1, len(values)):
        select(implementation, scores.clone(), [len(values)], [k], sink_pages=0, recent_pages=0)


def test_scores_that_differ_in_their_last_bit_alone_are_told_apart(implementation):
    torch.manual_seed(3)
    images = torch.randperm(300)[:120] + 0x40490F00  # float32 images around pi
    scores = images.to(torch.int32).view(torch.float32).view(1, 1, -1)
    select(implementation, scores, [120], [31], sink_pages=0, recent_pages=0)


def test_forced_pages_stay_however_bad_their_scores(implementation):
    scores = torch.arange(20.0).view(1, 1, -1)
    scores[..., -2:] = -100
    ((row,),) = select(implementation, scores, [20], [6], sink_pages=2, recent_pages=2)
    assert len(row) == 6


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_forced_pages_beyond_the_budget_keep_the_newest_then_the_sinks(implementation, k):
    select(implementation, torch.randn(1, 2, 30), [30], [k], sink_pages=3, recent_pages=2)


def test_a_row_within_its_budget_is_the_identity_list(implementation):
    """What makes a sparse method bitwise dense when its budget covers the context."""
    torch.manual_seed(4)
    table_order = torch.randn(2, 2, 40)
    rows = select(implementation, table_order, [40, 17], [40, 90], capacity=64)
    assert [len(row) for row in rows[0] + rows[1]] == [40, 40, 17, 17]


def test_the_largest_table_is_searched_in_tiles(implementation):
    torch.manual_seed(5)
    width = 3000 if implementation.is_interpreter else 32768 + 5
    scores = torch.randn(1, 1, width).mul(8).round()  # many ties across tiles
    select(implementation, scores, [width - 3], [500])


def test_a_row_selects_the_same_beside_any_other_row(implementation):
    torch.manual_seed(6)
    scores = torch.randint(4, (3, 2, 60)).float()
    table = torch.arange(180, dtype=torch.int32).view(3, 60)
    n, k = torch.tensor([60, 44, 13], dtype=torch.int32), torch.tensor([8, 30, 13], dtype=torch.int32)
    op, device = implementation.function("top_k_pages"), implementation.device
    forced = {"sink_pages": 1, "recent_pages": 1, "capacity": 30}
    together, _ = op(*(x.to(device) for x in (scores, table, n, k)), **forced)
    for b in range(3):
        alone, counts = op(*(x[b : b + 1].to(device) for x in (scores, table, n, k)), **forced)
        assert torch.equal(alone[0, :, : counts[0, 0]], together[b, :, : counts[0, 0]])


def test_a_nan_score_harms_no_other_row_and_no_count(implementation: Implementation) -> None:
    scores = torch.arange(24, dtype=torch.float32).view(1, 2, 12).clone()
    scores[0, 0, 5] = float("nan")
    table = torch.arange(100, 112, dtype=torch.int32)[None]
    arguments = [x.to(implementation.device) for x in (scores, table, torch.tensor([12]).int(), torch.tensor([4]).int())]
    pages, counts = implementation.function("top_k_pages")(*arguments, sink_pages=1, recent_pages=1, capacity=4)
    assert counts.tolist() == [[4, 4]]
    assert pages[0, 1].tolist() == [100, 109, 110, 111]
    assert pages[0, 0].tolist() == [100, 105, 110, 111]


@pytest.mark.parametrize("most", [0, 1, 128, 255, 256, 65535])
@pytest.mark.parametrize(("sink_pages", "recent_pages"), [(0, 0), (2, 1)])
def test_counts_select_what_a_stable_sort_selects(implementation, most, sink_pages, recent_pages):
    """int32 scores: what HashAttention ranks by. Most of them tie."""
    torch.manual_seed(7)
    num_pages, k = [97, 64, 1, 0, 33, 96, 5], [13, 64, 1, 4, 32, 1, 100]
    scores = torch.randint(most + 1, (7, 3, 100), dtype=torch.int32)
    scores[0, 0, 20] = most
    select(implementation, scores, num_pages, k, sink_pages=sink_pages, recent_pages=recent_pages)


def test_counts_of_a_long_context_are_searched_in_tiles(implementation):
    torch.manual_seed(8)
    width = 3000 if implementation.is_interpreter else 32768 + 5
    select(implementation, torch.randint(40, 90, (1, 1, width), dtype=torch.int32), [width - 3], [1500])


def test_equal_counts_keep_the_lower_pages(implementation):
    scores = torch.full((1, 2, 50), 7, dtype=torch.int32)
    scores[0, 1, 40] = 8
    rows = select(implementation, scores, [50], [10], sink_pages=0, recent_pages=0)
    assert len(rows[0][1]) == 10
