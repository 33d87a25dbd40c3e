"""Prompts of text whose question is told apart in tokens, so that sparse decode can read it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distributed_sparse.tokenizer import apply_chat, encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def encode_question(
    tokenizer: PreTrainedTokenizerFast, before: str, question: str, chat: bool = False, most: int | None = None
) -> tuple[list[int], int]:
    """Token ids of `before + question`, and how many of the last ones belong to the question.

    A token that reaches across the border counts as the question's. In the tokenizer's chat template (`chat`) what the
    template puts behind the question is the question's, too.

    Args:
        most: the most question tokens to report; None: all of them.

    Raises:
        ValueError: `chat` without a template.
    """

    def encoded(text: str) -> list[int]:
        return apply_chat(tokenizer, [{"role": "user", "content": text}]) if chat else encode_prompt(tokenizer, text)

    token_ids, prefix = encoded(before + question), encoded(before)
    common = next((i for i, (a, b) in enumerate(zip(token_ids, prefix)) if a != b), min(len(token_ids), len(prefix)))
    count = max(1, min(len(token_ids) - common, len(token_ids) - 1))
    return token_ids, count if most is None else min(count, most)


def count_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    """Tokens of a text, special ones left out."""
    return len(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])
