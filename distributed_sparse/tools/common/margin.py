"""margin: score difference of the best two tokens. Summation order may change the chosen token only if it is tiny."""

from __future__ import annotations

from torch import Tensor

from distributed_sparse.protocol.step import SlotSetup
from distributed_sparse.sampling_params import SamplingParams
from distributed_sparse.shard.sampler import Draws, gumbel, mask_logits

TIE = 1e-4
"""Margins below this are ties in float32: GEMMs and all-reduces sum in another order at another number of ranks."""


def relative_margin(logits: Tensor, params: SamplingParams, sample_index: int, position: int) -> float:
    """Difference of the best two scores, with Gumbel noise if sampling, over the logits' standard deviation.

    Args:
        logits: float32 [V], or log-probabilities, which differ by a constant.
        params: greedy, or with a seed.
        sample_index: index of the sample within its request.
        position: of the chosen token in its sequence.
    """
    scores = logits[None]
    if not params.greedy:
        assert params.seed is not None, "the noise is reproducible only with a seed"
        setup = SlotSetup(
            slot=0,
            prompt_length=1,
            prefill_length=1,
            seed=params.seed,
            sample_index=sample_index,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=params.min_p,
            logprobs=None,
            suppressed=[],
            suppress_until=0,
        )
        draws = Draws.of([setup], [position], scores.shape[1], scores.device)
        scores = mask_logits(scores, draws) + gumbel(draws, scores.shape[1])
    best, second = scores[0].topk(2).values
    return float((best - second) / logits.std())


def first_difference(expected: list[int], found: list[int]) -> int | None:
    """Index of the first token that differs; None if the lists are equal."""
    if expected == found:
        return None
    pairs = zip(expected, found)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(found)))
