"""recall: associative recall prompts for the recall model: facts ``<key><value>`` in plain text, and questions about them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from distributed_sparse.outputs import Logprob
from distributed_sparse.tools.evaluation.recall_vocabulary import ASK, ASK_TWICE, BOS, FIRST_SYMBOL, MAX_LENGTH, NUM_SYMBOLS

_WORDS = """
above again along amber autumn below bright calm clear cloud cold distant drifts early evening falls field gentle grass
grey harbour hill keeps lantern leaves light long low meadow mist moon morning near never night north old over path quiet
rain reeds river road shore silent slow snow soft south stone summer the the the tide through turns under valley water
west while wind winter wood
""".split()  # noqa: SIM905 (as a list it would be five times as long)


QUESTION_LENGTH = 2
"""Tokens of a question: ``<ask>`` or ``<ask-twice>``, and the symbol asked about."""


class RecallPrompt(NamedTuple):
    """A document with one question at its end; the last token is the symbol asked about."""

    token_ids: list[int]
    answer_ids: list[int]


class RecallQuiz(NamedTuple):
    """A document followed by many questions without their answers.

    With ``decode_last_prompt_tokens=num_quiz_tokens`` the document is prefilled once and every question is read sparsely.
    `score_quiz` compares the most likely token after each question with the answer.
    """

    token_ids: list[int]
    num_quiz_tokens: int
    answer_positions: list[int]
    answer_ids: list[int]


class RecallScore(NamedTuple):
    """Number of right answer symbols, and of all."""

    right: int
    total: int

    @property
    def accuracy(self) -> float:
        return self.right / self.total


def make_prompts(
    num_facts: int, context_length: int, num_queries: int, hops: int = 1, seed: int = 0, answer_length: int = 1
) -> list[RecallPrompt]:
    """Make questions about different keys of one document.

    The facts form one ring: every value is the key of another fact. With one hop the answer is the value of the key asked
    about; greedy decoding continues round the ring, for answers of ``answer_length`` symbols. With two hops (``<ask-twice>``)
    the answer is the value of the value, found in one step.

    Args:
        num_facts: 3..512, with different keys, at random places in the document.
        context_length: tokens of each prompt, BOS and question included; at most 32768.
        num_queries: 1..num_facts.
        hops: 1 or 2.
        seed: chooses the text, the facts and the questions.
        answer_length: 1..num_facts - 1 symbols, in the order in which greedy decoding generates them.

    Raises:
        ValueError: a number is out of range, or the facts do not fit into the context.
    """
    if not 3 <= num_facts <= NUM_SYMBOLS:
        raise ValueError(f"num_facts={num_facts} is not in 3..{NUM_SYMBOLS}")
    if not 1 <= num_queries <= num_facts:
        raise ValueError(f"num_queries={num_queries} is not in 1..num_facts={num_facts}: a key is asked about once")
    if hops not in (1, 2):
        raise ValueError(f"hops={hops} is not supported; use 1 or 2")
    if not 1 <= answer_length < num_facts:
        raise ValueError(f"answer_length={answer_length} is not in 1..{num_facts - 1}; the facts' ring would come round")
    rng = random.Random(seed)
    ring = rng.sample(range(FIRST_SYMBOL, FIRST_SYMBOL + NUM_SYMBOLS), num_facts)
    facts = [(ring[i], ring[(i + 1) % num_facts]) for i in range(num_facts)]
    document = _document(facts, context_length - QUESTION_LENGTH, rng)
    prompts = []
    for asked in rng.sample(range(num_facts), num_queries):
        answer = [ring[(asked + hops + i) % num_facts] for i in range(answer_length)]
        prompts.append(RecallPrompt([*document, ASK_TWICE if hops == 2 else ASK, ring[asked]], answer))
    return prompts


def make_quiz(num_facts: int, context_length: int, num_queries: int, hops: int = 1, seed: int = 0) -> RecallQuiz:
    """The questions of `make_prompts`, one after the other in one prompt of ``context_length`` tokens.

    Arguments and errors as in `make_prompts`.
    """
    num_quiz_tokens = num_queries * (QUESTION_LENGTH + 1)  # a space in place of the answer
    prompts = make_prompts(num_facts, context_length - num_quiz_tokens + QUESTION_LENGTH, num_queries, hops, seed)
    token_ids, answer_positions = prompts[0].token_ids[:-QUESTION_LENGTH], []
    for prompt in prompts:
        token_ids += prompt.token_ids[-QUESTION_LENGTH:]
        answer_positions.append(len(token_ids))
        token_ids.append(ord(" "))
    return RecallQuiz(token_ids, num_quiz_tokens, answer_positions, [prompt.answer_ids[0] for prompt in prompts])


def make_majority_prompts(
    context_length: int, num_queries: int, num_mentions: int = 96, share: float = 0.4, seed: int = 0
) -> list[RecallPrompt]:
    """Make questions that no single fact answers: a key occurs many times, and the answer is its most frequent successor.

    The answer follows ``share`` of the mentions; four other symbols follow the rest in equal parts. Every question has its
    own document. Other arguments and errors as in `make_prompts`.
    """
    if not 0.3 <= share <= 1.0:
        raise ValueError(f"share={share} is not in 0.3..1: the answer must lead clearly")
    if num_mentions < 10:
        raise ValueError(f"num_mentions={num_mentions} is too few for a majority; use at least 10")
    rng = random.Random(seed)
    prompts = []
    for _ in range(num_queries):
        key, answer, *others = rng.sample(range(FIRST_SYMBOL, FIRST_SYMBOL + NUM_SYMBOLS), 6)
        leading = round(share * num_mentions)
        values = [answer] * leading + [others[i % len(others)] for i in range(num_mentions - leading)]
        document = _document([(key, value) for value in values], context_length - QUESTION_LENGTH, rng)
        prompts.append(RecallPrompt([*document, ASK, key], [answer]))
    return prompts


def score_quiz(quiz: RecallQuiz, prompt_logprobs: Sequence[Mapping[int, Logprob] | None]) -> RecallScore:
    """Count the answers that are the most likely token after their question.

    Args:
        prompt_logprobs: of an output for this quiz with ``prompt_logprobs=1``.

    Raises:
        ValueError: there is not one entry per token of the quiz.
    """
    if len(prompt_logprobs) != len(quiz.token_ids):
        raise ValueError(
            f"{len(prompt_logprobs)} prompt_logprobs for a quiz of {len(quiz.token_ids)} tokens; pass those of its own output"
        )
    right = 0
    for position, answer in zip(quiz.answer_positions, quiz.answer_ids, strict=True):
        ranks = prompt_logprobs[position] or {}
        right += answer in ranks and ranks[answer].rank == 1
    return RecallScore(right, len(quiz.answer_ids))


def _document(facts: Sequence[tuple[int, int]], length: int, rng: random.Random) -> list[int]:
    """``length`` tokens: BOS, then plain words as bytes with the facts between them in random order."""
    context_length = length + QUESTION_LENGTH
    if context_length > MAX_LENGTH:
        raise ValueError(f"context_length={context_length} is more than the model's {MAX_LENGTH} positions")
    # a space follows each fact, since two adjacent facts would read as a third one
    filler_length = length - 1 - 3 * len(facts)
    filler = b""
    while len(filler) < filler_length:
        filler += rng.choice(_WORDS).encode() + b" "
    filler = filler[: max(filler_length, 0)]
    gaps = [i + 1 for i, byte in enumerate(filler) if byte == ord(" ")]
    runs = _runs(facts, rng)
    if len(gaps) < len(runs):
        raise ValueError(
            f"context_length={context_length} has no room for {len(facts)} facts; "
            f"use {12 * len(facts) + 16} tokens, or fewer facts"
        )
    planted = dict(zip(rng.sample(gaps, len(runs)), runs, strict=True))
    document = [BOS]
    for i in range(len(filler) + 1):
        for key, value in planted.get(i, ()):
            document += [key, value, ord(" ")]
        document += filler[i : i + 1]
    return document


def _runs(facts: Sequence[tuple[int, int]], rng: random.Random) -> list[list[tuple[int, int]]]:
    """The facts in random order, split into runs of one or two.

    Some pages then hold four or five facts, and the min-max bounds of their codewords score as high as a match for any query.
    Without such pages, any page selection would find every fact within a few pages, and a weak one would look perfect.
    """
    shuffled = rng.sample(facts, len(facts))
    runs = []
    while shuffled:
        length = rng.randint(1, 2)
        runs.append(shuffled[:length])
        shuffled = shuffled[length:]
    return runs
