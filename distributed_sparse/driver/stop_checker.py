"""StopChecker: finds stop strings, also ones with special tokens, in a growing text; constant time per character."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

Symbol = str | int
"""A character of the text, or the id of a special token, which has no text."""


@dataclass(frozen=True)
class StopMatch:
    """A stop string that begins at character `start` of a text."""

    stop: str
    start: int


class StopChecker:
    """Finds the stop string that ends first; of several that end together, the longest.

    The cut depends only on the text and not on how it was split into tokens. A stop string with special tokens (`<|im_end|>`)
    matches the tokens themselves and also the same characters as ordinary text.

    Args:
        stop: the stop strings; with none the checker never matches.
        include_stop_str_in_output: the output keeps the stop string, so no text is held back for it.
        min_tokens: stop strings that end within the text of the first `min_tokens` tokens are ignored.
        to_symbols: converts a stop string to symbols, replacing names of special tokens by their ids.
    """

    def __init__(
        self,
        stop: Sequence[str],
        include_stop_str_in_output: bool,
        min_tokens: int,
        to_symbols: Callable[[str], Sequence[Symbol]] = str,
    ) -> None:
        self.include = include_stop_str_in_output
        self._min_tokens = min_tokens
        with_ids = ((s, to_symbols(s)) for s in stop)
        patterns = (
            tuple((s, s) for s in stop),
            tuple((s, ids) for s, ids in with_ids if not all(isinstance(i, str) for i in ids)),
        )
        # two automata: a special token does not affect stop strings of text alone, but ends the match of others
        self._automata = [_automaton(own) for own in patterns if own]
        self._states = [0] * len(self._automata)
        self._checked = 0  # no stop string ends within text[:_checked], except ignored ones

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens in stop strings."""
        return self._automata[-1].special_ids if self._automata else frozenset()

    def check(self, text: str, num_tokens: int, special_id: int | None = None) -> StopMatch | None:
        """Check the text added since the last call; return the first match, or None.

        Args:
            text: the whole text so far; the last call's text is a prefix of it.
            num_tokens: number of tokens that `text` was decoded from.
            special_id: the last token, if it is one of `special_ids`.
        """
        if not self._automata:
            return None
        symbols: list[Symbol] = [*text[self._checked :]]
        if special_id is not None:
            symbols.append(special_id)
        for symbol in symbols:
            is_char = isinstance(symbol, str)
            self._checked += is_char
            found = []
            for i, automaton in enumerate(self._automata):
                if is_char or automaton.special_ids:
                    state = self._states[i] = automaton.step(self._states[i], symbol)
                    stop = automaton.stops[state]
                    if stop is not None:
                        found.append(StopMatch(stop, self._checked - automaton.stop_lengths[state]))
            if found and num_tokens > self._min_tokens:
                return min(found, key=lambda match: match.start)
        return None

    def publishable(self, text: str) -> int:
        """How many characters of `text` (as last checked, without a match) may be published while tokens are still to come.

        The longest suffix that could be the beginning of a stop string is held back. If the output keeps its stop string, only
        characters after a special token are held back, since the token's name would come before them.
        """
        held = (
            (automaton.after_special if self.include else automaton.lengths)[state]
            for automaton, state in zip(self._automata, self._states)
        )
        return len(text) - max(held, default=0)


class StopAutomaton:
    """Aho-Corasick automaton over stop strings. A state is the longest suffix of the text that begins one of them.

    Lists are indexed by state; state 0 is the empty suffix.
    """

    def __init__(self, patterns: Sequence[tuple[str, Sequence[Symbol]]]) -> None:
        self.special_ids = frozenset(symbol for _, pattern in patterns for symbol in pattern if isinstance(symbol, int))
        self._next: list[dict[Symbol, int]] = [{}]
        self._shorter = [0]  # the longest proper suffix of this state that is a state, too
        self.stops: list[str | None] = [None]
        """The longest stop string that ends here."""
        self.stop_lengths = [0]
        """Length of that stop string in characters."""
        self.lengths = [0]
        """Characters of the text that may still become part of a stop string."""
        self.after_special = [0]
        """How many of them follow a special token of the stop string."""
        for stop, pattern in patterns:
            self._add(stop, pattern)
        self._link()

    def step(self, state: int, symbol: Symbol) -> int:
        """The state after one more symbol."""
        while symbol not in self._next[state]:
            if state == 0:
                return 0
            state = self._shorter[state]
        return self._next[state][symbol]

    def _add(self, stop: str, pattern: Sequence[Symbol]) -> None:
        state, seen_special = 0, False
        for symbol in pattern:
            following = self._next[state].get(symbol)
            if following is None:
                following = self._next[state][symbol] = len(self._next)
                self._next.append({})
                self._shorter.append(0)
                self.stops.append(None)
                self.stop_lengths.append(0)
                is_char = isinstance(symbol, str)
                self.lengths.append(self.lengths[state] + is_char)
                self.after_special.append(self.after_special[state] + (is_char and seen_special))
            seen_special = seen_special or isinstance(symbol, int)
            state = following
        self.stops[state], self.stop_lengths[state] = stop, self.lengths[state]

    def _link(self) -> None:
        states = deque(self._next[0].values())
        while states:  # breadth first, so shorter states are complete before longer ones refer to them
            state = states.popleft()
            shorter = self._shorter[state]
            for symbol, following in self._next[state].items():
                self._shorter[following] = self.step(shorter, symbol)
                states.append(following)
            if self.stops[state] is None:
                self.stops[state], self.stop_lengths[state] = self.stops[shorter], self.stop_lengths[shorter]
            if not self._next[state]:  # no longer stop string continues from here
                self.lengths[state], self.after_special[state] = self.lengths[shorter], self.after_special[shorter]


_automaton = lru_cache(maxsize=64)(StopAutomaton)
