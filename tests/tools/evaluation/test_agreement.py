"""agreement and profile: windows of real texts as tokens."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distributed_sparse.tools.evaluation.recall_vocabulary import ASK, VOCAB_SIZE
from distributed_sparse.tools.evaluation.suite import Answer, EvaluatedModel
from distributed_sparse.tools.evaluation.suites.agreement import AgreementSuite
from distributed_sparse.tools.evaluation.suites.profile import ProfileSuite
from distributed_sparse.tools.evaluation.token_text import encode_text, python_texts
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


def test_windows_start_with_bos_and_do_not_overlap(text: str) -> None:
    examples = AgreementSuite(text=(text,), lengths=(100,), decoded=10, windows=3).examples(MODEL)
    encoded = encode_text(MODEL, TEXT).token_ids
    starts = [round(i * (len(encoded) - 99) / 2) for i in range(3)]
    for example, start in zip(examples, starts, strict=True):
        assert example.token_ids == [TOKENIZER.bos_token_id, *encoded[start : start + 99]]
        assert example.positions == tuple(range(90, 100)) and example.num_question_tokens == 11
        assert example.wanted == tuple(example.token_ids[90:])
    assert starts[1] >= starts[0] + 99


def test_every_length_predicts_the_same_tokens_of_every_text(text: str, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(TEXT[7:], encoding="utf-8")
    examples = AgreementSuite(text=(text, str(other)), lengths=(60, 100), decoded=10, windows=2).examples(MODEL)
    assert [(e.id, e.group, e.meta["task"]) for e in examples] == [
        (f"{name}-{length}-{number}", f"{length} tokens", name)
        for length in (60, 100)
        for name in ("text", "other")
        for number in (0, 1)
    ]
    for short, long in zip(examples[:4], examples[4:], strict=True):
        assert short.wanted == long.wanted and short.token_ids[1:] == long.token_ids[-59:]
    (one,) = AgreementSuite(text=(text,), lengths=(100,), decoded=10).examples(MODEL)
    encoded = encode_text(MODEL, TEXT).token_ids
    middle = (len(encoded) - 99) // 2
    assert one.token_ids[1:] == encoded[middle : middle + 99]


def test_the_score_is_the_mean_of_nats_and_dense_must_beat_token_frequencies(token_ids: str) -> None:
    suite = AgreementSuite(token_ids=(token_ids,), lengths=(100,), decoded=10, windows=9)
    examples = suite.examples(BARE)
    assert [example.token_ids[0] for example in examples] == [i * 100 % 331 for i in range(9)]
    answer = Answer(logprobs=-np.arange(10.0))
    assert suite.values(examples[0], answer) == list(range(10)) and suite.score(examples[0], answer) == {"score": 4.5}
    # 90 different tokens stand before 10 others: each has one chance in 90 + 100
    assert suite.needed(examples[0]) == pytest.approx(math.log(190))


def test_the_default_texts_are_pythons_own_and_real() -> None:
    texts = python_texts()
    assert "The standard type hierarchy" in texts["python-reference"] and "class TarFile" in texts["python-source"]
    suite = AgreementSuite(lengths=(300,), decoded=10)
    assert [example.meta["task"] for example in suite.examples(MODEL)] == list(texts)
    assert len(suite.options()["text_sha256"]) == 2
    with pytest.raises(ValueError, match="'bare' has no tokenizer; give --token-ids FILE"):
        suite.examples(BARE)


def test_another_text_is_another_configuration(text: str, token_ids: str) -> None:
    before = AgreementSuite(text=(text,)).options()
    Path(text).write_text("other")
    assert AgreementSuite(text=(text,)).options() != before


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (MODEL, {"text": ("text.txt",), "token_ids": ("high.json",)}, "give either --text FILE, or --token-ids FILE"),
        (BARE, {"text": ("text.txt",)}, "'bare' has no tokenizer; give --token-ids FILE"),
        (MODEL, {"text": ("missing.txt",)}, "'missing.txt' cannot be read"),
        (MODEL, {"text": ("text.txt", "sub/text.txt")}, "two files are named 'text'"),
        (MODEL, {"text": ("text.txt",), "windows": 90}, "text: the text's .* hold no 90 windows of 300 tokens"),
        (MODEL, {"text": ("text.txt",), "lengths": (600,)}, "length=600 .* over max_model_len=512"),
        (MODEL, {"text": ("text.txt",), "decoded": 299}, r"decoded=299 must be in 1\.\.298"),
        (BARE, {"token_ids": ("text.txt",)}, "'text.txt' is not JSON"),
        (BARE, {"token_ids": ("high.json",)}, r"not a list of token ids in 0\.\.330"),
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
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "text.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        AgreementSuite(**{"lengths": (300,), "decoded": 10, **settings}).examples(model)


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
