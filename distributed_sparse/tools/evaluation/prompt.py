"""Prompts of text whose question is told apart in tokens, so that sparse decode can read it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distributed_sparse.client.tokenizer import apply_chat, encode_prompt

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
    """Token ids of `before + question + cue`, and how many of the last ones belong to question and cue.

    A token that reaches across the border counts as the question's. In the tokenizer's chat template (`chat`) what the
    template puts behind the question is the question's, too, and the cue is the beginning of the assistant's message, which
    the model goes on with.

    Args:
        cue: the first words of the answer, with the white space that stands before them in a prompt without `chat`.
        most: the most question tokens to report; None: all of them.

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


def count_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    """Tokens of a text, special ones left out."""
    return len(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])
