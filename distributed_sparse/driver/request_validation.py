"""request_validation: checks a request's prompt and parameters. Pure Python; an invalid request is rejected alone."""

from collections.abc import Sequence
from typing import Any

from distributed_sparse.sampling_params import SamplingParams
from distributed_sparse.utils.validation import shown


def validate_request(
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    *,
    vocab_size: int,
    max_model_len: int,
    max_num_seqs: int,
    has_tokenizer: bool,
    traces: bool = False,
    score: bool = False,
) -> SamplingParams:
    """Check one request against an engine's limits.

    Args:
        prompt_token_ids: the prompt, a list or tuple of ints in 0..vocab_size - 1, not empty.
        params: its sampling parameters. Checked again, since unpickling and copying bypass their constructor.
        vocab_size: tokens in the model's vocabulary, without padding.
        max_model_len: maximum tokens of prompt and output together.
        max_num_seqs: maximum number of concurrent sequences.
        has_tokenizer: whether outputs have text, which stop strings need.
        traces: whether the engine was made with trace=True.
        score: only the prompt's log-probabilities are computed, so no room for output is needed.

    Returns:
        The parameters, converted to built-in Python types.

    Raises:
        ValueError: names the parameter, its value, and the remedy.
    """
    if not isinstance(params, SamplingParams):
        raise ValueError(f"sampling_params={shown(params)} must be a SamplingParams; write SamplingParams(max_tokens=16)")
    params = params.updated({})
    _check_prompt(prompt_token_ids, vocab_size)

    length = len(prompt_token_ids)
    _check_length(length, 0 if score else params.max_tokens, params.min_tokens, max_model_len)
    if params.decode_last_prompt_tokens >= length:
        raise ValueError(
            f"decode_last_prompt_tokens={params.decode_last_prompt_tokens} must be below the prompt's {length} tokens; "
            f"use at most {length - 1}"
        )
    if params.n > max_num_seqs:
        raise ValueError(f"n={params.n} is over max_num_seqs={max_num_seqs}; lower n or raise max_num_seqs")
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(params, name)
        if count is not None and count > vocab_size:
            raise ValueError(f"{name}={count} is over the vocabulary's {vocab_size} tokens; use at most {vocab_size}")
    for token in params.stop_token_ids:
        if token >= vocab_size:
            raise ValueError(
                f"stop_token_ids: token id {token} is outside the vocabulary of {vocab_size} tokens; use 0..{vocab_size - 1}"
            )
    if params.trace_steps is not None and not traces:
        raise ValueError(
            f"trace_steps={shown(params.trace_steps)} needs an engine that traces; make it with LLM(..., trace=True)"
        )
    if params.stop and not has_tokenizer:
        raise ValueError(f"stop={shown(params.stop)} needs a tokenizer, which this model does not have; use stop_token_ids")
    return params


def _check_prompt(prompt_token_ids: Any, vocab_size: int) -> None:
    if not isinstance(prompt_token_ids, (list, tuple)):
        raise ValueError(f"prompt_token_ids={shown(prompt_token_ids)} must be a list of token ids; use .tolist() on an array")
    if not prompt_token_ids:
        raise ValueError("prompt_token_ids=[]: the prompt is empty; give at least one token")
    if set(map(type, prompt_token_ids)) == {int} and min(prompt_token_ids) >= 0 and max(prompt_token_ids) < vocab_size:
        return
    for position, token in enumerate(prompt_token_ids):
        if type(token) is not int:  # the exact type: rejects bools, and numpy ints, which msgpack cannot encode
            raise ValueError(
                f"prompt_token_ids[{position}]={shown(token)} is {type(token).__name__}, not an int; "
                "give Python ints (an array's .tolist())"
            )
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"prompt_token_ids[{position}]={token} is outside the vocabulary of {vocab_size} tokens; "
                f"use ids in 0..{vocab_size - 1} (is the prompt from another tokenizer?)"
            )


def _check_length(length: int, max_tokens: int | None, min_tokens: int, max_model_len: int) -> None:
    name, output = ("max_tokens", max_tokens) if max_tokens is not None else ("min_tokens", max(1, min_tokens))
    if length + output <= max_model_len:
        return
    fits = max_model_len - length
    if output == 0:
        given, remedy = f"prompt_token_ids: {length} tokens are", "shorten the prompt"
    elif fits >= 1:
        given, remedy = f"prompt of {length} tokens + {name}={output} is", f"use {name} <= {fits}"
    else:
        given, remedy = f"prompt of {length} tokens + {name}={output} is", f"shorten the prompt below {max_model_len} tokens"
    raise ValueError(f"{given} over max_model_len={max_model_len}; {remedy}, or raise max_model_len")
