"""hamming_scores: agreeing bits, counted exactly, at every token of a row and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distributed_sparse.kernels.reference import hamming_scores_reference
from tests.support.kernels import Implementation, poison_


def random_words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape).int()


def tables(context_lens: list[int], page_size: int) -> tuple[Tensor, Tensor]:
    """Scattered page tables, poisoned past their counts; page 0 is in none."""
    width = -(-max(context_lens) // page_size) + 1
    table = poison_(torch.empty(len(context_lens), width, dtype=torch.int32))
    for b, length in enumerate(context_lens):
        used = -(-length // page_size)
        table[b, :used] = torch.randperm(width)[:used] + 1
    return table, torch.tensor(context_lens, dtype=torch.int32)


def score(implementation: Implementation, *args: Tensor) -> Tensor:
    return implementation.function("hamming_scores")(*(x.to(implementation.device) for x in args)).cpu()


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize(("heads", "group", "words"), [(2, 4, 1), (3, 1, 1), (1, 5, 3), (2, 3, 2), (1, 1, 32), (1, 16, 32)])
def test_scores_equal_the_reference_and_are_minus_one_past_the_row(implementation, heads, group, words, page_size):
    torch.manual_seed(0)
    table, lengths = tables([131, 0, 1, 64], page_size)
    signatures = random_words(table.shape[1] + 1, heads, page_size, group, words)
    queries = random_words(4, heads * group, words)
    result = score(implementation, queries, signatures, table, lengths)
    assert result.dtype == torch.int32
    assert torch.equal(result, hamming_scores_reference(queries, signatures, table, lengths))


@pytest.mark.parametrize("words", [1, 2, 7, 8, 33])
def test_equal_signatures_score_all_their_bits_and_opposite_ones_none(implementation, words):
    torch.manual_seed(1)
    table, lengths = tables([16], 16)
    queries = random_words(1, 3, words)
    signatures = queries.view(1, 1, 1, 3, words).repeat(table.shape[1] + 1, 1, 16, 1, 1)
    signatures[:, :, 1::2].bitwise_not_()
    assert score(implementation, queries, signatures, table, lengths)[0, 0, :16].tolist() == [96 * words, 0] * 8


def test_a_row_scores_the_same_beside_any_other_row_and_head(implementation):
    torch.manual_seed(2)
    table, lengths = tables([200, 77], 16)
    signatures, queries = random_words(table.shape[1] + 1, 3, 16, 2, 1), random_words(2, 6, 1)
    together = score(implementation, queries, signatures, table, lengths)
    for b in range(2):
        for h in range(3):
            own = signatures[:, h : h + 1].contiguous()
            alone = score(implementation, queries[b : b + 1, 2 * h : 2 * h + 2], own, table[b : b + 1], lengths[b : b + 1])
            assert torch.equal(alone[0, 0], together[b, h])


@pytest.mark.not_interpreted
def test_a_long_context_is_scored_in_tiles(implementation):
    torch.manual_seed(3)
    table, lengths = tables([20_003], 16)
    signatures, queries = random_words(table.shape[1] + 1, 2, 16, 4, 1), random_words(1, 8, 1)
    result = score(implementation, queries, signatures, table, lengths)
    held = signatures[table[0, :-1].long()].transpose(0, 1).flatten(1, 2)[:, :20_003]  # [H_kv, tokens, G, W]
    differ = (queries.view(2, 1, 4, 1) ^ held).view(2, 20_003, 4)
    ones = torch.stack([(differ >> i & 1).sum(-1) for i in range(32)]).sum(0)
    assert torch.equal(result[0, :, :20_003].long(), 128 - ones)
