"""prompt: encode text prompts so that the question's tokens are known and sparse decode can read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from distributed_sparse.client.tokenizer import apply_chat, encode_prompt
from distributed_sparse.tools.evaluation.haystack import fit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def encode_question(
    tokenizer: PreTrainedTokenizerFast,
    before: str,
    question: str,
    chat: bool = False,
    most: int | None = None,
    cue: str = "",
) -> tuple[list[int], int]:
    """Encode `before + question + cue`.

    A token that spans the end of `before` counts as the question's. With `chat`, so do the template's tokens after the
    question, and the cue begins the assistant's message, which the model continues.

    Args:
        chat: apply the tokenizer's chat template.
        most: upper limit of the question tokens reported; None: no limit.
        cue: the first words of the answer, with the white space that precedes them without `chat`.

    Returns:
        The token ids, and how many of the last ones belong to question and cue.

    Raises:
        ValueError: `chat` without a template.
    """

    def encoded(text: str) -> list[int]:
        if not chat:
            return encode_prompt(tokenizer, text)
        user = {"role": "user", "content": text}
        if not cue:
            return apply_chat(tokenizer, [user])
        answer = {"role": "assistant", "content": cue.strip()}
        return apply_chat(tokenizer, [user, answer], add_generation_prompt=False, continue_final_message=True)

    token_ids, prefix = encoded(before + question + ("" if chat else cue)), encoded(before)
    common = next((i for i, (a, b) in enumerate(zip(token_ids, prefix)) if a != b), min(len(token_ids), len(prefix)))
    count = max(1, min(len(token_ids) - common, len(token_ids) - 1))
    return token_ids, count if most is None else min(count, most)


def encode_fitted(
    tokenizer: PreTrainedTokenizerFast,
    before: Callable[[int], str],
    question: str,
    cue: str,
    chat: bool,
    length: int,
    what: str,
) -> tuple[list[int], int]:
    """`encode_question` for the largest `before(count)` with which the prompt has at most `length` tokens; see `fit`."""

    def encoded(count: int) -> tuple[list[int], int]:
        return encode_question(tokenizer, before(count), question, chat, cue=cue)

    return encoded(fit(lambda count: len(encoded(count)[0]), length, what))
