"""Tokens to text, one token at a time: Detokenizer, TextStream, StopChecker, and CompletionText that joins them.

Only the `tokenizers` library is needed, no transformers and no torch. Its `DecodeStream` is not used: it cannot be flushed,
and a byte sequence that is no UTF-8 makes every later step raise (tokenizers 0.23). The window below is the same idea.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from tokenizers import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are no UTF-8, or not yet
MAX_CHAR_TOKENS = 4  # a UTF-8 character has at most 4 bytes, so at most 4 tokens
MAX_PENDING_TOKENS = 2 * MAX_CHAR_TOKENS


class Detokenizer:
    """A tokenizer's decoding half; makes one TextStream per completion.

    Args:
        tokenizer_json: the tokenizer as its `tokenizer.json` text (`distributed_sparse.tokenizer.tokenizer_json`).
    """

    def __init__(self, tokenizer_json: str) -> None:
        self._tokenizer: Tokenizer = Tokenizer.from_str(tokenizer_json)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)

    def new_stream(self, prompt_token_ids: Sequence[int]) -> "TextStream":
        """A stream whose text continues the prompt: a first word keeps its leading space where the prompt has text."""
        return TextStream(self._tokenizer, self._special_ids, prompt_token_ids)

    def decode_token(self, token_id: int) -> str:
        """The text of one token by itself, special tokens by their name; half a character shows as U+FFFD."""
        return self._tokenizer.decode([token_id], skip_special_tokens=False)


class TextStream:
    """The text of one completion, growing token by token.

    `text` only ever grows and never ends in half a character: bytes that may yet become one are kept back until they do, or
    until `finish`. Special tokens give no text. The whole text equals what decoding prompt and output together adds to the
    prompt's text. The one exception is a run of byte-fallback tokens (`<0xE9>`) that is no UTF-8 as a whole: characters in
    it that were complete stay, where decoding all at once would replace them too.
    """

    def __init__(self, tokenizer: Tokenizer, special_ids: frozenset[int], prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._special_ids = special_ids
        self.text = ""
        # What a token adds depends on the one before it (its leading space, the first bytes of a character). So tokens are
        # decoded behind an anchor, tokens whose text is already out, and the anchor's own text is taken off.
        self._anchor = self._prompt_anchor(prompt_token_ids)
        self._anchor_text = self._decode(self._anchor)
        self._pending: list[int] = []

    def append(self, token_id: int) -> None:
        """Add the next token; `text` grows by what is certain now."""
        if token_id in self._special_ids or self._tokenizer.id_to_token(token_id) is None:
            return  # no text, now or later: kept, a long run of them would be decoded again at every step
        self._pending.append(token_id)
        window_text = self._decode(self._anchor + self._pending)
        if not window_text.endswith(REPLACEMENT):
            if len(window_text) > len(self._anchor_text):
                self._emit(len(self._pending))
        elif len(self._pending) > MAX_PENDING_TOKENS:
            # More than a character's tokens: bytes that are no UTF-8, or U+FFFD as text. Only the last few can still change.
            self._emit_all_but_the_last_character(window_text)

    def finish(self) -> None:
        """Add what was kept back: no token will come that completes it."""
        if self._pending:
            self._emit(len(self._pending))

    def _emit(self, count: int) -> None:
        emitted, self._pending = self._pending[:count], self._pending[count:]
        window_text = self._decode(self._anchor + emitted)
        if window_text.startswith(self._anchor_text):
            self.text += window_text[len(self._anchor_text) :]
        elif self._anchor_text.endswith(REPLACEMENT):
            # The prompt ended in half a character; the output completed it, so it belongs to the output.
            pairs = zip(self._anchor_text, window_text, strict=False)
            self.text += window_text[sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)) :]
        else:
            # Byte fallback replaces a whole run of bytes when one is wrong, those of the anchor too, which are out already.
            self.text += self._decode(emitted)
        self._anchor = emitted
        self._anchor_text = self._decode(emitted)

    def _emit_all_but_the_last_character(self, window_text: str) -> None:
        for kept_back in range(1, MAX_CHAR_TOKENS + 1):
            head = self._anchor + self._pending[:-kept_back]
            # A cut between two characters is one where both sides decode to the whole.
            if self._decode(head) + self._decode(self._pending[-kept_back:]) == window_text:
                self._emit(len(self._pending) - kept_back)
                return

    def _prompt_anchor(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The fewest last tokens of the prompt that decode to text with a complete character before its end."""
        for length in range(1, min(len(prompt_token_ids), MAX_PENDING_TOKENS) + 1):
            tail = list(prompt_token_ids[-length:])
            if self._decode(tail).rstrip(REPLACEMENT):
                return tail
        return []

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True) if token_ids else ""


