"""The recall model's vocabulary: 256 bytes, 512 symbols with their codewords, and four markers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

NUM_BYTES = 256
NUM_SYMBOLS = 512
FIRST_SYMBOL = NUM_BYTES
BOS, EOS, ASK, ASK_TWICE = range(FIRST_SYMBOL + NUM_SYMBOLS, FIRST_SYMBOL + NUM_SYMBOLS + 4)
VOCAB_SIZE = ASK_TWICE + 1

CODE_LENGTH = 24
CLASS_BITS = 3
"""The first bits of a codeword spell the symbol's class: which KV heads answer for it."""

MAX_LENGTH = 32768
MARKERS = {BOS: "<s>", EOS: "</s>", ASK: "<ask>", ASK_TWICE: "<ask-twice>"}
_GOLAY_POLYNOMIAL = 0b110001110101  # x^11 + x^10 + x^6 + x^5 + x^4 + x^2 + 1
_CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{% endfor %}"


def symbol_name(symbol: int) -> str:
    """How symbol 0..511 is written in a text prompt, for instance ``<dala>``."""
    first = [consonant + vowel for vowel in "aeio" for consonant in "dklmnrtv"]
    second = [consonant + vowel for vowel in "ao" for consonant in "klmnrstv"]
    return f"<{first[symbol % 32]}{second[symbol // 32]}>"


def codewords() -> np.ndarray:
    """The symbols' codewords, float32 [512, 24] of -1 and +1: a linear part of the extended binary Golay code.

    Two codewords differ in at least 8 places, so that a symbol scores 24 against itself and at most 8 against another.
    """
    words = np.empty((NUM_SYMBOLS, CODE_LENGTH), dtype=np.float32)
    for symbol in range(NUM_SYMBOLS):
        # nine bits of the symbol and three sums of them: no place of the codeword is the same for all symbols
        message = symbol | ((symbol ^ symbol >> 3 ^ symbol >> 6) & 7) << 9
        remainder = message << 11
        for shift in range(11, -1, -1):
            if remainder >> (11 + shift) & 1:
                remainder ^= _GOLAY_POLYNOMIAL << shift
        word = [message >> i & 1 for i in range(12)] + [remainder >> i & 1 for i in range(11)]
        words[symbol] = 2.0 * np.array([*word, sum(word) % 2]) - 1.0
    return words


def save_tokenizer(directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, which ``AutoTokenizer`` loads: it adds BOS and has a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.BPE(vocab={char: byte for byte, char in enumerate(_byte_characters())}, merges=[]))
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


def _byte_characters() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte 0..255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(NUM_BYTES) if byte not in printable]
    return [chr(byte if byte in printable else NUM_BYTES + others.index(byte)) for byte in range(NUM_BYTES)]
