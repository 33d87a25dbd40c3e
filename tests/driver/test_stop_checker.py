"""Stop strings that hold special tokens, which no text shows: they end the output at the token itself."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from distributed_sparse.driver.detokenizer import Detokenizer
from distributed_sparse.driver.stop_checker import StopAutomaton, StopChecker


def chat_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens(["<|end|>", "<|end|>>", "<|user|>", "<|pad|>"])
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return tokenizer


TOKENIZER = chat_tokenizer()
DETOKENIZER = Detokenizer(TOKENIZER.to_str())


def ids(text: str) -> list[int]:
    """Token ids, with names of special tokens as the tokens themselves."""
    return TOKENIZER.encode(text).ids


def as_text(text: str) -> list[int]:
    """Token ids of ordinary characters: what is spelled like a special token is none."""
    return [token for character in text for token in ids(character)]


def read(token_ids: list[int], stop: list[str], include: bool = False, min_tokens: int = 0) -> tuple[str, str | None, int]:
    """The final text, the stop string that ended it, and the number of tokens until then; the deltas join to the text."""
    completion = DETOKENIZER.new_completion([], stop, include, min_tokens)
    shown, found, count = "", None, 0
    while found is None and count < len(token_ids):
        found = completion.append(token_ids[count])
        shown += completion.take_delta()
        count += 1
    found = found or completion.finish()
    shown += completion.take_delta()
    assert shown == completion.text
    return completion.text, found, count


@pytest.mark.parametrize(
    ("before", "stop", "text"),
    [
        ("say it", "<|end|>", "say it"),
        ("say it", "<|end|>\n<|user|>", "say it"),
        ("say it<|user|>", "\nUser<|end|>:", "say it"),
        ("say ", "it<|end|>", "say "),
        ("say <|end|>", "it<|end|>", "say "),
        ("say", " it<|end|><|end|>", "say"),
    ],
)
def test_a_stop_string_ends_the_output_at_its_special_tokens(before: str, stop: str, text: str) -> None:
    output, count = ids(before + stop + " more"), len(ids(before + stop))
    assert read(output, ["never", stop]) == (text, stop, count)
    assert read(output, [stop], include=True) == (text + stop, stop, count)


def test_the_same_characters_as_ordinary_text_stop_too() -> None:
    assert read(as_text("say it<|end|>more"), ["<|end|>"])[:2] == ("say it", "<|end|>")
    assert read(as_text("say it<|end|>more"), ["<|end|>"], include=True)[:2] == ("say it<|end|>", "<|end|>")


def test_an_added_token_that_the_text_shows_stops_as_text_does() -> None:
    assert read(ids("call <tool>x"), ["<tool>"])[:2] == ("call ", "<tool>")
    assert read(ids("call <tool>x"), ["l <tool>"], include=True)[:2] == ("call <tool>", "l <tool>")


def test_a_stop_string_does_not_match_a_part_of_a_special_tokens_name() -> None:
    # The text does not show the name, so the text must not end because of it.
    for stop in ("end", "<|", ">"):
        assert read(ids("go <|end|>on"), [stop, "<|user|>"])[:2] == ("go on", None)
    assert read(ids("go <|end|>>on"), ["<|end|>"])[:2] == ("go on", None)
    assert read(ids("go <|end|>>on"), ["<|end|>>", "<|end|>"])[:2] == ("go ", "<|end|>>")


def test_other_special_tokens_are_passed_over_as_in_the_text() -> None:
    assert read(ids("a<|pad|>b"), ["ab"])[:2] == ("", "ab")
    assert read(ids("xa<|end|>bc"), ["ab", "y<|end|>"])[:2] == ("x", "ab")
    assert read(ids("a<|pad|><|end|>"), ["a<|end|>"])[:2] == ("", "a<|end|>")


def test_a_stop_string_of_text_is_found_beside_one_with_a_special_token_that_begins_alike() -> None:
    for stop in (["ab", "a<|end|>c"], ["a<|end|>c", "ab"]):
        assert read(ids("xa<|end|>b"), stop)[:2] == ("x", "ab")
        assert read(ids("xa<|end|>c"), stop)[:2] == ("x", "a<|end|>c")


def test_a_special_token_within_min_tokens_does_not_count() -> None:
    assert read(ids("a<|end|>b<|end|>c"), ["<|end|>"], min_tokens=2)[:2] == ("ab", "<|end|>")
    assert read(ids("a<|end|>b<|end|>c"), ["<|end|>"], min_tokens=4)[:2] == ("abc", None)
    assert read(ids("a<|end|>b"), ["a<|end|>", "a<|end|>bc"], min_tokens=2)[:2] == ("ab", None)


def test_half_a_character_before_a_special_token_is_shown_as_at_any_end() -> None:
    half = ids("é")[:1]
    assert read([*ids("a"), *half, *ids("<|end|>b")], ["<|end|>"])[:2] == ("a\ufffd", "<|end|>")
    assert read([*ids("a"), *half, *ids("<|end|>b")], ["a<|end|>"])[:2] == ("a\ufffdb", None)


def test_text_behind_a_special_token_is_held_back_while_it_may_belong_to_a_stop_string() -> None:
    for include, final in ((False, "x"), (True, "xa<|end|>bc")):
        completion = DETOKENIZER.new_completion([], ["a<|end|>bc"], include)
        deltas = []
        for token_id in ids("xa<|end|>bc"):
            stop = completion.append(token_id)
            deltas.append(completion.take_delta())
        assert (stop, completion.text) == ("a<|end|>bc", final)
        assert deltas == (["x", "a", "", "", "<|end|>bc"] if include else ["x", "", "", "", ""])
    completion = DETOKENIZER.new_completion([], ["a<|end|>bc"])
    assert [(completion.append(token_id), completion.take_delta()) for token_id in ids("a<|end|>bd")][-1] == (None, "abd")


SYMBOLS = {"a": "a", "b": "b", "E": "<|end|>", "P": "<|pad|>"}


@settings(max_examples=500, deadline=None)
@given(
    output=st.text(alphabet="abEP", max_size=16),
    stop=st.lists(st.from_regex(r"\A[ab]{0,2}E[abE]{0,2}\Z"), min_size=1, max_size=3),
    include=st.booleans(),
)
def test_any_output_is_cut_as_a_search_in_its_symbols_cuts_it(output: str, stop: list[str], include: bool) -> None:
    seen = output.replace("P", "")  # no stop string holds it
    ends = [(m.end(), m.start(), s) for s in stop for i in range(len(seen)) if (m := re.compile(s).match(seen, i))]
    _, start, found = min(ends, default=(len(seen), len(seen), None))
    names = {s: "".join(SYMBOLS[symbol] for symbol in s) for s in stop}
    text = seen[:start].replace("E", "") + (names[found] if found is not None and include else "")
    got = read([ids(SYMBOLS[symbol])[0] for symbol in output], list(names.values()), include)
    assert got[:2] == (text, names[found] if found is not None else None)


def test_the_work_per_character_does_not_grow_with_the_stop_strings(monkeypatch: pytest.MonkeyPatch) -> None:
    # Aho and Corasick: a character takes at most one step forward, and every step back was a step forward before.
    stop = ["a" * i + chr(200 + i) for i in range(1, 65)]
    checker, looks = StopChecker(stop, False, 0), 0

    class Counted(dict):  # type: ignore[type-arg]
        def __contains__(self, key: Any) -> bool:
            nonlocal looks
            looks += 1
            return super().__contains__(key)

    automaton = StopAutomaton([(s, s) for s in stop])
    automaton._next = [Counted(following) for following in automaton._next]
    monkeypatch.setattr(checker, "_automata", [automaton])
    text = ("a" * 100 + "b") * 40
    for end in range(1, len(text) + 1):
        assert checker.check(text[:end], end) is None
        assert checker.publishable(text[:end]) == end - min(len(text[:end]) - text[:end].rfind("b") - 1, 64)
    assert looks <= 2 * len(text)
