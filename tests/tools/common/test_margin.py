"""The margin of a token: what tells a floating-point tie from a wrong result."""

from __future__ import annotations

import pytest
import torch

from distributed_sparse.protocol.step import SlotSetup
from distributed_sparse.sampling_params import SamplingParams
from distributed_sparse.shard.sampler import Draws, sample
from distributed_sparse.tools.common.margin import first_difference, relative_margin

GREEDY = SamplingParams(temperature=0.0)


def test_greedy_is_the_distance_of_the_two_best_in_standard_deviations_whatever_the_constant() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 2.5])
    expected = 0.5 / float(logits.std())
    assert relative_margin(logits, GREEDY, 0, 7) == pytest.approx(expected)
    assert relative_margin(logits.log_softmax(0), GREEDY, 0, 7) == pytest.approx(expected, rel=1e-5)


def test_a_draw_s_margin_is_by_how_much_the_sampler_s_own_choice_won() -> None:
    """Lowering the drawn token's logit by just more than the margin makes the sampler draw another; by less it does not."""
    params = SamplingParams(temperature=1.0, seed=11)
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    setup = SlotSetup(0, 1, 1, 11, 2, 1.0, 1.0, 0, 0.0, None, [], 0)
    for position in range(20):
        draws = Draws.of([setup], [position], 50, logits.device)
        (token,) = sample(logits[None], draws)[0].tolist()
        gap = relative_margin(logits, params, 2, position) * float(logits.std())
        for change, same in ((0.99, True), (1.01, False)):
            lowered = logits.clone()
            lowered[token] -= change * gap
            assert (sample(lowered[None], draws)[0].item() == token) == same


@pytest.mark.parametrize(
    ("expected", "found", "step"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1, 2], [1], 1), ([1], [1, 2], 1), ([], [5], 0)],
)
def test_a_missing_token_is_a_difference(expected: list[int], found: list[int], step: int | None) -> None:
    assert first_difference(expected, found) == step
