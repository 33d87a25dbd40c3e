"""detokenizer: incremental detokenization. Detokenizer, TextStream, and CompletionText, which cuts the text at a stop string.

Needs only the `tokenizers` library, neither transformers nor torch. `tokenizers.DecodeStream` is not used: it cannot be
flushed, and after a byte sequence that is not UTF-8 every later step raises (tokenizers 0.23). The window below is similar.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from itertools import takewhile

from tokenizers import Tokenizer

from distributed_sparse.driver.stop_checker import StopChecker, StopMatch, Symbol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # decoders emit it for bytes that are not (yet) UTF-8
MAX_CHAR_TOKENS = 4  # a UTF-8 character has at most 4 bytes, so at most 4 tokens
MAX_PENDING_TOKENS = 2 * MAX_CHAR_TOKENS


class Detokenizer:
    """Decodes with one tokenizer; makes one TextStream per completion.

    Args:
        tokenizer_json: the tokenizer as its `tokenizer.json` text (`distributed_sparse.client.tokenizer.tokenizer_json`).
    """

    def __init__(self, tokenizer_json: str) -> None:
        self._tokenizer: Tokenizer = Tokenizer.from_str(tokenizer_json)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_tokens = {token.content: token_id for token_id, token in added.items() if token.special}
        self._special_ids = frozenset(self._special_tokens.values())

    def new_stream(self, prompt_token_ids: Sequence[int]) -> "TextStream":
        """A stream whose text continues the prompt: the first word keeps its leading space if the prompt has text."""
        return TextStream(self._tokenizer, self._special_ids, prompt_token_ids)

    def new_completion(
        self,
        prompt_token_ids: Sequence[int],
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
    ) -> "CompletionText":
        """The text of one completion, which ends at a stop string. Parameters as in SamplingParams."""
        checker = StopChecker(stop, include_stop_str_in_output, min_tokens, self._to_symbols)
        return CompletionText(self.new_stream(prompt_token_ids), checker)

    def decode_token(self, token_id: int) -> str:
        """The text of a single token; special tokens by name, incomplete characters as U+FFFD."""
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    @cached_property
    def _special_names(self) -> re.Pattern[str]:
        longest_first = sorted(self._special_tokens, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def _to_symbols(self, stop: str) -> Sequence[Symbol]:
        """The characters of a stop string, with the names of special tokens replaced by their ids."""
        pieces = self._special_names.split(stop)  # names at odd indices
        if len(pieces) == 1:
            return stop
        return tuple(symbol for i, piece in enumerate(pieces) for symbol in ([self._special_tokens[piece]] if i % 2 else piece))


class TextStream:
    """The text of one completion, growing token by token.

    `text` only grows and never ends in an incomplete character: such bytes are held back until the character is complete, or
    until `finish`. Special tokens add no text. The whole text equals what decoding prompt and output together adds to the
    prompt's text, with one exception: in a run of byte-fallback tokens (`<0xE9>`) that is not UTF-8 as a whole, characters
    that were complete stay, while decoding everything at once would replace them, too.
    """

    def __init__(self, tokenizer: Tokenizer, special_ids: frozenset[int], prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._special_ids = special_ids
        self.text = ""
        # A token's text depends on the token before it (a leading space, the first bytes of a character). So tokens are decoded
        # after an anchor, a few tokens whose text has been emitted, and the anchor's own text is cut off.
        self._anchor = self._prompt_anchor(prompt_token_ids)
        self._anchor_text = self._decode(self._anchor)
        self._pending: list[int] = []

    def append(self, token_id: int) -> None:
        """Add the next token; `text` grows by the characters that are final."""
        if token_id in self._special_ids or self._tokenizer.id_to_token(token_id) is None:
            return  # adds no text; keeping a long run of them would decode it again at every step
        self._pending.append(token_id)
        window_text = self._decode(self._anchor + self._pending)
        if not window_text.endswith(REPLACEMENT):
            if len(window_text) > len(self._anchor_text):
                self._emit(len(self._pending))
        elif len(self._pending) > MAX_PENDING_TOKENS:
            # More tokens than a character has: invalid UTF-8, or U+FFFD as text. Only the last few can still change.
            self._emit_all_but_the_last_character(window_text)

    def finish(self) -> None:
        """Add the text that was held back; no further token follows."""
        if self._pending:
            self._emit(len(self._pending))

    def _emit(self, count: int) -> None:
        emitted, self._pending = self._pending[:count], self._pending[count:]
        window_text = self._decode(self._anchor + emitted)
        if window_text.startswith(self._anchor_text):
            self.text += window_text[len(self._anchor_text) :]
        elif self._anchor_text.endswith(REPLACEMENT):
            # The prompt ended in an incomplete character; the output completed it, so it belongs to the output.
            pairs = zip(self._anchor_text, window_text, strict=False)
            self.text += window_text[sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)) :]
        else:
            # Byte fallback replaces a whole run of bytes if one is invalid, also the anchor's, whose text has been emitted.
            self.text += self._decode(emitted)
        self._anchor = emitted
        self._anchor_text = self._decode(emitted)

    def _emit_all_but_the_last_character(self, window_text: str) -> None:
        for kept_back in range(1, MAX_CHAR_TOKENS + 1):
            head = self._anchor + self._pending[:-kept_back]
            # The cut is between two characters if both sides together decode to the whole.
            if self._decode(head) + self._decode(self._pending[-kept_back:]) == window_text:
                self._emit(len(self._pending) - kept_back)
                return

    def _prompt_anchor(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The shortest suffix of the prompt whose text has a complete character before its end."""
        for length in range(1, min(len(prompt_token_ids), MAX_PENDING_TOKENS) + 1):
            tail = list(prompt_token_ids[-length:])
            if self._decode(tail).rstrip(REPLACEMENT):
                return tail
        return []

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True) if token_ids else ""


class CompletionText:
    """The published text of one completion: streamed, cut at a stop string, never retracted.

    The concatenated results of `take_delta` equal `text` once the completion has ended.
    """

    def __init__(self, stream: TextStream, checker: StopChecker) -> None:
        self._stream = stream
        self._checker = checker
        self._num_tokens = 0
        self._taken = 0
        self._ended = False
        self.text = ""

    def append(self, token_id: int) -> str | None:
        """Add a token. Returns the stop string that ends the completion, or None. Must not be called after the end."""
        assert not self._ended
        self._stream.append(token_id)
        self._num_tokens += 1
        if not self.may_stop_at(token_id):
            return self._update()
        self._stream.finish()  # a special token ends an incomplete character
        return self._update(token_id)

    def may_stop_at(self, token_id: int) -> bool:
        """Whether a stop string contains this special token."""
        return token_id in self._checker.special_ids

    def finish(self) -> str | None:
        """End the completion for another reason (length, end of sequence, abort). Returns the stop string found in the text
        that was held back, or None."""
        if self._ended:
            return None
        self._stream.finish()
        stop = self._update()
        self._ended = True
        return stop

    def take_delta(self) -> str:
        """New text that may be published now; "" if there is none."""
        shown = len(self.text) if self._ended else self._checker.publishable(self.text)
        delta, self._taken = self.text[self._taken : shown], max(self._taken, shown)
        return delta

    def _update(self, special_id: int | None = None) -> str | None:
        self.text = self._stream.text
        match: StopMatch | None = self._checker.check(self.text, self._num_tokens, special_id)
        if match is None:
            return None
        self.text, self._ended = self.text[: match.start] + (match.stop if self._checker.include else ""), True
        return match.stop
