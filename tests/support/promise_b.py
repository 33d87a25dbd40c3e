"""Promise B: in float32, equal tokens at any TP degree and in any batch, up to floating-point ties, which are counted."""

from __future__ import annotations

import torch

from distributed_sparse.driver.messages import SlotSetup
from distributed_sparse.outputs import CompletionOutput, RequestOutput
from distributed_sparse.sampling_params import SamplingParams
from distributed_sparse.shard.sampler import gumbel, mask_logits

TIE = 1e-4
"""A margin below this part of the logits' standard deviation is a tie."""


def count_ties(reference: list[RequestOutput], found: list[RequestOutput], params: list[SamplingParams]) -> int:
    """Completions whose tokens differ from the reference's, each of them from a tie on.

    Args:
        reference: made with ``logprobs`` of the whole vocabulary.
        params: one per request; a seed, or temperature 0.

    Raises:
        AssertionError: tokens differ where the reference's margin is no tie.
    """
    ties = 0
    for expected, output, own in zip(reference, found, params, strict=True):
        assert output.prompt_token_ids == expected.prompt_token_ids and output.error is None
        for completion, other in zip(expected.outputs, output.outputs, strict=True):
            step = first_difference(completion.token_ids, other.token_ids)
            if step is None:
                continue
            margin = relative_margin(completion, own, step, len(expected.prompt_token_ids) + step)
            who = f"request {expected.request_id}, sample {completion.index}"
            assert margin < TIE, f"{who}: token {step} differs at a margin of {margin:.1e} standard deviations"
            ties += 1
    return ties


def first_difference(expected: list[int], found: list[int]) -> int | None:
    """Index of the first token that differs; None where all are equal."""
    if expected == found:
        return None
    pairs = zip(expected, found)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(found)))


def relative_margin(completion: CompletionOutput, params: SamplingParams, step: int, position: int) -> float:
    """Distance of the two best scores, Gumbel noise included when sampling, over the logits' standard deviation."""
    assert completion.logprobs is not None
    if step >= len(completion.logprobs):
        return float("inf")
    row = completion.logprobs[step]
    logits = torch.tensor([[row[token].logprob for token in range(len(row))]])
    scores = logits
    if params.temperature > 0:
        assert params.seed is not None
        setup = SlotSetup(
            slot=0,
            prefill_length=1,
            seed=params.seed,
            sample_index=completion.index,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=params.min_p,
            logprobs=None,
            suppressed=[],
            suppress_until=0,
        )
        scores = mask_logits(logits, [setup]) + gumbel([setup], [position], logits.shape[1], logits.device)
    best, second = scores[0].topk(2).values
    return float((best - second) / logits.std())
