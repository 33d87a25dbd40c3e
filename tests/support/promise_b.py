"""Promise B: in float32, equal tokens at any TP degree and in any batch, up to floating-point ties, which are counted."""

from __future__ import annotations

import torch

from distributed_sparse.outputs import CompletionOutput, RequestOutput
from distributed_sparse.sampling_params import SamplingParams
from distributed_sparse.tools.common.margin import TIE, first_difference, relative_margin


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
            margin = completion_margin(completion, own, step, len(expected.prompt_token_ids) + step)
            who = f"request {expected.request_id}, sample {completion.index}"
            assert margin < TIE, f"{who}: token {step} differs at a margin of {margin:.1e} standard deviations"
            ties += 1
    return ties


def completion_margin(completion: CompletionOutput, params: SamplingParams, step: int, position: int) -> float:
    """The margin at which a completion's token was chosen; infinite where it had ended."""
    assert completion.logprobs is not None
    if step >= len(completion.logprobs):
        return float("inf")
    row = completion.logprobs[step]
    logits = torch.tensor([row[token].logprob for token in range(len(row))])
    return relative_margin(logits, params, completion.index, position)
