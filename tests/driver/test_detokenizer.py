"""The text that a reader sees: whole characters only, the tokenizer's own spaces, and stop strings cut where they stand."""

import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from distributed_sparse.driver.detokenizer import CompletionText, Detokenizer, TextStream
from distributed_sparse.driver.stop_checker import StopChecker, StopMatch

SENTENCES = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps.",
    "Grüße aus Köln: naïve façade, Ünïcödé and ñandú!",
    "你好,世界。今天天气很好。",
    "emoji 🙂🚀👩‍👩‍👧 and flags 🇩🇪🇯🇵 in between",
    "def f(x):\n    return x + 1\n\n\n",
]
SPECIAL = ["<s>", "</s>"]


def byte_level_tokenizer(vocab_size: int = 330) -> Tokenizer:
    """GPT-2 and Llama 3's kind; the small vocabulary keeps most characters spread over several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return tokenizer


def metaspace_tokenizer() -> Tokenizer:
    """Sentencepiece's kind: "▁" for spaces, the first one dropped."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", *SPECIAL], show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """Llama 2's kind: pieces with "▁", and 256 byte tokens for every character that is not a piece."""
    pieces = ["▁", *"abcdefghijklmnopqrstuvwxyz", "é", "▁t", "▁th", "▁the", "▁a", "▁.", "."]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= {piece: len(vocab) + i for i, piece in enumerate(pieces)}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "a"), ("▁", ".")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", *SPECIAL])
    return tokenizer


TOKENIZERS = {
    "byte_level": byte_level_tokenizer(),
    "metaspace": metaspace_tokenizer(),
    "byte_fallback": byte_fallback_tokenizer(),
}
DETOKENIZERS = {kind: Detokenizer(tokenizer.to_str()) for kind, tokenizer in TOKENIZERS.items()}
KINDS = list(TOKENIZERS)


def stream_all(stream: TextStream, token_ids: list[int]) -> list[str]:
    """The text after each token, and last of all after the end."""
    texts = []
    for token_id in token_ids:
        stream.append(token_id)
        texts.append(stream.text)
    stream.finish()
    return [*texts, stream.text]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sentence", SENTENCES)
def test_streaming_a_sentence_gives_back_the_sentence_and_never_half_a_character(kind: str, sentence: str) -> None:
    tokenizer = TOKENIZERS[kind]
    token_ids = tokenizer.encode(sentence, add_special_tokens=False).ids
    texts = stream_all(DETOKENIZERS[kind].new_stream([]), token_ids)
    assert texts[-1] == tokenizer.decode(token_ids)
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert not any("\N{REPLACEMENT CHARACTER}" in text for text in texts)
    assert len(set(texts)) > len(token_ids) // 5, "text should come while tokens do, not at the end"


@pytest.mark.parametrize("kind", KINDS)
def test_text_continues_the_prompt_with_its_leading_space(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    token_ids = tokenizer.encode("over the dog the dog", add_special_tokens=False).ids
    for cut in range(1, len(token_ids)):
        text = stream_all(DETOKENIZERS[kind].new_stream(token_ids[:cut]), token_ids[cut:])[-1]
        assert tokenizer.decode(token_ids[:cut]) + text == tokenizer.decode(token_ids)


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_at_the_end_of_the_prompt_do_not_hide_its_text(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    end = id_of(kind, "</s>")
    prompt = [*tokenizer.encode("over the dog", add_special_tokens=False).ids, end]
    output = tokenizer.encode("the the dog", add_special_tokens=False).ids
    text = stream_all(DETOKENIZERS[kind].new_stream(prompt), output)[-1]
    assert tokenizer.decode(prompt) + text == tokenizer.decode(prompt + output)


def test_a_character_that_the_prompt_left_half_belongs_to_the_output() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    token_ids = tokenizer.encode("ok 🙂 ok", add_special_tokens=False).ids
    half = next(cut for cut in range(1, len(token_ids)) if tokenizer.decode(token_ids[:cut]).endswith("\ufffd"))
    assert stream_all(DETOKENIZERS["byte_level"].new_stream(token_ids[:half]), token_ids[half:])[-1].startswith("🙂")


def test_the_end_of_a_completion_shows_what_was_kept_back() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    token_ids = tokenizer.encode("🙂", add_special_tokens=False).ids[:-1]
    texts = stream_all(DETOKENIZERS["byte_level"].new_stream([]), token_ids)
    assert texts[-2] == ""
    assert texts[-1] == tokenizer.decode(token_ids) == "\ufffd"


def token_sequences(kind: str) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, TOKENIZERS[kind].get_vocab_size() - 1), max_size=80)


def id_of(kind: str, token: str) -> int:
    token_id = TOKENIZERS[kind].token_to_id(token)
    assert token_id is not None
    return token_id


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_tokens_streamed_give_the_text_that_decoding_them_together_gives(kind: str, data: st.DataObject) -> None:
    token_ids = data.draw(token_sequences(kind))
    texts = stream_all(DETOKENIZERS[kind].new_stream([]), token_ids)
    assert texts[-1] == TOKENIZERS[kind].decode(token_ids, skip_special_tokens=True)
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="abc the. éü你🙂👩\u200d\n", max_size=40), special=st.lists(st.integers(0, 40), max_size=5))
def test_byte_fallback_streams_every_text_exactly_special_tokens_in_between_or_not(text: str, special: list[int]) -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids
    for position in special:
        token_ids.insert(position, id_of("byte_fallback", "</s>"))
    texts = stream_all(DETOKENIZERS["byte_fallback"].new_stream([]), token_ids)
    assert texts[-1] == tokenizer.decode(token_ids, skip_special_tokens=True)


@settings(max_examples=300, deadline=None)
@given(token_ids=token_sequences("byte_fallback"))
def test_byte_fallback_keeps_pieces_and_never_takes_text_back_when_bytes_are_no_utf8(token_ids: list[int]) -> None:
    # Decoding all at once replaces a whole run of bytes when one is wrong; a stream cannot, the run's start is out already.
    tokenizer = TOKENIZERS["byte_fallback"]
    texts = stream_all(DETOKENIZERS["byte_fallback"].new_stream([]), token_ids)
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    whole = tokenizer.decode(token_ids, skip_special_tokens=True)
    if "\ufffd" not in whole:
        assert texts[-1] == whole
    without_bytes = [token for token in token_ids if not 3 <= token < 259]
    if without_bytes == token_ids:
        assert texts[-1] == whole


def test_text_goes_on_after_bytes_that_are_no_utf8() -> None:
    # Regression: tokenizers' DecodeStream raises here, and at every later step, and loses the bytes.
    names = ["▁the", "<0xC3>", "<0xA9>", "<0xFF>", "a", "▁the"]
    token_ids = [id_of("byte_fallback", name) for name in names]
    assert stream_all(DETOKENIZERS["byte_fallback"].new_stream([]), token_ids)[-1] == "theé\ufffda the"


def test_a_long_run_of_wrong_bytes_is_not_kept_back_for_ever() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    wrong = tokenizer.encode("🙂", add_special_tokens=False).ids[-1]
    stream = DETOKENIZERS["byte_level"].new_stream([])
    for _ in range(200):
        stream.append(wrong)
    assert len(stream.text) >= 190
    stream.finish()
    assert stream.text == tokenizer.decode([wrong] * 200)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_outside_the_vocabulary_and_special_tokens_add_no_text(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    stream = DETOKENIZERS[kind].new_stream([])
    for token_id in [id_of(kind, "</s>"), tokenizer.get_vocab_size() + 5]:
        stream.append(token_id)
        assert stream.text == ""


def test_a_long_run_of_special_tokens_is_not_decoded_again_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    # With ignore_eos a model may say end-of-sequence thousands of times: that must not cost the square of it.
    stream = DETOKENIZERS["byte_level"].new_stream([])
    decode, decoded = stream._decode, 0

    def counted(token_ids: list[int]) -> str:
        nonlocal decoded
        decoded += len(token_ids)
        return decode(token_ids)

    monkeypatch.setattr(stream, "_decode", counted)
    for _ in range(1000):
        stream.append(id_of("byte_level", "</s>"))
    stream.finish()
    assert decoded <= 2000


def test_one_token_by_itself_shows_special_tokens_by_name() -> None:
    assert DETOKENIZERS["byte_level"].decode_token(id_of("byte_level", "</s>")) == "</s>"
    assert DETOKENIZERS["byte_level"].decode_token(id_of("byte_level", "Ġ")) == " "


class Pieces:
    """A stream whose tokens are indices into pieces of text: borders can fall anywhere."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces
        self.text = ""

    def append(self, token_id: int) -> None:
        self.text += self.pieces[token_id]

    def finish(self) -> None:
        pass


