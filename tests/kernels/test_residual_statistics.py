"""residual_statistics: the moments that size vAttention's sample, as their definitions give them in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed_sparse.kernels.reference import attend_reference, residual_statistics_reference
from distributed_sparse.kernels.vattention.residual_statistics import ResidualStatistics
from tests.support.kernels import Implementation, assert_near, bits, poison_

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RATIO = 3e-5  # all sums are float32 from equal bits; squares of squares lose the most
PAGE_SIZE = 16
FIELDS = ResidualStatistics._fields


@dataclass
class Rows:
    """The arguments of one call."""

    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    tokens: Tensor
    num_tokens: Tensor
    num_residual: Tensor
    out: Tensor
    lse: Tensor
    centred: bool = True

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.q, self.k_pages, self.v_pages, self.tokens, self.num_tokens, self.num_residual

    def on(self, implementation: Implementation) -> ResidualStatistics:
        op, device = implementation.function("residual_statistics"), implementation.device
        partial = (self.out.to(device), self.lse.to(device))
        result = op(*(x.to(device) for x in self.arguments()), partial, self.scale(), centred=self.centred)
        assert all(x.dtype == torch.float32 and x.shape == self.q.shape[:2] for x in result)
        return ResidualStatistics(*(x.cpu() for x in result))

    def expected(self) -> ResidualStatistics:
        return residual_statistics_reference(*self.arguments(), (self.out, self.lse), self.scale(), centred=self.centred)

    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5


def rows(
    counts: list[list[int]],
    group: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
    *,
    spread: float = 1.0,
    mean: float = 0.0,
    chosen_lse: float = 2.0,
    extra: int = 3,
) -> Rows:
    """Pilots of ``counts`` tokens over scattered slots; caches and lists are poisoned wherever no pilot points."""
    num_tokens = torch.tensor(counts, dtype=torch.int32)
    (batch, heads), most = num_tokens.shape, int(num_tokens.max())
    num_pages = -(-2 * most // PAGE_SIZE) + 1
    k_pages, v_pages = (poison_(torch.empty(num_pages, heads, PAGE_SIZE, dim, dtype=dtype)) for _ in range(2))
    tokens = poison_(torch.empty(batch, heads, most + extra, dtype=torch.int32))
    for b in range(batch):
        for h in range(heads):
            slots = torch.randperm((num_pages - 1) * PAGE_SIZE)[: counts[b][h]] + PAGE_SIZE
            tokens[b, h, : len(slots)] = slots
            k_pages[slots // PAGE_SIZE, h, slots % PAGE_SIZE] = (spread * torch.randn(len(slots), dim)).to(dtype)
            v_pages[slots // PAGE_SIZE, h, slots % PAGE_SIZE] = (mean + torch.randn(len(slots), dim)).to(dtype)
    q = torch.randn(batch, heads * group, dim).to(dtype)
    out, lse = torch.randn(batch, heads * group, dim) + mean, chosen_lse + torch.rand(batch, heads * group)
    return Rows(q, k_pages, v_pages, tokens, num_tokens, 7 * num_tokens + 5, out, lse)


def assert_statistics_near(result: ResidualStatistics, expected: ResidualStatistics, ratio: float) -> None:
    for name, got, want in zip(FIELDS, result, expected):
        defined = ~want.isnan()
        assert defined.any()
        relative = (got.double() / want - 1)[defined]  # row by row: rows are of unlike sizes
        assert relative.abs().max() <= ratio, f"{name}: {relative.abs().max():.3g}"


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "group", "dim"), [(2, 2, 128), (1, 1, 64), (1, 3, 96), (1, 8, 256)])
def test_statistics_equal_their_definitions(implementation, heads, group, dim, dtype, centred):
    torch.manual_seed(0)
    counts = [700, 129, 128]
    if implementation.is_interpreter:
        counts, group = [133 if dtype == torch.float32 and centred else 20], min(group, 3)
    case = replace(rows([[count] * heads for count in counts], group, dim, dtype), centred=centred)
    assert_statistics_near(case.on(implementation), case.expected(), RATIO)


def test_pilots_of_unequal_sizes_stand_side_by_side(implementation):
    torch.manual_seed(1)
    case = rows([[2, 3, 17], [64, 0, 1], [33, 127, 33]], 1 if implementation.is_interpreter else 2, 64)
    assert_statistics_near(case.on(implementation), case.expected(), 2e-4)


@pytest.mark.parametrize("case", ["heavy tail", "mean far from zero", "chosen part dominates", "nothing chosen", "flat"])
def test_unlike_distributions_equal_their_definitions(implementation, case):
    torch.manual_seed(2)
    options: dict[str, Any] = {
        "heavy tail": {"spread": 3.0},
        "mean far from zero": {"mean": 8.0},
        "chosen part dominates": {"chosen_lse": 12.0},
        "nothing chosen": {"chosen_lse": float("-inf")},
        "flat": {"spread": 0.01, "mean": 1.0},
    }[case]
    pilot = rows([[70]] if implementation.is_interpreter else [[300], [150]], 3, 64, **options)
    if case == "nothing chosen":
        poison_(pilot.out)  # an empty part's output is never read
    # Where one token outweighs all others, or the mean the spread, a difference of near equals is left.
    assert_statistics_near(pilot.on(implementation), pilot.expected(), 1e-3)


def test_logits_far_beyond_the_range_of_exp_stay_finite(implementation):
    torch.manual_seed(3)
    case = rows([[50]], 2, 64, chosen_lse=300.0)
    case.q *= 100.0
    case.lse[0, 1] = -500.0
    result = case.on(implementation)
    assert all(x.isfinite().all() for x in result)
    assert_near(result.denominator, case.expected().denominator, 1e-4)


def test_kurtosis_is_right_where_the_chosen_part_leaves_the_residual_next_to_nothing(implementation):
    """Fourth powers of e^(s - M) would underflow float32 here."""
    torch.manual_seed(4)
    case = rows([[60]], 2, 64, chosen_lse=30.0)
    result, expected = case.on(implementation), case.expected()
    assert_near(result.weight_kurtosis, expected.weight_kurtosis, 1e-4)
    assert_near(result.kurtosis, expected.kurtosis, 1e-4)


def test_equal_weights_and_equal_values_have_no_spread_and_a_kurtosis_of_one(implementation):
    case = rows([[40]], 1, 64)
    slots = case.tokens[0, 0, :40].long()
    case.k_pages[slots // PAGE_SIZE, 0, slots % PAGE_SIZE] = 0.5
    case.v_pages[slots // PAGE_SIZE, 0, slots % PAGE_SIZE] = 0.0
    case = replace(case, out=torch.zeros_like(case.out))
    result = case.on(implementation)
    assert result.weight_kurtosis.item() == result.kurtosis.item() == 1.0
    assert result.weight_variance.item() == result.trace.item() == result.trace_of_square.item() == 0.0


def test_the_squared_trace_never_implies_more_directions_than_channels(implementation):
    """nu = Tr^2 / Tr(square) <= d: with few pilot tokens the estimate less its bias can fall below that."""
    torch.manual_seed(5)
    case = rows([[3 + 8 * i] for i in range(5)], 4, 64, spread=0.1)
    result, expected = case.on(implementation), case.expected()
    floor = expected.trace.square() / 64
    at_floor = expected.trace_of_square <= floor * (1 + 1e-12)
    assert at_floor.any() and not at_floor.all()
    assert (result.trace.square() / result.trace_of_square <= 64 * (1 + 1e-5)).all()
    assert_statistics_near(result, expected, 1e-3)


def test_denominator_and_numerator_of_a_pilot_of_the_whole_residual_are_those_of_dense_attention(implementation):
    torch.manual_seed(6)
    case = rows([[50]], 4, 64)
    case = replace(case, num_residual=case.num_tokens)
    chosen, none = torch.zeros(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    listed: dict[str, Any] = {"tokens": case.tokens, "num_tokens": case.num_tokens, "partial": (case.out, case.lse)}
    out, _ = attend_reference(case.q, case.k_pages, case.v_pages, chosen, none, none[0], case.scale(), **listed)
    result = case.on(implementation)
    norm = result.numerator_norm_sq.double() / result.denominator.double() ** 2
    assert_near(norm, out.square().sum(-1), 1e-5)


def test_a_row_has_the_same_bits_in_any_batch_with_any_heads_and_any_width(implementation, one_thread):
    """Promise A: a rank that holds one KV head sizes the same sample as one that holds them all."""
    torch.manual_seed(7)
    heads, group, dim = (2, 1, 64) if implementation.is_interpreter else (8, 4, 128)
    counts = [50, 140, 33] if implementation.is_interpreter else [655, 300, 300]
    case = rows([[count] * heads for count in counts], group, dim)
    case.num_tokens[1, 0] -= 7  # a head of another size beside its like
    together = case.on(implementation)
    for b in range(3):
        for first, last in ((0, 1), (1, 2), (1, heads)):
            own, own_q = slice(first, last), slice(first * group, last * group)
            alone = replace(
                case,
                q=case.q[b : b + 1, own_q],
                k_pages=case.k_pages[:, own].contiguous(),
                v_pages=case.v_pages[:, own].contiguous(),
                tokens=case.tokens[b : b + 1, own, : int(case.num_tokens[b, own].max())],
                num_tokens=case.num_tokens[b : b + 1, own],
                num_residual=case.num_residual[b : b + 1, own],
                out=case.out[b : b + 1, own_q],
                lse=case.lse[b : b + 1, own_q],
            )
            for name, some, all_rows in zip(FIELDS, alone.on(implementation), together):
                assert torch.equal(bits(some[0]), bits(all_rows[b, own_q])), name
