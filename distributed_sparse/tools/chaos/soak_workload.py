"""soak_workload: the pool of requests of a soak, and their completions without faults."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from distributed_sparse.outputs import CompletionOutput
from distributed_sparse.sampling_params import SamplingParams
from distributed_sparse.tools.evaluation.recall import make_prompts

if TYPE_CHECKING:
    from distributed_sparse.llm import LLM

CONTEXT_LENGTHS = (48, 96, 160, 300, 500, 900, 1500, 2500)
MAX_TOKENS = (4, 24, 64, 128)
TEMPERATURES = (2.0, 4.0)
"""Range of sampling temperatures; at 1.5 all samples of the recall model are still the same."""
TOKENS_PER_FACT = 12
"""Prompts are recall questions; the text has one fact per this many tokens."""


@dataclass
class PooledRequest:
    """A request that clients repeat; `expected` holds its undisturbed completions, in index order."""

    prompt_token_ids: list[int]
    params: SamplingParams
    expected: list[CompletionOutput] = field(default_factory=list)


def make_pool(size: int, seed: int, max_model_len: int, max_num_seqs: int) -> list[PooledRequest]:
    """Make requests for the recall model, with short and long prompts and few and many tokens.

    Half are sampled, with up to three samples; half are greedy, and every other greedy one has a stop token. All have a seed,
    so that each has one right answer.

    Raises:
        ValueError: `max_model_len` is too small for the shortest.
    """
    lengths = [length for length in CONTEXT_LENGTHS if length + max(MAX_TOKENS) <= max_model_len]
    if not lengths:
        raise ValueError(
            f"max_model_len={max_model_len} is too small for a soak; give {min(CONTEXT_LENGTHS) + max(MAX_TOKENS)}"
        )
    rng = random.Random(seed)
    pool = []
    for number in range(size):
        length, max_tokens = rng.choice(lengths), rng.choice(MAX_TOKENS)
        num_facts = max(3, length // TOKENS_PER_FACT)
        answers = min(num_facts - 1, max_tokens)
        prompt = make_prompts(num_facts, length, 1, seed=rng.randrange(1 << 31), answer_length=answers)[0]
        given: dict[str, Any] = {"seed": rng.randrange(1 << 62), "max_tokens": max_tokens, "ignore_eos": True}
        if number % 2 == 1:
            samples = rng.randint(1, min(3, max_num_seqs))
            given |= {"n": samples, "temperature": rng.uniform(*TEMPERATURES), "top_p": rng.choice((1.0, 0.9))}
        else:
            given["temperature"] = 0.0
        if number % 4 == 2:
            given["stop_token_ids"] = [rng.choice(prompt.answer_ids)]
        if rng.random() < 0.3:
            given["decode_last_prompt_tokens"] = rng.randint(1, 20)
        pool.append(PooledRequest(prompt.token_ids, SamplingParams(**given)))
    return pool


def settle(llm: LLM, pool: Sequence[PooledRequest]) -> list[PooledRequest]:
    """Run the pool twice in different batches; return the requests whose completions agree, with these as `expected`.

    In float32 a tie between two tokens may be resolved either way, since other sequences in the batch change the last bit.

    Raises:
        RuntimeError: a request ended in an error.
    """
    runs = []
    for order in (list(pool), list(reversed(pool))):
        outputs = llm.generate([list(r.prompt_token_ids) for r in order], [r.params for r in order], use_tqdm=False)
        errors = [output.error for output in outputs if output.error is not None]
        if errors:
            raise RuntimeError(f"undisturbed, {len(errors)} of {len(order)} requests ended in an error: {errors[0]}")
        runs.append(outputs)
    settled = []
    for request, first, second in zip(pool, runs[0], reversed(runs[1]), strict=True):
        if [completion.token_ids for completion in first.outputs] == [completion.token_ids for completion in second.outputs]:
            request.expected = first.outputs
            settled.append(request)
    return settled
