"""ppl and profile: windows of a text as tokens, and bits per byte that count each byte once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distributed_sparse.evaluation.recall_vocabulary import ASK, VOCAB_SIZE
from distributed_sparse.evaluation.suite import Answer, EvaluatedModel
from distributed_sparse.evaluation.suites.ppl import PplSuite
from distributed_sparse.evaluation.suites.profile import ProfileSuite
from distributed_sparse.evaluation.token_text import encode_text
from tests.support.text_checkpoint import byte_level_bos_tokenizer

TOKENIZER = byte_level_bos_tokenizer()
MODEL = EvaluatedModel("tiny", 331, 512, TOKENIZER)
BARE = EvaluatedModel("bare", 331, 512)
TEXT = "the quick brown fox, 你好 🙂 again. " * 40


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


@pytest.fixture
def token_ids(tmp_path: Path) -> str:
    path = tmp_path / "ids.json"
    path.write_text(json.dumps([i % 331 for i in range(900)]))
    return str(path)


def test_the_bytes_of_a_texts_tokens_add_up_to_the_texts() -> None:
    encoded = encode_text(MODEL, TEXT)
    assert encoded.num_bytes is not None and sum(encoded.num_bytes) == len(TEXT.encode())
    assert len(encoded.num_bytes) == len(encoded.token_ids) and encoded.prefix == [TOKENIZER.bos_token_id]


def test_windows_start_with_bos_and_do_not_overlap(text: str) -> None:
    examples = PplSuite(text=text, context=100, decoded=10, windows=3).examples(MODEL)
    encoded = encode_text(MODEL, TEXT).token_ids
    starts = [round(i * (len(encoded) - 99) / 2) for i in range(3)]
    for example, start in zip(examples, starts, strict=True):
        assert example.token_ids == [TOKENIZER.bos_token_id, *encoded[start : start + 99]]
        assert example.positions == tuple(range(90, 100)) and example.num_question_tokens == 11
        assert example.wanted == tuple(example.token_ids[90:])
        judged = TOKENIZER.decode(example.token_ids[90:])
        if "\ufffd" not in judged:  # no character is cut
            assert example.meta["num_bytes"] == len(judged.encode())
    assert starts[1] >= starts[0] + 99


def test_bits_per_byte(text: str) -> None:
    suite = PplSuite(text=text, context=100, decoded=10, windows=1)
    (example,) = suite.examples(MODEL)
    scores = suite.score(example, Answer(logprobs=np.full(10, -2 * math.log(2))))
    assert scores["bits_per_token"] == pytest.approx(2.0)
    assert scores["score"] == pytest.approx(20 / example.meta["num_bytes"])


def test_token_ids_need_no_tokenizer_and_are_scored_by_token(token_ids: str) -> None:
    suite = PplSuite(token_ids=token_ids, context=100, decoded=10, windows=9)
    examples = suite.examples(BARE)
    assert [example.token_ids[0] for example in examples] == [i * 100 % 331 for i in range(9)]
    assert suite.score(examples[0], Answer(logprobs=np.full(10, -math.log(8))))["score"] == pytest.approx(3.0)


def test_another_text_is_another_configuration(text: str, token_ids: str) -> None:
    before = PplSuite(text=text).options()
    Path(text).write_text("other")
    assert PplSuite(text=text).options() != before


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (MODEL, {}, "give either --text FILE, or --token-ids FILE"),
        (BARE, {"text": "text.txt"}, "'bare' has no tokenizer; give --token-ids FILE"),
        (MODEL, {"text": "missing.txt"}, "'missing.txt' cannot be read"),
        (MODEL, {"text": "text.txt", "windows": 90}, "hold no 90 windows of 300 tokens"),
        (MODEL, {"text": "text.txt", "context": 600}, "length=600 and 1 tokens of answer are over max_model_len=512"),
        (MODEL, {"text": "text.txt", "decoded": 299}, "decoded=299 must be in 1..298"),
        (BARE, {"token_ids": "text.txt"}, "'text.txt' is not JSON"),
        (BARE, {"token_ids": "high.json"}, "not a list of token ids in 0..330"),
    ],
)
def test_what_does_not_hold_is_refused(
    tmp_path: Path,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    model: EvaluatedModel,
    settings: dict[str, Any],
    message: str,
) -> None:
    (tmp_path / "high.json").write_text("[5, 331]")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        PplSuite(**{"context": 300, **settings}).examples(model)


def test_a_profile_takes_the_models_own_kind_of_text(token_ids: str) -> None:
    suite = ProfileSuite(lengths=(200, 300), samples=2, steps=4)
    filler = suite.examples(MODEL)
    assert [len(example.token_ids) for example in filler] == [200, 200, 300, 300]
    assert all(example.num_question_tokens == 4 and example.max_tokens == 0 for example in filler)
    assert filler[0].token_ids != filler[1].token_ids
    recall = suite.examples(EvaluatedModel("recall", VOCAB_SIZE, 512))
    assert [len(example.token_ids) for example in recall] == [200, 200, 300, 300]
    assert all(ASK in example.token_ids[-4:] for example in recall)
    with pytest.raises(ValueError, match="give either --text FILE, or --token-ids FILE"):
        suite.examples(BARE)
    assert len(ProfileSuite(lengths=(200,), token_ids=token_ids).examples(BARE)) == 2
