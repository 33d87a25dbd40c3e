"""page_scores: Quest's bound, computed right, a bound indeed, and the same bits whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distributed_sparse.kernels.quest.page_scores import page_scores
from distributed_sparse.kernels.reference import page_scores_reference
from tests.support.kernels import Implementation, assert_near, poison_

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RATIO = 1e-6  # products and sums are float32 whatever the dtype, and both sides start from the same bits
HEADS_AND_DIMS = [(1, 1, 64), (2, 3, 96), (1, 5, 128), (2, 7, 64), (1, 16, 256)]  # KV heads, group, head_dim


def metadata(num_pages: int, heads: int, dim: int, dtype: torch.dtype, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Keys [num_pages, H_kv, 16, d], and their min and max; page 0 is poisoned as nothing may depend on it."""
    k = (torch.randn(num_pages, heads, 1, dim) + spread * torch.randn(num_pages, heads, 16, dim)).to(dtype)
    page_min_max = torch.stack([k.amin(dim=2), k.amax(dim=2)], dim=2)
    poison_(page_min_max[0])
    return k, page_min_max


def tables(num_pages: list[int], width: int) -> tuple[Tensor, Tensor]:
    """Scattered page tables, poisoned past their counts."""
    table = poison_(torch.empty(len(num_pages), width, dtype=torch.int32))
    for b, n in enumerate(num_pages):
        table[b, :n] = torch.randperm(width)[:n] + 1
    return table, torch.tensor(num_pages, dtype=torch.int32)


def score(implementation: Implementation, *args: Tensor, group_reduction: str = "max") -> Tensor:
    return implementation.function("page_scores")(*(x.to(implementation.device) for x in args), group_reduction).cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "group", "dim"), HEADS_AND_DIMS)
def test_scores_equal_the_reference_and_are_minus_infinity_past_the_row(implementation, heads, group, dim, dtype):
    torch.manual_seed(0)
    width = 70  # more than one tile, and no multiple of it
    _, page_min_max = metadata(width + 1, heads, dim, dtype)
    table, num_pages = tables([width, 0, 1, 65], width)
    q = torch.randn(4, heads * group, dim).to(dtype)
    for group_reduction in ("max", "sum"):
        result = score(implementation, q, page_min_max, table, num_pages, group_reduction=group_reduction)
        expected = page_scores_reference(q, page_min_max, table, num_pages, group_reduction)
        assert result.dtype == torch.float32
        assert_near(result, expected, RATIO)


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-5])  # the narrower a page's keys, the less a rounded product may lose
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_key_of_a_page_exceeds_its_score(implementation, dtype, spread):
    torch.manual_seed(1)
    heads, group, dim, width = 2, 4, 128, 40
    k, page_min_max = metadata(width + 1, heads, dim, dtype, spread)
    table, num_pages = tables([width, 33], width)
    q = torch.randn(2, heads * group, dim).to(dtype)
    scores = score(implementation, q, page_min_max, table, num_pages)
    for b in range(2):
        keys = k[table[b, : num_pages[b]].long()].double()  # [pages, H_kv, 16, d]
        queries = q[b].double().view(heads, group, dim)
        truth = torch.einsum("hgd,phsd->hpgs", queries, keys).amax(dim=(2, 3))  # [H_kv, pages]
        bound = scores[b, :, : num_pages[b]].double()
        assert (bound >= truth - 1e-5 * bound.abs()).all()


def test_a_page_of_one_key_scores_exactly_that_key(implementation):
    """min = max = k: the bound is q.k itself, so a TF32 product would show."""
    torch.manual_seed(2)
    k = torch.randn(9, 1, 128)
    page_min_max = torch.stack([k, k], dim=2)
    table, num_pages = tables([8], 8)
    q = torch.randn(1, 1, 128)
    result = score(implementation, q, page_min_max, table, num_pages)
    assert_near(result[0, 0], k[table[0].long(), 0].double() @ q[0, 0].double(), RATIO)


def test_a_row_has_the_same_bits_in_any_batch_with_any_heads_and_any_table_width(implementation, one_thread):
    """Promise A: a rank that holds one KV head selects the same pages as one that holds them all."""
    torch.manual_seed(3)
    heads, group, dim, width = 8, 4, 128, 600  # tiles of every width
    lengths = [width - 3, 40, 65, 130, 400]
    if implementation.is_interpreter:
        heads, width, lengths = 3, 70, [67, 40, 65]
    _, page_min_max = metadata(width + 1, heads, dim, torch.float32)
    table, num_pages = tables(lengths, width)
    q = torch.randn(len(lengths), heads * group, dim)
    for group_reduction in ("max", "sum"):
        together = score(implementation, q, page_min_max, table, num_pages, group_reduction=group_reduction)
        for b, n in enumerate(lengths):
            for first, last in ((0, 1), (1, 3), (heads - 1, heads)):
                own = slice(first, last)
                of_rank = page_min_max[:, own].contiguous()
                row_table = torch.cat([table[b : b + 1, :n], torch.full((1, b), -5, dtype=torch.int32)], dim=1)
                alone = score(
                    implementation,
                    q[b : b + 1].view(1, heads, group, dim)[:, own].reshape(1, -1, dim),
                    of_rank,
                    row_table,
                    num_pages[b : b + 1],
                    group_reduction=group_reduction,
                )
                assert torch.equal(alone[0, :, :n], together[b, own, :n])


def test_a_page_scores_the_same_bits_at_any_place_of_the_table(implementation, one_thread):
    torch.manual_seed(4)
    _, page_min_max = metadata(72, 2, 64, torch.float32)
    table, num_pages = tables([71], 71)
    q = torch.randn(1, 6, 64)
    forward = score(implementation, q, page_min_max, table, num_pages)
    backward = score(implementation, q, page_min_max, table.flip(1), num_pages)
    assert torch.equal(forward, backward.flip(2))


@pytest.mark.implementations("torch")
@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_that_lie_side_by_side_score_the_bits_of_scattered_ones(implementation, one_thread, dtype):
    """What is read where it lies instead of gathered must not tell: another engine has the same pages elsewhere."""
    torch.manual_seed(5)
    _, scattered = metadata(701, 4, 128, dtype)
    table, num_pages = tables([640], 640)
    side_by_side = scattered.clone()
    side_by_side[33:673] = scattered[table[0].long()]
    run = torch.arange(33, 673, dtype=torch.int32)[None]
    broken = run.clone()
    broken[0, 300], side_by_side[700] = 700, side_by_side[333]
    q = torch.randn(1, 16, 128).to(dtype)
    expected = score(implementation, q, scattered, table, num_pages)
    assert torch.equal(score(implementation, q, side_by_side, run, num_pages), expected)
    assert torch.equal(score(implementation, q, side_by_side, broken, num_pages), expected)


def test_an_unknown_group_reduction_is_refused_by_name():
    empty = torch.zeros(1, 1, 64)
    with pytest.raises(ValueError, match="group_reduction='mean' is unknown; use 'max' or 'sum'"):
        page_scores(empty, torch.zeros(1, 1, 2, 64), torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1), "mean")
