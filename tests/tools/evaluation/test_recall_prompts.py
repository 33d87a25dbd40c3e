"""What the recall prompts promise: length, one fact for each key, answers along the ring, and clear refusals."""

from itertools import pairwise

import numpy as np
import pytest
from transformers import AutoTokenizer

from distributed_sparse.outputs import Logprob
from distributed_sparse.tools.evaluation.recall import make_majority_prompts, make_prompts, make_quiz, score_quiz
from distributed_sparse.tools.evaluation.recall_model import save_recall_checkpoint
from distributed_sparse.tools.evaluation.recall_vocabulary import (
    ASK,
    ASK_TWICE,
    BOS,
    EOS,
    FIRST_SYMBOL,
    MARKERS,
    NUM_SYMBOLS,
    codewords,
    detokenize,
    is_symbol,
    symbol_name,
)


def facts_of(token_ids):
    """Every symbol that follows a symbol: what the model takes for a fact."""
    return [(a, b) for a, b in pairwise(token_ids) if is_symbol(a) and is_symbol(b)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("recall")
    save_recall_checkpoint(directory)
    return AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("hops", [1, 2])
def test_the_document_holds_one_fact_for_each_key_and_the_answer_follows_from_them(hops):
    for prompt in make_prompts(num_facts=100, context_length=1500, num_queries=7, hops=hops, seed=3, answer_length=4):
        assert len(prompt.token_ids) == 1500
        assert prompt.token_ids[0] == BOS
        assert prompt.token_ids[-2] == (ASK_TWICE if hops == 2 else ASK)
        found = facts_of(prompt.token_ids)
        facts = dict(found)
        assert len(found) == len(facts) == 100
        symbol = prompt.token_ids[-1]
        for _ in range(hops - 1):
            symbol = facts[symbol]
        for answer in prompt.answer_ids:
            symbol = facts[symbol]
            assert answer == symbol


def test_questions_share_the_document_and_ask_about_different_keys():
    prompts = make_prompts(num_facts=64, context_length=900, num_queries=64, seed=1)
    assert len({prompt.token_ids[-1] for prompt in prompts}) == 64
    assert len({tuple(prompt.token_ids[:-2]) for prompt in prompts}) == 1


def test_the_seed_decides():
    assert make_prompts(64, 900, 4, seed=1) == make_prompts(64, 900, 4, seed=1)
    assert make_prompts(64, 900, 4, seed=1) != make_prompts(64, 900, 4, seed=2)


@pytest.mark.parametrize("hops", [1, 2])
def test_a_quiz_asks_the_same_questions_in_one_prompt_without_giving_answers_away(hops):
    quiz = make_quiz(num_facts=64, context_length=1200, num_queries=20, hops=hops, seed=1)
    assert len(quiz.token_ids) == 1200
    assert len(facts_of(quiz.token_ids)) == 64
    facts = dict(facts_of(quiz.token_ids[: -quiz.num_quiz_tokens]))
    for position, answer in zip(quiz.answer_positions, quiz.answer_ids, strict=True):
        assert position >= 1200 - quiz.num_quiz_tokens
        symbol = quiz.token_ids[position - 1]
        for _ in range(hops):
            symbol = facts[symbol]
        assert answer == symbol


def test_a_quiz_is_scored_by_what_was_most_likely_after_each_question():
    quiz = make_quiz(num_facts=16, context_length=400, num_queries=4, seed=1)
    ranks = [{token: Logprob(-1.0, rank=5)} for token in quiz.token_ids]
    ranks[0] = None
    assert score_quiz(quiz, ranks) == (0, 4)
    ranks[quiz.answer_positions[0]][quiz.answer_ids[0]] = Logprob(-0.1, rank=1)
    ranks[quiz.answer_positions[1]][quiz.answer_ids[1]] = Logprob(-0.1, rank=2)
    assert score_quiz(quiz, ranks) == (1, 4)
    with pytest.raises(ValueError, match="3 prompt_logprobs for a quiz of 400 tokens"):
        score_quiz(quiz, ranks[:3])


def test_the_majority_has_the_most_mentions():
    for prompt in make_majority_prompts(context_length=1200, num_queries=3, num_mentions=60, seed=2):
        assert len(prompt.token_ids) == 1200
        values = [value for key, value in facts_of(prompt.token_ids) if key == prompt.token_ids[-1]]
        counts = sorted((values.count(value), value) for value in set(values))
        assert sum(count for count, _ in counts) == 60
        assert counts[-1] == (24, prompt.answer_ids[0])
        assert counts[-2][0] == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_facts": 2}, "num_facts=2 is not in 3..512"),
        ({"num_facts": 513}, "num_facts=513 is not in 3..512"),
        ({"num_queries": 0}, "num_queries=0"),
        ({"num_queries": 17}, "num_queries=17 is not in 1..num_facts=16"),
        ({"hops": 3}, "hops=3 is not supported; use 1 or 2"),
        ({"answer_length": 16}, "answer_length=16"),
        ({"context_length": 60}, "context_length=60 has no room for 16 facts; use 208 tokens"),
        ({"context_length": 40000}, "context_length=40000 is more than the model's 32768 positions"),
    ],
)
def test_wrong_numbers_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_prompts(**{"num_facts": 16, "context_length": 400, "num_queries": 2, **arguments})