def read(pieces: list[str], stop: list[str], include: bool = False, min_tokens: int = 0) -> tuple[str, str | None, list[str]]:
    """Final text, stop string and deltas of a completion that came in these pieces."""
    text = CompletionText(Pieces(pieces), StopChecker(stop, include, min_tokens))  # type: ignore[arg-type]
    deltas = []
    for token_id in range(len(pieces)):
        found = text.append(token_id)
        deltas.append(text.take_delta())
        if found is not None:
            assert text.finish() is None
            assert text.take_delta() == ""
            return text.text, found, deltas
    found = text.finish()
    deltas.append(text.take_delta())
    return text.text, found, deltas


def cut_at(text: str, borders: list[int]) -> list[str]:
    edges = [0, *sorted({border for border in borders if 0 < border < len(text)}), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


@settings(max_examples=500, deadline=None)
@given(
    text=st.text(alphabet="ab\n", min_size=1, max_size=24),
    stop=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), max_size=3),
    borders=st.lists(st.integers(1, 24), max_size=10),
    include=st.booleans(),
)
def test_a_stop_string_cuts_at_the_same_place_wherever_token_borders_fall(
    text: str, stop: list[str], borders: list[int], include: bool
) -> None:
    ends = [(end, -len(s), s) for s in stop for end in range(1, len(text) + 1) if text[:end].endswith(s)]
    end, minus_length, found = min(ends, default=(len(text), 0, None))
    expected = text[: end if include or found is None else end + minus_length]
    for pieces in (cut_at(text, borders), list(text), [text]):
        final, reason, deltas = read(pieces, stop, include)
        assert (final, reason) == (expected, found)
        assert "".join(deltas) == expected


