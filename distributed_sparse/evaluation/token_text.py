"""TokenText: a text as tokens, with the bytes of each where they are known."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

from distributed_sparse.evaluation.suite import EvaluatedModel
from distributed_sparse.tokenizer import encode_prompt
from distributed_sparse.validation import shown


@dataclass(frozen=True)
class TokenText:
    """`prefix`: what the tokenizer puts before every text (BOS). `num_bytes`: UTF-8 bytes of each token; None: not known."""

    token_ids: list[int]
    prefix: list[int]
    num_bytes: list[int] | None

    def window(self, start: int, length: int) -> tuple[list[int], list[int] | None]:
        """`length` tokens with the prefix at their head, from token `start` on, and the bytes of each (0 for the prefix's)."""
        end = start + length - len(self.prefix)
        of_bytes = None if self.num_bytes is None else [0] * len(self.prefix) + self.num_bytes[start:end]
        return self.prefix + self.token_ids[start:end], of_bytes

    def starts(self, length: int, count: int, what: str) -> list[int]:
        """The starts of `count` windows of `length` tokens, spread evenly, none reaching into another.

        Raises:
            ValueError: the text is too short.
        """
        own = length - len(self.prefix)
        if own < 1 or count * own > len(self.token_ids):
            raise ValueError(
                f"{what}: the text's {len(self.token_ids)} tokens hold no {count} windows of {length} tokens; "
                "give a longer text, fewer windows or a shorter context"
            )
        last = len(self.token_ids) - own
        return [round(i * last / max(count - 1, 1)) for i in range(count)]


def encode_text(model: EvaluatedModel, text: str) -> TokenText:
    """A text in the model's tokens; bytes by the tokenizer's offsets."""
    assert model.tokenizer is not None
    encoded = model.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False, return_offsets_mapping=True)
    ends = [0]
    for _, end in encoded["offset_mapping"]:
        ends.append(max(end, ends[-1]))  # bytes of one character may be tokens of their own, with the same offsets
    num_bytes = [len(text[start:end].encode()) for start, end in itertools.pairwise(ends)]
    return TokenText(list(encoded["input_ids"]), encode_prompt(model.tokenizer, ""), num_bytes)


def read_text(model: EvaluatedModel, suite: str, text: str | None, token_ids: str | None) -> TokenText:
    """The tokens of a text file, or of a JSON list of token ids.

    Raises:
        ValueError: neither or both are given, a file cannot be read, or the model has no tokenizer for text.
    """
    if (text is None) == (token_ids is None):
        raise ValueError(f"{suite}: give either --text FILE, or --token-ids FILE (a JSON list) for a model without a tokenizer")
    path = Path(text or token_ids or "")
    try:
        read = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{suite}: {str(path)!r} cannot be read ({error}); give a UTF-8 file") from None
    if text is not None:
        model.need_tokenizer(f"{suite} --text", "give --token-ids FILE, or a tokenizer with --set tokenizer=FOLDER")
        return encode_text(model, read)
    try:
        ids = json.loads(read)
    except ValueError as error:
        raise ValueError(f"{suite}: {str(path)!r} is not JSON ({error}); write a list such as [1, 20, 300]") from None
    if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < model.vocab_size for token in ids):
        raise ValueError(f"{suite}: {str(path)!r} holds {shown(ids)}, not a list of token ids in 0..{model.vocab_size - 1}")
    return TokenText(ids, [], None)
