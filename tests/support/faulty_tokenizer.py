"""FaultyTokenizer: a tokenizer that raises when it decodes one token."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer


class FaultyTokenizer:
    """Stands in for the `Tokenizer` of a `Detokenizer`; everything but `decode` is the real one's.

    Args:
        tokenizer: the real one.
        token_id: decoding it raises.
        error: what is raised.
    """

    def __init__(self, tokenizer: Tokenizer, token_id: int, error: BaseException) -> None:
        self._tokenizer = tokenizer
        self._token_id = token_id
        self._error = error

    def decode(self, token_ids: list[int], **options: Any) -> str:
        if self._token_id in token_ids:
            raise self._error
        return self._tokenizer.decode(token_ids, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)
