"""reference: the tokens that a point's placement must not change, and the comparison of other placements with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from distributed_sparse.client.output_builder import block_arrays
from distributed_sparse.protocol.client import NewRequest, RequestUpdate
from distributed_sparse.sampling_params import SamplingParams
from distributed_sparse.tools.common.load import send
from distributed_sparse.tools.common.margin import relative_margin

if TYPE_CHECKING:
    from distributed_sparse import LLM


def make_reference(llm: LLM, requests: Sequence[NewRequest], concurrency: int, greedy: bool) -> dict[str, Any]:
    """Run requests with the log-probabilities of the whole vocabulary, and keep the margin of each token.

    Args:
        greedy: override the requests' sampling.

    Returns:
        {"token_ids": [request][step], "margins": [request][step], see `relative_margin`}.
    """
    vocab_size = llm.model_config.vocab_size
    changes: dict[str, Any] = {"logprobs": vocab_size} | ({"temperature": 0.0} if greedy else {})
    again = [
        NewRequest(f"{r.request_id}-again", r.prompt_token_ids, dataclasses.replace(r.params, **changes)) for r in requests
    ]
    margins: list[list[float]] = [[] for _ in again]

    def keep(number: int, update: RequestUpdate) -> None:
        request = again[number]
        for sample in update.samples:
            for block in sample.logprobs:
                ids, logprobs, _ = block_arrays(block)
                assert ids is not None and ids.shape == (1, vocab_size + 1), "the sampled token, then all by rank"
                by_token = np.empty(vocab_size, np.float32)
                by_token[ids[0, 1:]] = logprobs[0, 1:]
                position = len(request.prompt_token_ids) + len(margins[number])
                margins[number].append(relative_margin(torch.from_numpy(by_token), request.params, sample.index, position))

    times = send(llm, again, concurrency, keep)
    return {"token_ids": [one.token_ids for one in times], "margins": margins}


def disagreements(llm: LLM, requests: Sequence[NewRequest], reference: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """(request, step) of the reference's greedy tokens that are not the most likely ones here, given the tokens before.

    Compares as many requests as both lists have. Every token but the first goes through decode, as in the reference.
    """
    compared = min(len(requests), len(reference))
    requests, reference = requests[:compared], reference[:compared]
    prompts = [[*request.prompt_token_ids, *tokens[:-1]] for request, tokens in zip(requests, reference, strict=True)]
    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=1,
            prompt_logprobs=0,
            decode_last_prompt_tokens=len(tokens) - 1,
            seed=request.params.seed,
            ignore_eos=True,
        )
        for request, tokens in zip(requests, reference, strict=True)
    ]
    found = []
    for number, (output, tokens) in enumerate(zip(llm.generate(prompts, params, use_tqdm=False), reference)):
        if output.error is not None or output.prompt_logprobs is None:
            raise RuntimeError(f"the engine did not score the reference's tokens: {output.error}")
        rows = output.prompt_logprobs[len(requests[number].prompt_token_ids) :]
        for step, (row, token) in enumerate(zip(rows, tokens)):
            assert row is not None
            if row[token].rank != 1:
                found.append((number, step))
        if output.outputs[0].token_ids != [tokens[-1]]:
            found.append((number, len(tokens) - 1))
    return found
