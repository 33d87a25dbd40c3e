"""token_text: real texts as tokens, and windows of them."""

from __future__ import annotations

import inspect
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distributed_sparse.client.tokenizer import encode_prompt
from distributed_sparse.tools.evaluation.files import read_json, read_text
from distributed_sparse.tools.evaluation.suite import EvaluatedModel
from distributed_sparse.utils.validation import shown


@dataclass(frozen=True)
class TokenText:
    """A text's tokens; `prefix` holds those that the tokenizer puts before every text (BOS)."""

    token_ids: list[int]
    prefix: list[int]

    def window(self, start: int, length: int) -> list[int]:
        """`length` tokens: the prefix, then the text from token `start` on."""
        return self.prefix + self.token_ids[start : start + length - len(self.prefix)]

    def starts(self, length: int, count: int, what: str) -> list[int]:
        """The starts of `count` evenly spread windows of `length` tokens that do not overlap; a single one is in the middle.

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
    """Encode a text with the model's tokenizer, which must exist."""
    assert model.tokenizer is not None
    return TokenText(encode_prompt(model.tokenizer, text, add_special_tokens=False), encode_prompt(model.tokenizer, ""))


def python_texts() -> dict[str, str]:
    """Two real texts that ship with Python: its language reference (prose) and the source of `tarfile` (code).

    They differ between Python versions.

    Raises:
        ValueError: this Python lacks them.
    """
    try:
        from pydoc_data.topics import topics

        return {"python-reference": "\n\n".join(topics.values()), "python-source": inspect.getsource(tarfile)}
    except (ImportError, OSError) as error:
        raise ValueError(f"the default texts are Python's own, and this Python has none ({error}); give --text FILE") from None


def read_texts(model: EvaluatedModel, suite: str, texts: Sequence[str], token_ids: Sequence[str]) -> dict[str, TokenText]:
    """Read text files, or JSON files with a list of token ids each, keyed by file name without suffix.

    Raises:
        ValueError: neither or both are given, a file cannot be read, two files have the same name, or `texts` without a
            tokenizer.
    """
    if bool(texts) == bool(token_ids):
        raise ValueError(f"{suite}: give either --text FILE, or --token-ids FILE (a JSON list) for a model without a tokenizer")
    found: dict[str, TokenText] = {}
    for path in map(Path, texts or token_ids):
        if path.stem in found:
            raise ValueError(f"{suite}: two files are named {path.stem!r}, the name of a text in the report; rename one")
        if texts:
            text = read_text(f"{suite}: text", path, "a UTF-8 file")
            model.need_tokenizer(f"{suite} --text", "give --token-ids FILE, or a tokenizer with --set tokenizer=FOLDER")
            found[path.stem] = encode_text(model, text)
            continue
        ids = read_json(f"{suite}: token_ids", path, "a JSON list such as [1, 20, 300]")
        if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < model.vocab_size for token in ids):
            raise ValueError(f"{suite}: {str(path)!r} holds {shown(ids)}, not a list of token ids in 0..{model.vocab_size - 1}")
        found[path.stem] = TokenText(ids, [])
    return found