def test_text_that_could_begin_a_stop_string_is_held_back_and_given_when_it_does_not() -> None:
    assert read(["x", "a", "b", "y"], ["abc"])[2] == ["x", "", "", "aby", ""]
    assert read(["x", "a", "b"], ["abc"])[2] == ["x", "", "", "ab"]
    assert read(["x", "a", "b", "c"], ["abc"])[2] == ["x", "", "", ""]


def test_the_stop_string_stays_when_asked_for_and_then_nothing_is_held_back() -> None:
    assert read(["x", "a", "b", "cd"], ["abc"], include=True) == ("xabc", "abc", ["x", "a", "b", "c"])


def test_of_stop_strings_that_end_together_the_longest_cuts() -> None:
    assert StopChecker(["b", "ab"], False, 0).check("xab", 1) == StopMatch("ab", 1)


def test_a_stop_string_within_the_first_min_tokens_does_not_count_but_one_that_ends_later_does() -> None:
    assert read(["a", "b", "x", "a", "b"], ["ab"], min_tokens=2)[:2] == ("abx", "ab")
    assert read(["x", "a", "b"], ["ab"], min_tokens=2)[:2] == ("x", "ab")
    assert read(["a", "b", "x"], ["ab"], min_tokens=3)[:2] == ("abx", None)


def test_a_stop_string_in_what_was_kept_back_is_found_at_the_end() -> None:
    token_ids = TOKENIZERS["byte_level"].encode("a🙂", add_special_tokens=False).ids[:-1]
    text = CompletionText(DETOKENIZERS["byte_level"].new_stream([]), StopChecker(["\ufffd"], False, 0))
    assert [text.append(token_id) for token_id in token_ids] == [None] * len(token_ids)
    assert text.finish() == "\ufffd"
    assert (text.text, text.take_delta()) == ("a", "a")


def test_the_detokenizer_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from distributed_sparse.driver import detokenizer; from distributed_sparse import outputs, config; "
        "from distributed_sparse.driver import request_validation; from distributed_sparse.client import tokenizer; "
        "sys.exit(', '.join({'torch', 'transformers', 'ray'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
