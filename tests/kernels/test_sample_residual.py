"""sample_residual: exactly the residual, every subset equally likely, and the same bits wherever a row is drawn."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from distributed_sparse.kernels.reference import sample_residual_reference
from distributed_sparse.kernels.vattention.sample_residual import PILOT, SAMPLE
from tests.support.kernels import TORCH, Implementation, poison_

PAGE_SIZE = 16


@dataclass
class Rows:
    """The arguments of one call; a row is one (sequence, KV head)."""

    chosen: Tensor
    num_chosen: Tensor
    page_table: Tensor
    context_lens: Tensor
    num_samples: Tensor
    random_key: Tensor
    block_tokens: int
    layer: int = 5
    first_kv_head: int = 0
    draw: int = SAMPLE
    capacity: int | None = None

    def slots(self, implementation: Implementation) -> Tensor:
        capacity = self.capacity or int(self.num_samples.max().clamp(min=1))
        tensors = (self.chosen, self.num_chosen, self.page_table, self.context_lens, self.num_samples, self.random_key)
        op, device = implementation.function("sample_residual"), implementation.device
        result = op(*(x.to(device) for x in tensors), page_size=PAGE_SIZE, capacity=capacity, **self.key_options()).cpu()
        assert result.dtype == torch.int32 and result.shape == (*self.num_chosen.shape, capacity)
        return result

    def listed(self, implementation: Implementation) -> list[list[list[int]]]:
        slots = self.slots(implementation)
        return [[slots[b, h, :n].tolist() for h, n in enumerate(counts)] for b, counts in enumerate(self.num_samples.tolist())]

    def key_options(self) -> dict[str, Any]:
        options = ("block_tokens", "layer", "first_kv_head", "draw")
        return {name: getattr(self, name) for name in options}

    def expected(self) -> list[list[list[int]]]:
        tensors = (self.chosen, self.num_chosen, self.page_table, self.context_lens, self.num_samples, self.random_key)
        return sample_residual_reference(*tensors, page_size=PAGE_SIZE, **self.key_options())


def rows(context_lens: list[int], num_chosen: list[list[int]], num_samples: list[list[int]] | None, block_tokens: int) -> Rows:
    """Random chosen blocks and scattered tables, poisoned past their counts; as many samples as tokens where None."""
    n, count = torch.tensor(context_lens, dtype=torch.int32), torch.tensor(num_chosen, dtype=torch.int32)
    blocks = [-(-length // block_tokens) for length in context_lens]
    chosen = poison_(torch.empty(*count.shape, max(int(count.max()), 1), dtype=torch.int32))
    for b, num_blocks in enumerate(blocks):
        for h, some in enumerate(num_chosen[b]):
            if block_tokens > 1 and some:  # the newest block, which may be partial, is always chosen
                picked = torch.cat([torch.randperm(num_blocks - 1)[: some - 1], torch.tensor([num_blocks - 1])])
            else:
                picked = torch.randperm(num_blocks)[:some]
            chosen[b, h, :some] = picked.sort().values
    width = max(-(-length // PAGE_SIZE) for length in context_lens) + 2
    table = poison_(torch.empty(len(context_lens), width, dtype=torch.int32))
    for b, length in enumerate(context_lens):
        used = -(-length // PAGE_SIZE)
        table[b, :used] = torch.randperm(2 * width)[:used]
    residual = (torch.tensor(blocks)[:, None] - count) * block_tokens
    samples = residual.int() if num_samples is None else torch.tensor(num_samples, dtype=torch.int32)
    key = torch.randint(2**32, (4, len(context_lens)))
    return Rows(chosen, count, table, n, samples, key, block_tokens)


def draws(trials: int, num_residual: int, count: int, **options: Any) -> Tensor:
    """int64 [trials, count]: positions drawn under seeds 0, 1, 2, ... from a context of which nothing is chosen."""
    seeds, zeros = torch.arange(trials), torch.zeros(trials, 1, dtype=torch.int32)
    key = torch.stack([seeds, *torch.zeros(2, trials, dtype=torch.long), torch.full((trials,), num_residual)])
    for i, name in enumerate(("seed", "seed_high", "sample_index", "position")):
        key[i] += options.pop(name, 0)
    table = torch.arange(-(-num_residual // PAGE_SIZE), dtype=torch.int32).expand(trials, -1)
    lengths, counts = torch.full((trials,), num_residual).int(), torch.full((trials, 1), count).int()
    return Rows(zeros[:, None], zeros, table, lengths, counts, key, 1, **options).slots(TORCH)[:, 0].long()


def assert_uniform(cells: Tensor, num_cells: int) -> None:
    """Chi-square of equal cells: p > 1e-4."""
    observed = cells.bincount(minlength=num_cells).double()
    assert len(observed) == num_cells
    expected = len(cells) / num_cells
    assert chi2.sf(float(((observed - expected) ** 2 / expected).sum()), num_cells - 1) > 1e-4


@pytest.mark.parametrize("num_residual", [1, 2, 5, 64, 129])
def test_all_of_a_residual_is_drawn_each_token_once(implementation, num_residual):
    torch.manual_seed(num_residual)
    case = rows([num_residual + 9], [[9, 9]], None, 1)
    result = case.listed(implementation)
    assert result == case.expected()
    taken = set(case.chosen[0, 0].tolist())
    residual = [int(case.page_table[0, i // PAGE_SIZE]) * PAGE_SIZE + i % PAGE_SIZE for i in range(num_residual + 9)]
    assert sorted(result[0][0]) == sorted(slot for i, slot in enumerate(residual) if i not in taken)


@pytest.mark.parametrize("block_tokens", [1, PAGE_SIZE])
def test_rows_of_unequal_lengths_choices_and_samples_equal_the_reference(implementation, block_tokens):
    torch.manual_seed(0)
    if block_tokens == 1:
        num_chosen = [[0, 17, 300], [40, 1, 39], [0, 0, 0], [150, 2, 60]]
        num_samples = [[70, 300, 9], [0, 39, 1], [0, 0, 0], [3, 0, 100]]
    else:
        num_chosen = [[1, 5, 33], [3, 1, 2], [0, 0, 0], [9, 11, 1]]
        num_samples = [[70, 300, 16], [0, 32, 16], [0, 0, 0], [32, 0, 100]]
    case = rows([537, 40, 0, 163], num_chosen, num_samples, block_tokens)
    result = case.listed(implementation)
    assert result == case.expected()
    for b, heads in enumerate(result):
        for h, drawn in enumerate(heads):
            assert len(set(drawn)) == len(drawn) == num_samples[b][h]


@pytest.mark.parametrize("exponent", [15, 20, 24])
def test_long_contexts_equal_the_reference(implementation, exponent):
    n = 2**exponent - 3 if exponent % 2 else 2**exponent
    table = torch.arange(-(-n // PAGE_SIZE), dtype=torch.int32)[None]
    count, length = torch.tensor([[300]]).int(), torch.tensor([n]).int()
    nothing = torch.zeros(1, 1, dtype=torch.int32)
    case = Rows(nothing[None], nothing, table, length, count, torch.tensor([[7], [2**32 - 1], [1], [n]]), 1)
    result = case.listed(implementation)
    assert result == case.expected()
    assert max(result[0][0]) > n / 2


def test_a_row_has_the_same_bits_in_any_batch_order_rank_capacity_and_page_placement(implementation):
    """Promise A: the sample of a KV head does not tell which rank drew it, or beside what."""
    torch.manual_seed(1)
    case = rows([400, 150, 90], [[4, 3, 5]] * 3, [[30, 200, 10], [60, 0, 20], [16, 5, 1]], PAGE_SIZE)
    together = case.listed(implementation)
    for b in range(3):
        for h in range(3):
            alone = replace(
                case,
                chosen=case.chosen[b : b + 1, h : h + 1],
                num_chosen=case.num_chosen[b : b + 1, h : h + 1],
                page_table=case.page_table[b : b + 1] + 3,
                context_lens=case.context_lens[b : b + 1],
                num_samples=case.num_samples[b : b + 1, h : h + 1],
                random_key=case.random_key[:, b : b + 1],
                first_kv_head=h,
                capacity=300,
            )
            assert [slot - 3 * PAGE_SIZE for slot in alone.listed(implementation)[0][0]] == together[b][h]


def test_fewer_samples_are_the_first_of_more(implementation):
    torch.manual_seed(2)
    case = rows([300], [[20]], [[200]], 1)
    fewer = replace(case, num_samples=torch.tensor([[37]]).int())
    assert fewer.listed(implementation)[0][0] == case.listed(implementation)[0][0][:37]


def test_every_part_of_the_key_changes_the_sample(implementation):
    torch.manual_seed(3)
    case = rows([300], [[20]], [[100]], 1)
    samples = [case.listed(implementation)[0][0]]
    for i in range(4):
        key = case.random_key.clone()
        key[i] ^= 1
        samples.append(replace(case, random_key=key).listed(implementation)[0][0])
    others: tuple[dict[str, Any], ...] = (
        {"layer": 6},
        {"layer": 5 + 4000},
        {"first_kv_head": 1},
        {"first_kv_head": 4095},
        {"draw": PILOT},
    )
    for other in others:
        changed = replace(case, **other)
        samples.append(changed.listed(implementation)[0][0])
        assert samples[-1] == changed.expected()[0][0]
    assert len({tuple(sample) for sample in samples}) == len(samples)


# Statistics of the torch path alone: the others draw the same bits.


@pytest.mark.parametrize(("num_residual", "count"), [(5, 2), (7, 3), (9, 4)])
def test_every_subset_is_equally_likely(num_residual, count):
    drawn = draws(60_000, num_residual, count)
    codes = torch.zeros(len(drawn), num_residual, dtype=torch.long).scatter_(1, drawn, 1) @ (2 ** torch.arange(num_residual))
    subsets, cells = codes.unique(return_inverse=True)
    assert_uniform(
        cells,
        int(torch.tensor(range(1, count + 1)).add(num_residual - count).prod() / torch.tensor(range(1, count + 1)).prod()),
    )
    assert all(int(code).bit_count() == count for code in subsets)


@pytest.mark.parametrize(("num_residual", "count"), [(40, 10), (100, 30), (130, 60)])
def test_every_token_and_every_pair_is_as_often_in_the_sample(num_residual, count):
    """Inclusion is not independent: the counts' covariance is that of draws without replacement, in both tests."""
    trials, n, b = 20_000, num_residual, count
    member = torch.zeros(trials, n).scatter_(1, draws(trials, n, b), 1.0)
    single = member.sum(dim=0).double()
    p = b / n
    statistic = ((single - trials * p) ** 2).sum() / (trials * p * (1 - p)) * (n - 1) / n
    assert chi2.sf(float(statistic), n - 1) > 1e-4

    pairs = (member.T @ member).double()[*torch.triu_indices(n, n, 1)]
    p2 = b * (b - 1) / (n * (n - 1))
    p3 = p2 * (b - 2) / (n - 2)
    same, shared, apart = p2 - p2**2, p3 - p2**2, p3 * (b - 3) / (n - 3) - p2**2
    # Eigenvalues of that covariance (the Johnson scheme J(n, 2)), and how many of each.
    of_tokens, of_pairs = same + shared * (n - 4) + apart * (3 - n), same - 2 * shared + apart
    degrees = (n - 1, n * (n - 3) // 2)
    mean = of_tokens * degrees[0] + of_pairs * degrees[1]
    variance = 2 * (of_tokens**2 * degrees[0] + of_pairs**2 * degrees[1])
    statistic = ((pairs - trials * p2) ** 2).sum() / trials
    equivalent = 2 * mean**2 / variance  # degrees of freedom of the chi-square with this mean and variance
    p_value = chi2.sf(float(statistic) * equivalent / mean, equivalent)
    assert 1e-4 < p_value < 1 - 1e-4


@pytest.mark.parametrize("place", [0, 1, 17])
def test_every_place_of_the_sample_is_uniform(place):
    assert_uniform(draws(40_000, 600, place + 1)[:, place], 600)


def test_the_first_two_drawn_are_a_uniform_pair():
    first, second = draws(60_000, 24, 2).unbind(1)
    assert_uniform(first * 23 + second - (second > first).long(), 24 * 23)


@pytest.mark.parametrize(
    "other",
    [
        {"draw": PILOT},
        {"layer": 6},
        {"first_kv_head": 1},
        {"seed": 1},
        {"seed_high": 1},
        {"sample_index": 1},
        {"position": 1},
    ],
    ids=lambda other: next(iter(other)),
)
def test_draws_under_different_keys_are_independent(other):
    n = 20
    here, there = draws(40_000, n, 1)[:, 0], draws(40_000, n, 1, **other)[:, 0]
    assert_uniform(here * n + there, n * n)
