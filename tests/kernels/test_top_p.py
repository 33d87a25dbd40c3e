"""top_p: the exact nucleus of every query head, their union, forced pages, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from distributed_sparse.kernels.reference import top_p_reference
from distributed_sparse.kernels.twilight.top_p import top_p
from tests.support.kernels import Implementation, bits, poison_

MASS = 1e-6
"""What float32 sums may be off by, as a share of a row's mass."""


@dataclass
class Candidates:
    """Rows of candidates: logits poisoned past each row, scattered pages poisoned past their counts."""

    logits: Tensor
    pages: Tensor
    num_pages: Tensor
    last_page_len: Tensor
    page_size: int

    @classmethod
    def of(cls, logits: Tensor, lengths: list[list[int]], page_size: int = 16) -> Candidates:
        """Row (b, h) has ``lengths[b][h]`` tokens; the rows of one sequence end at the same slot of their last pages."""
        batch, heads, width = len(lengths), len(lengths[0]), logits.shape[-1]
        group = logits.shape[1] // heads
        logits = logits.clone()
        pages = poison_(torch.empty(batch, heads, width // page_size, dtype=torch.int32))
        num_pages = -(-torch.tensor(lengths) // page_size)
        for b in range(batch):
            for h in range(heads):
                poison_(logits[b, h * group : (h + 1) * group, lengths[b][h] :])
                pages[b, h, : num_pages[b, h]] = torch.randperm(3 * pages.shape[2] + 1)[: num_pages[b, h]]
        last = torch.tensor([(max(of_heads) - 1) % page_size + 1 for of_heads in lengths])
        return cls(logits, pages, num_pages.int(), last.int(), page_size)

    def length(self, b: int, h: int) -> int:
        num_pages = int(self.num_pages[b, h])
        return (num_pages - 1) * self.page_size + int(self.last_page_len[b]) if num_pages else 0

    def slots(self, b: int, h: int) -> Tensor:
        """Physical slots of a row's tokens, in the order of the list."""
        position = torch.arange(self.length(b, h))
        return self.pages[b, h, position // self.page_size] * self.page_size + position % self.page_size

    def run(self, implementation: Implementation, p: float, **forced: int) -> tuple[Tensor, Tensor, Tensor]:
        tensors = (self.logits, self.pages, self.num_pages, self.last_page_len)
        forced = {"sink_pages": 0, "recent_pages": 0} | forced
        op, device = implementation.function("top_p"), implementation.device
        tokens, num_tokens, threshold = op(*(x.to(device) for x in tensors), p, page_size=self.page_size, **forced)
        return tokens.cpu(), num_tokens.cpu(), threshold.cpu()


def prune(implementation: Implementation, candidates: Candidates, p: float, **forced: int) -> list[list[Tensor]]:
    """Which tokens every row keeps, bool [B][H_kv] [n], checked against the definition in float64."""
    tokens, num_tokens, threshold = candidates.run(implementation, p, **forced)
    batch, heads, width = *candidates.num_pages.shape, candidates.logits.shape[-1]
    group, page_size = candidates.logits.shape[1] // heads, candidates.page_size
    assert tokens.dtype == num_tokens.dtype == torch.int32 and threshold.dtype == torch.float32
    assert tokens.shape == (batch, heads, width) and threshold.shape == candidates.logits.shape[:2]
    rows: list[list[Tensor]] = [[] for _ in range(batch)]
    for b in range(batch):
        for h in range(heads):
            n = candidates.length(b, h)
            position = torch.arange(n)
            expected = position < forced.get("sink_pages", 0) * page_size
            expected |= position // page_size >= int(candidates.num_pages[b, h]) - forced.get("recent_pages", 0)
            for i in range(h * group, (h + 1) * group):
                row = candidates.logits[b, i, :n]
                kept = row >= threshold[b, i]
                if n == 0:
                    assert threshold[b, i] == float("inf")
                elif p >= 1:
                    assert threshold[b, i] == float("-inf")
                else:
                    assert_is_the_smallest_set(row, kept, p)
                    assert threshold[b, i] == row[kept].min()  # a logit of the row, not a number between two
                    if implementation.name == "torch":
                        assert torch.equal(kept, top_p_reference(row, p))
                expected |= kept | (p >= 1)
            count = int(num_tokens[b, h])
            assert count == int(expected.sum())
            assert torch.equal(tokens[b, h, :count], candidates.slots(b, h)[expected])
            rows[b].append(expected)
    return rows


def assert_is_the_smallest_set(row: Tensor, kept: Tensor, p: float) -> None:
    """The kept mass is at least p, and would fall below p without its lowest tie class."""
    weights = row.double().softmax(0)
    assert weights[kept].sum() >= p - MASS
    assert weights[kept & (row > row[kept].min())].sum() < p + MASS


@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize(("heads", "group"), [(3, 1), (1, 3), (2, 4), (1, 8), (1, 16)])
def test_every_query_head_keeps_its_smallest_set_and_the_row_their_union(implementation, heads, group, page_size):
    torch.manual_seed(0)
    logits = 3 * torch.randn(3, heads * group, 320)
    lengths = [[320] * heads, [200 - page_size * h for h in range(heads)], [0] * heads]
    candidates = Candidates.of(logits, lengths, page_size)
    rows = prune(implementation, candidates, 0.9)
    assert 0 < rows[0][0].sum() < 320


@pytest.mark.parametrize("p", [0.01, 0.5, 0.85, 0.95, 0.999])
@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
def test_any_share_of_flat_and_of_peaked_rows_is_met_exactly(implementation, spread, p):
    torch.manual_seed(1)
    candidates = Candidates.of(spread * torch.randn(1, 4, 400), [[397, 397]])
    prune(implementation, candidates, p)


def test_candidates_that_lack_token_0_still_prune_to_the_exact_count(implementation):
    """The released kernel starts its search from the first token's weight: an unimportant one, and nothing is pruned."""
    torch.manual_seed(2)
    n = 1024 if implementation.is_interpreter else 8192
    logits = torch.randn(1, 1, n)
    logits[..., torch.randperm(n - 1)[: n // 16] + 1] += 9.0
    logits[..., 0] = -30.0
    ((kept,),) = prune(implementation, Candidates.of(logits, [[n]]), 0.95)
    exact = int(top_p_reference(logits[0, 0], 0.95).sum())
    assert exact <= n // 16 and int(kept.sum()) == exact


@pytest.mark.implementations("torch")
def test_131072_flat_candidates_keep_the_exact_set(implementation):
    """The released kernel stops its search at an absolute 1e-5, more than any token's weight here, and keeps all."""
    torch.manual_seed(3)
    n, exact = 131072, 46862
    row = 0.3 * torch.randn(n)
    weights = row.double().softmax(0)
    assert weights.max() < 1e-4
    p = float(weights.sort(descending=True).values[:exact].sum() - weights.median() / 2)
    ((kept,),) = prune(implementation, Candidates.of(row.view(1, 1, n), [[n]]), p)
    assert int(kept.sum()) == exact


@pytest.mark.parametrize("p", [1.0, 1.5])
def test_a_share_of_one_keeps_every_candidate_even_where_its_weight_underflows(implementation, p):
    torch.manual_seed(4)
    logits = torch.randn(2, 4, 96)
    logits[:, :, 1::2] -= 1e4
    logits[:, :, 5] = float("-inf")
    for of_heads in prune(implementation, Candidates.of(logits, [[96, 96], [33, 33]]), p):
        assert all(kept.all() for kept in of_heads)


@pytest.mark.parametrize("distinct", [1, 2, 7])
def test_ties_with_the_threshold_all_stay(implementation, distinct):
    torch.manual_seed(5)
    logits = torch.randint(distinct, (2, 4, 160)).float()
    rows = prune(implementation, Candidates.of(logits, [[160, 160], [75, 75]]), 0.6)
    if distinct == 1:
        assert all(kept.all() for of_heads in rows for kept in of_heads)


def test_zeros_of_both_signs_tie(implementation):
    logits = torch.full((1, 1, 16), -5.0)
    logits[..., :4] = torch.tensor([0.0, -0.0, -0.0, 0.0])
    ((kept,),) = prune(implementation, Candidates.of(logits, [[16]]), 0.3)
    assert kept.tolist() == [True] * 4 + [False] * 12
    logits[..., :4] *= -1
    assert torch.equal(prune(implementation, Candidates.of(logits, [[16]]), 0.3)[0][0], kept)


def test_logits_that_differ_in_their_last_bit_alone_are_told_apart(implementation):
    torch.manual_seed(6)
    images = torch.randperm(300)[:160] + 0x40490F00  # float32 images around pi
    logits = images.to(torch.int32).view(torch.float32).view(1, 1, 160)
    for signed in (logits, -logits):
        ((kept,),) = prune(implementation, Candidates.of(signed, [[160]]), 0.3)
        assert int(kept.sum()) == 48  # all weights are equal within 1e-4


def test_huge_and_tiny_logits_do_not_overflow(implementation):
    values = [float("-inf"), -3e38, -1e4, -1e-40, 0.0, 1e-40, 1.0, 60.0, 61.0, 61.5]
    logits = torch.tensor(values)[torch.randperm(len(values))].repeat(1, 1, 16)
    prune(implementation, Candidates.of(logits, [[160]]), 0.95)
    prune(implementation, Candidates.of(logits - 1e30, [[160]]), 0.95)
    prune(implementation, Candidates.of(3e38 * logits.clamp(-1, 1), [[160]]), 0.95)


def test_a_row_of_one_heavy_token_keeps_it_and_its_forced_pages(implementation):
    logits = torch.zeros(1, 1, 160)
    logits[..., 77] = 50.0
    ((kept,),) = prune(implementation, Candidates.of(logits, [[153]]), 0.95, sink_pages=1, recent_pages=2)
    assert kept.nonzero().flatten().tolist() == [*range(16), 77, *range(128, 153)]


@pytest.mark.parametrize(("sink_pages", "recent_pages"), [(0, 0), (1, 1), (2, 0), (0, 3), (9, 9)])
def test_forced_pages_stay_whole_and_may_exceed_the_row(implementation, sink_pages, recent_pages):
    torch.manual_seed(7)
    candidates = Candidates.of(5 * torch.randn(3, 4, 160), [[150, 150], [6, 6], [0, 0]])
    prune(implementation, candidates, 0.7, sink_pages=sink_pages, recent_pages=recent_pages)


def row_of_length(n: int, spread: float = 1.0) -> Candidates:
    width = -(-n // 16) * 16
    return Candidates.of(spread * torch.randn(1, 1, width), [[n]])


@pytest.mark.parametrize("n", [1, 2047, 2048, 2049, 8191, 8192, 8193, 8500])
def test_rows_about_the_lengths_at_which_the_search_changes_keep_their_smallest_set(implementation, n):
    torch.manual_seed(8)
    prune(implementation, row_of_length(n), 0.9)


@pytest.mark.parametrize("spread", [0.01, 8.0])
@pytest.mark.parametrize("n", [2000, 8200])
def test_flat_and_peaked_rows_of_every_search_are_met_exactly(implementation, n, spread):
    torch.manual_seed(13)
    candidates = row_of_length(n, spread)
    prune(implementation, candidates, 0.95)
    candidates.logits += 60.0  # images of another density
    prune(implementation, candidates, 0.5)


@pytest.mark.parametrize("n", [2000, 8200])
def test_a_crowd_of_almost_equal_logits_far_below_the_best_is_told_apart(implementation, n):
    """Halving the range of the values leaves hundreds of them together."""
    torch.manual_seed(14)
    candidates = row_of_length(n)
    candidates.logits[..., :n] = -4.0 - 1e-5 * torch.rand(n)
    candidates.logits[..., n // 2] = 0.0
    ((kept,),) = prune(implementation, candidates, 0.7)
    assert 0.5 < kept.float().mean() < 0.75


@pytest.mark.parametrize("n", [2000, 8200])
def test_a_share_as_near_to_one_as_float32_goes_is_met(implementation, n):
    torch.manual_seed(15)
    prune(implementation, row_of_length(n, 3.0), 1 - 2**-24)


def test_a_long_row_with_many_ties_is_searched_in_tiles(implementation):
    torch.manual_seed(8)
    candidates = row_of_length(8500 if implementation.is_interpreter else 33000, 8.0)
    candidates.logits.round_().div_(8)
    prune(implementation, candidates, 0.9)


@pytest.mark.not_interpreted
def test_rows_of_every_length_in_one_batch_keep_their_smallest_sets(implementation):
    """On a GPU, every way to search runs beside the others."""
    torch.manual_seed(16)
    lengths = [[8192, 33008], [1500, 1516], [8201, 2057], [70000, 8192]]  # of a sequence, all end at the same slot
    candidates = Candidates.of(2 * torch.randn(4, 8, 70016), lengths)
    for p in (0.5, 0.85, 0.95, 0.999):
        prune(implementation, candidates, p, sink_pages=1, recent_pages=1)


@pytest.mark.implementations("interpreter")
@pytest.mark.parametrize("page_size", [1, 2, 16])
def test_logits_that_no_wide_load_can_reach_are_read_like_their_copy(implementation, page_size):
    """Rows that start at odd places, an odd distance apart."""
    torch.manual_seed(17)
    candidates = Candidates.of(torch.randn(3, 2, 96), [[96, 96], [32, 32], [7, 7]], page_size)
    expected = candidates.run(implementation, 0.8)
    odd = torch.zeros(1 + 3 * 2 * 97)[1:].view(3, 2, 97)[..., :96]
    candidates.logits = odd.copy_(candidates.logits)
    for found, same in zip(candidates.run(implementation, 0.8), expected):
        assert torch.equal(bits(found), bits(same))


def test_one_list_expanded_over_all_heads_is_read_like_its_copy(implementation):
    torch.manual_seed(9)
    one = Candidates.of(torch.randn(2, 1, 80), [[80], [37]])
    logits = torch.randn(2, 6, 80)
    expanded = Candidates(logits, one.pages.expand(-1, 3, -1), one.num_pages.expand(-1, 3), one.last_page_len, 16)
    repeated = Candidates(logits, one.pages.repeat(1, 3, 1), one.num_pages.repeat(1, 3), one.last_page_len, 16)
    for left, right in zip(prune(implementation, expanded, 0.8), prune(implementation, repeated, 0.8)):
        assert all(torch.equal(*pair) for pair in zip(left, right))


def test_a_row_keeps_the_same_tokens_in_any_batch_with_any_heads_and_any_list_width(implementation, one_thread):
    """Promise A; the rows' lists differ in length, so they are padded in the batch and not alone."""
    torch.manual_seed(10)
    lengths = [[300, 284], [77, 77], [16, 0]]
    together = Candidates.of(torch.randn(3, 6, 320), lengths)
    tokens, num_tokens, threshold = together.run(implementation, 0.9, sink_pages=1, recent_pages=1)
    for b in range(3):
        for h in range(2):
            width = int(together.num_pages[b, h]) + 1
            alone = Candidates(
                together.logits[b : b + 1, 3 * h : 3 * h + 3, : width * 16],
                together.pages[b : b + 1, h : h + 1, :width],
                together.num_pages[b : b + 1, h : h + 1],
                together.last_page_len[b : b + 1],
                16,
            )
            own_tokens, own_count, own_threshold = alone.run(implementation, 0.9, sink_pages=1, recent_pages=1)
            count = int(num_tokens[b, h])
            assert int(own_count) == count
            assert torch.equal(own_tokens[0, 0, :count], tokens[b, h, :count])
            assert torch.equal(bits(own_threshold[0]), bits(threshold[b, 3 * h : 3 * h + 3]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nan_or_an_infinity_harms_no_other_row_and_no_count(implementation, value):
    torch.manual_seed(11)
    sound = Candidates.of(torch.randn(1, 4, 64), [[64, 64]])
    broken = Candidates(sound.logits.clone(), sound.pages, sound.num_pages, sound.last_page_len, 16)
    broken.logits[0, 1, 9] = value
    expected, counts, _ = sound.run(implementation, 0.8, recent_pages=1)
    tokens, broken_counts, _ = broken.run(implementation, 0.8, recent_pages=1)
    assert 16 <= broken_counts[0, 0] <= 64 and broken_counts[0, 1] == counts[0, 1]
    assert torch.equal(tokens[0, 1, : counts[0, 1]], expected[0, 1, : counts[0, 1]])
    assert torch.isin(tokens[0, 0, : broken_counts[0, 0]], broken.slots(0, 0)).all()


def test_the_op_runs_the_path_of_its_device():
    torch.manual_seed(12)
    candidates = Candidates.of(torch.randn(1, 2, 64), [[50]])
    tensors = (candidates.logits, candidates.pages, candidates.num_pages, candidates.last_page_len)
    tokens, num_tokens, _ = top_p(*tensors, 0.9, page_size=16, sink_pages=0, recent_pages=1)
    kept = top_p_reference(candidates.logits[0, 0, :50], 0.9) | top_p_reference(candidates.logits[0, 1, :50], 0.9)
    kept[48:] = True
    assert torch.equal(tokens[0, 0, : int(num_tokens)], candidates.slots(0, 0)[kept])
