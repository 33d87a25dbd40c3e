"""StopChecker: finds stop strings, special tokens among them, in a text that grows; constant time per character."""

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
    """Finds the stop string that is complete first; of several that end together, the longest.

    So where a text is cut depends on the text alone, and not on how it fell into tokens. A stop string that holds special
    tokens (`<|im_end|>`) matches the tokens themselves, and also the same characters as ordinary text.

    Args:
        stop: the stop strings; none makes a checker that never matches.
        include_stop_str_in_output: the output keeps the stop string, so no text is held back for it.
        min_tokens: stop strings that end within the text of so many first tokens do not count.
        to_symbols: a stop string with the ids of special tokens instead of their names.
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
        # two, since a special token changes nothing for a stop string of text alone, and ends the match of others
        self._automata = [_automaton(own) for own in patterns if own]
        self._states = [0] * len(self._automata)
        self._checked = 0  # no stop string ends within text[:_checked], or it did not count

    @property
    def special_ids(self) -> frozenset[int]:
        """The special tokens that stop strings hold."""
        return self._automata[-1].special_ids if self._automata else frozenset()

    def check(self, text: str, num_tokens: int, special_id: int | None = None) -> StopMatch | None:
        """Look at a text that has grown.

        Args:
            text: the whole text so far; the last call's text is a prefix of it.
            num_tokens: the tokens that it came from.
            special_id: one of `special_ids`, when the last of these tokens is that one.
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
        """How many characters of `text` (the one checked last, with no match in it) may be shown while more is to come.

        The longest end of the text that could be the beginning of a stop string is held back. An output that keeps its stop
        string holds back only what follows a special token, since the token's name would stand before it.
        """
        held = (
            (automaton.after_special if self.include else automaton.lengths)[state]
            for automaton, state in zip(self._automata, self._states)
        )
        return len(text) - max(held, default=0)


class StopAutomaton:
    """The automaton of Aho and Corasick over stop strings: its state is the longest end of the text that begins one of them.

    The lists are by state; state 0 is the empty beginning.
    """

    def __init__(self, patterns: Sequence[tuple[str, Sequence[Symbol]]]) -> None:
        self.special_ids = frozenset(symbol for _, pattern in patterns for symbol in pattern if isinstance(symbol, int))
        self._next: list[dict[Symbol, int]] = [{}]
        self._shorter = [0]  # the longest proper end of this state that is a state too
        self.stops: list[str | None] = [None]
        """The longest stop string that ends here."""
        self.stop_lengths = [0]
        """Its characters."""
        self.lengths = [0]
        """Characters of the text that may still become part of a stop string."""
        self.after_special = [0]
        """Those of them that follow a special token of it."""
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
        while states:  # breadth first, so a shorter state is complete when a longer one refers to it
            state = states.popleft()
            shorter = self._shorter[state]
            for symbol, following in self._next[state].items():
                self._shorter[following] = self.step(shorter, symbol)
                states.append(following)
            if self.stops[state] is None:
                self.stops[state], self.stop_lengths[state] = self.stops[shorter], self.stop_lengths[shorter]
            if not self._next[state]:  # no stop string goes on from here
                self.lengths[state], self.after_special[state] = self.lengths[shorter], self.after_special[shorter]


_automaton = lru_cache(maxsize=64)(StopAutomaton)