@dataclass(frozen=True)
class StopMatch:
    """A stop string in a text: `length` is how much of the text remains (characters)."""

    stop: str
    length: int


class StopChecker:
    """Finds the stop string that is complete first; of several that end together, the longest.

    So where a text is cut depends on the text alone, and not on how it fell into tokens.

    Args:
        stop: the stop strings; none makes a checker that never matches.
        include_stop_str_in_output: cut behind the stop string instead of before it.
        min_tokens: stop strings that end within the text of so many first tokens do not count.
    """

    def __init__(self, stop: Sequence[str], include_stop_str_in_output: bool, min_tokens: int) -> None:
        self._stop = list(stop)
        self._include = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._checked = 0  # no stop string ends within text[:_checked], or it did not count

    def check(self, text: str, num_tokens: int) -> StopMatch | None:
        """Look at a text that has grown.

        Args:
            text: the whole text so far; the last call's text is a prefix of it.
            num_tokens: the tokens that it came from.
        """
        matches = []
        if num_tokens > self._min_tokens:
            for stop in self._stop:
                start = text.find(stop, max(0, self._checked - len(stop) + 1))
                if start >= 0:
                    matches.append((start + len(stop), start, stop))
        self._checked = len(text)
        if not matches:
            return None
        end, start, stop = min(matches)
        return StopMatch(stop, end if self._include else start)

    def publishable(self, text: str) -> int:
        """How many characters of `text` (with no match in it) may be shown while more is to come.

        The longest end of the text that could be the beginning of a stop string is held back.
        """
        if self._include or not self._stop:
            return len(text)
        longest = max(map(len, self._stop)) - 1
        for start in range(max(0, len(text) - longest), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stop):
                return start
        return len(text)


class CompletionText:
    """One completion's text as its reader sees it: streamed, cut at a stop string, never taken back.

    The texts that `take_delta` gives, joined, are `text` once the completion has ended.
    """

    def __init__(self, stream: TextStream, checker: StopChecker) -> None:
        self._stream = stream
        self._checker = checker
        self._num_tokens = 0
        self._taken = 0
        self._ended = False
        self.text = ""

    def append(self, token_id: int) -> str | None:
        """Add a token; the stop string that now ends the completion, or None. Not to be called after the end."""
        assert not self._ended
        self._stream.append(token_id)
        self._num_tokens += 1
        return self._update()

    def finish(self) -> str | None:
        """End the completion for another reason (length, end of sequence, abort); the stop string that what was kept back
        brought to light, or None."""
        if self._ended:
            return None
        self._stream.finish()
        stop = self._update()
        self._ended = True
        return stop

    def take_delta(self) -> str:
        """The text that may be shown now and was not given before; "" when there is none."""
        shown = len(self.text) if self._ended else self._checker.publishable(self.text)
        delta, self._taken = self.text[self._taken : shown], max(self._taken, shown)
        return delta

    def _update(self) -> str | None:
        self.text = self._stream.text
        match = self._checker.check(self.text, self._num_tokens)
        if match is None:
            return None
        self.text, self._ended = self.text[: match.length], True
        return match.stop