def test_the_room_that_an_error_asks_for_is_enough():
    for num_facts in (3, 50, 512):
        assert len(make_prompts(num_facts, 12 * num_facts + 16, 1, seed=4)[0].token_ids) == 12 * num_facts + 16


def test_codewords_are_far_apart_and_no_place_is_wasted():
    words = codewords()
    products = words @ words.T
    assert products.diagonal().tolist() == [24.0] * NUM_SYMBOLS
    products[range(NUM_SYMBOLS), range(NUM_SYMBOLS)] = 0.0
    assert products.max() == 8.0
    assert abs(words.mean(0)).max() == 0.0
    assert len(np.unique(words[:, :3], axis=0)) == 8  # classes
    for half in (words[:, :12], words[:, 12:]):
        assert np.unique(half, axis=0, return_counts=True)[1].tolist() == [4] * 128


def test_text_and_token_ids_turn_into_each_other(tokenizer):
    prompt = make_prompts(num_facts=32, context_length=500, num_queries=1, hops=2, seed=5)[0]
    text = tokenizer.decode(prompt.token_ids[1:])
    assert text == detokenize(prompt.token_ids[1:])
    assert text.endswith(f"<ask-twice>{symbol_name(prompt.token_ids[-1] - FIRST_SYMBOL)}")
    assert tokenizer(text).input_ids == prompt.token_ids
    assert tokenizer.decode(prompt.answer_ids, skip_special_tokens=True) == symbol_name(prompt.answer_ids[0] - FIRST_SYMBOL)


def test_any_text_is_bytes_and_symbols(tokenizer):
    text = "  Grüße, <dala>\n\t世界 <not-a-symbol> <dala"
    token_ids = tokenizer(text, add_special_tokens=False).input_ids
    assert sum(is_symbol(token) for token in token_ids) == 1
    assert tokenizer.decode(token_ids) == text
    assert len({symbol_name(symbol) for symbol in range(NUM_SYMBOLS)}) == NUM_SYMBOLS


def test_the_chat_template_ends_with_the_question_and_has_one_bos(tokenizer):
    messages = [{"role": "user", "content": "<dala><kala> <ask><dala>"}]
    token_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert token_ids.count(BOS) == 1
    assert token_ids[0] == BOS
    assert tokenizer.decode(token_ids[-2:]) == "<ask><dala>"
    assert tokenizer.bos_token == MARKERS[BOS] and tokenizer.eos_token_id == EOS
