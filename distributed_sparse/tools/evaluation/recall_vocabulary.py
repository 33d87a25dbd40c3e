"""recall_vocabulary: the recall model's tokens: 256 bytes, 512 symbols with codewords, and four markers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

NUM_BYTES = 256
NUM_SYMBOLS = 512
FIRST_SYMBOL = NUM_BYTES
BOS, EOS, ASK, ASK_TWICE = range(FIRST_SYMBOL + NUM_SYMBOLS, FIRST_SYMBOL + NUM_SYMBOLS + 4)
VOCAB_SIZE = ASK_TWICE + 1

CODE_LENGTH = 24
LOWER_HALF, UPPER_HALF = slice(0, CODE_LENGTH // 2), slice(CODE_LENGTH // 2, CODE_LENGTH)
CLASS_BITS = 3
"""The first bits of a codeword are the symbol's class, which determines the KV heads that answer for it."""

MAX_LENGTH = 32768
MARKERS = {BOS: "<s>", EOS: "</s>", ASK: "<ask>", ASK_TWICE: "<ask-twice>"}
_GOLAY_POLYNOMIAL = 0b110001110101  # x^11 + x^10 + x^6 + x^5 + x^4 + x^2 + 1
_CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{% endfor %}"


def symbol_name(symbol: int) -> str:
    """The text of symbol 0..511, for instance ``<dala>``."""
    first = [consonant + vowel for vowel in "aeio" for consonant in "dklmnrtv"]
    second = [consonant + vowel for vowel in "ao" for consonant in "klmnrstv"]
    return f"<{first[symbol % 32]}{second[symbol // 32]}>"


def is_symbol(token: int) -> bool:
    return FIRST_SYMBOL <= token < FIRST_SYMBOL + NUM_SYMBOLS


def detokenize(token_ids: Iterable[int]) -> str:
    """The text that the tokenizer decodes to, markers included; needs no tokenizer."""
    pieces = [
        bytes([token])
        if token < FIRST_SYMBOL
        else (symbol_name(token - FIRST_SYMBOL) if token < BOS else MARKERS[token]).encode()
        for token in token_ids
    ]
    return b"".join(pieces).decode(errors="replace")


def codewords() -> np.ndarray:
    """The symbols' codewords, float32 [512, 24] of -1 and +1: a linear part of the extended binary Golay code.

    Two codewords differ in at least 8 places, so that a symbol scores 24 against itself and at most 8 against another. Four
    symbols each share their lower 12 places, and four their upper 12: half a codeword does not identify a symbol.
    """
    golay = _golay_words()
    # The octads through four given places split the 24 places into six tetrads, of which any two form an octad. With three
    # tetrads as the lower half, some codewords differ in one half only.
    octads = golay[(golay.sum(1) == 8) & (golay[:, :4].sum(1) == 4)]
    places = [0, 1, 2, 3, *(int(place) for octad in octads for place in np.flatnonzero(octad) if place >= 4)]
    golay = golay[:, places]
    within_lower = golay[golay[:, UPPER_HALF].sum(1) == 0]
    within_upper = golay[golay[:, LOWER_HALF].sum(1) == 0]
    words = np.zeros((1, CODE_LENGTH), dtype=np.int8)
    for word in np.concatenate([within_lower, within_upper, golay]):
        if len(words) == NUM_SYMBOLS:
            break
        if not (words == word).all(1).any():  # linearly independent of the words so far
            words = np.concatenate([words, words ^ word])
    return 2.0 * words.astype(np.float32) - 1.0


def _golay_words() -> np.ndarray:
    """All words of the extended Golay code, int8 [4096, 24] of 0 and 1: cyclic, then a parity bit."""
    words = np.empty((4096, CODE_LENGTH), dtype=np.int8)
    for message in range(len(words)):
        remainder = message << 11
        for shift in range(11, -1, -1):
            if remainder >> (11 + shift) & 1:
                remainder ^= _GOLAY_POLYNOMIAL << shift
        word = message << 11 | remainder
        words[message] = [word.bit_count() % 2, *(word >> place & 1 for place in range(23))]
    return words


def save_tokenizer(directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json for ``AutoTokenizer``; it adds BOS and has a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokenizer = Tokenizer(models.BPE(vocab={char: byte for byte, char in bytes_to_unicode().items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(symbol_name(symbol), normalized=False) for symbol in range(NUM_SYMBOLS)])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in MARKERS.values()])
    bos = MARKERS[BOS]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, BOS)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": MARKERS[EOS],
        "pad_token": MARKERS[EOS],
        "model_max_length": MAX_LENGTH,
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
