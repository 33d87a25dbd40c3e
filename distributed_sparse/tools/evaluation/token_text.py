"""TokenText: a real text as tokens."""

from __future__ import annotations

import inspect
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distributed_sparse.client.tokenizer import encode_prompt
from distributed_sparse.tools.evaluation.suite import EvaluatedModel
from distributed_sparse.utils.validation import shown


@dataclass(frozen=True)
class TokenText:
    """`prefix`: what the tokenizer puts before every text (BOS)."""

    token_ids: list[int]
    prefix: list[int]

    def window(self, start: int, length: int) -> list[int]:
        """`length` tokens with the prefix at their head, from token `start` on."""
        return self.prefix + self.token_ids[start : start + length - len(self.prefix)]

    def starts(self, length: int, count: int, what: str) -> list[int]:
        """The starts of `count` windows of `length` tokens, spread evenly, none reaching into another; one is in the middle.

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
        return [last // 2] if count == 1 else [round(i * last / (count - 1)) for i in range(count)]


def encode_text(model: EvaluatedModel, text: str) -> TokenText:
    """A text in the model's tokens."""
    assert model.tokenizer is not None
    encoded = model.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)
    return TokenText(list(encoded["input_ids"]), encode_prompt(model.tokenizer, ""))


def python_texts() -> dict[str, str]:
    """Two real texts that every Python brings: its language reference (prose) and the source of `tarfile` (code).

    They differ from one version of Python to another.

    Raises:
        ValueError: this Python has none.
    """
    try:
        from pydoc_data.topics import topics

        return {"python-reference": "\n\n".join(topics.values()), "python-source": inspect.getsource(tarfile)}
    except (ImportError, OSError) as error:
        raise ValueError(f"the default texts are Python's own, and this Python has none ({error}); give --text FILE") from None


def read_texts(model: EvaluatedModel, suite: str, texts: Sequence[str], token_ids: Sequence[str]) -> dict[str, TokenText]:
    """The tokens of text files, or of JSON lists of token ids, by the files' names without suffix.

    Raises:
        ValueError: neither or both are given, a file cannot be read, two files have one name, or the model has no tokenizer for
            text.
    """
    if bool(texts) == bool(token_ids):
        raise ValueError(f"{suite}: give either --text FILE, or --token-ids FILE (a JSON list) for a model without a tokenizer")
    found: dict[str, TokenText] = {}
    for path in map(Path, texts or token_ids):
        if path.stem in found:
            raise ValueError(f"{suite}: two files are named {path.stem!r}; the report tells texts apart by name: rename one")
        found[path.stem] = _read_text(model, suite, path, is_text=bool(texts))
    return found


def _read_text(model: EvaluatedModel, suite: str, path: Path, is_text: bool) -> TokenText:
    try:
        read = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{suite}: {str(path)!r} cannot be read ({error}); give a UTF-8 file") from None
    if is_text:
        model.need_tokenizer(f"{suite} --text", "give --token-ids FILE, or a tokenizer with --set tokenizer=FOLDER")
        return encode_text(model, read)
    try:
        ids = json.loads(read)
    except ValueError as error:
        raise ValueError(f"{suite}: {str(path)!r} is not JSON ({error}); write a list such as [1, 20, 300]") from None
    if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < model.vocab_size for token in ids):
        raise ValueError(f"{suite}: {str(path)!r} holds {shown(ids)}, not a list of token ids in 0..{model.vocab_size - 1}")
    return TokenText(ids, [])
