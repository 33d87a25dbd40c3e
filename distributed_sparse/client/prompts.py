"""prompts: parse the accepted prompt forms (text, token ids, vLLM's TextPrompt and TokensPrompt dicts)."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, TypedDict

from distributed_sparse.utils.validation import check_keys, shown
from distributed_sparse.utils.vllm_names import PROMPT, drop_neutral


class TextPrompt(TypedDict):
    """A prompt as text, encoded by the tokenizer."""

    prompt: str


class _TokenIds(TypedDict):
    prompt_token_ids: list[int]


class TokensPrompt(_TokenIds, total=False):
    """A prompt as token ids. `prompt` is their text; it is not encoded, only copied to the output."""

    prompt: str


Prompt = str | Sequence[int] | TextPrompt | TokensPrompt


def parse_prompt(prompt: Any) -> tuple[str | None, list[Any] | None]:
    """Return (text, token ids) of a prompt, None for an absent one. Does not check the ids.

    Raises:
        ValueError: the prompt has none of the forms, or has an unsupported vLLM key (named in the message).
    """
    if isinstance(prompt, str):
        return prompt, None
    name, form, text, token_ids = "prompt", "a str or a list of token ids", None, prompt
    if isinstance(prompt, Mapping):
        given = drop_neutral(prompt, PROMPT, where="prompt: ")
        check_keys(given, ("prompt", "prompt_token_ids"), "prompt")
        text, token_ids = given.get("prompt"), given.get("prompt_token_ids")
        if text is None and token_ids is None:
            raise ValueError(f"prompt={shown(prompt)} is empty; give {{'prompt': text}} or {{'prompt_token_ids': [...]}}")
        if text is not None and not isinstance(text, str):
            raise ValueError(f"prompt={shown(text)} must be a str; give token ids as {{'prompt_token_ids': [...]}}")
        if token_ids is None:
            return text, None
        name, form = "prompt_token_ids", "a list of token ids"
    if not isinstance(token_ids, Sequence) or isinstance(token_ids, str | bytes | bytearray):
        raise ValueError(f"{name}={shown(token_ids)} must be {form} (an array's .tolist())")
    return text, list(token_ids)


def is_single_prompt(prompts: Any) -> bool:
    """Return whether `prompts` is one prompt rather than a list of prompts.

    Raises:
        ValueError: `prompts` is neither.
    """
    if isinstance(prompts, str | Mapping):
        return True
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes | bytearray):
        raise ValueError(
            f"prompts={shown(prompts)} must be a str, a list of token ids, or a list of those (an array's .tolist())"
        )
    return len(prompts) > 0 and isinstance(prompts[0], Integral)
