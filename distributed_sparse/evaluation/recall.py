"""Associative recall: facts ``<key><value>`` planted in plain text, and questions about them, for the recall model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from distributed_sparse.evaluation.recall_vocabulary import ASK, ASK_TWICE, BOS, FIRST_SYMBOL, MAX_LENGTH, NUM_SYMBOLS

_WORDS = """
above again along amber autumn below bright calm clear cloud cold distant drifts early evening falls field gentle grass
grey harbour hill keeps lantern leaves light long low meadow mist moon morning near never night north old over path quiet
rain reeds river road shore silent slow snow soft south stone summer the the the tide through turns under valley water
west while wind winter wood
""".split()  # noqa: SIM905 (as a list it would be five times as long)


class RecallPrompt(NamedTuple):
    """A question at the end of a document: its last token is the symbol that is asked about."""

    token_ids: list[int]
    answer_ids: list[int]


class RecallScore(NamedTuple):
    """How many answer symbols are right, out of how many."""

    right: int
    total: int

    @property
    def accuracy(self) -> float:
        return self.right / self.total


def make_prompts(
    num_facts: int, context_length: int, num_queries: int, hops: int = 1, seed: int = 0, answer_length: int = 1
) -> list[RecallPrompt]:
    """Questions about one document, each about another key.

    The facts form one ring: every value is the key of another fact. With one hop the answer is the value of the asked key;
    generation goes on round the ring, so ``answer_length`` symbols can be asked for. With two hops (``<ask-twice>``) the
    answer is the value of the value, found in one step.

    Args:
        num_facts: 3..512, all with different keys, anywhere in the document.
        context_length: tokens of each prompt, BOS and question included; at most 32768.
        num_queries: 1..num_facts.
        hops: 1 or 2.
        seed: chooses the text, the facts and the questions.
        answer_length: 1..num_facts - 1 symbols, in the order in which greedy decoding gives them.

    Raises:
        ValueError: a number is out of its range, or the facts do not fit into the context.
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
    document = _document(facts, context_length - 2, rng)
    prompts = []
    for asked in rng.sample(range(num_facts), num_queries):
        answer = [ring[(asked + hops + i) % num_facts] for i in range(answer_length)]
        prompts.append(RecallPrompt([*document, ASK_TWICE if hops == 2 else ASK, ring[asked]], answer))
    return prompts


def make_majority_prompts(
    context_length: int, num_queries: int, num_mentions: int = 96, share: float = 0.4, seed: int = 0
) -> list[RecallPrompt]:
    """Questions that no single fact answers: a key is mentioned many times, and the answer is what follows most often.

    The answer follows ``share`` of the mentions, four other symbols follow the rest in equal parts. Every question has a
    document of its own. Arguments and errors otherwise as in `make_prompts`.
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
        document = _document([(key, value) for value in values], context_length - 2, rng)
        prompts.append(RecallPrompt([*document, ASK, key], [answer]))
    return prompts


def score(prompts: Sequence[RecallPrompt], outputs: Sequence[Sequence[int]]) -> RecallScore:
    """Count the answer symbols that the generated token ids have at the right place; tokens past the answer do not count.

    Raises:
        ValueError: there is not one output for each prompt.
    """
    if len(prompts) != len(outputs):
        raise ValueError(f"{len(prompts)} prompts but {len(outputs)} outputs; pass one list of token ids for each prompt")
    right = sum(
        generated == wanted
        for prompt, output in zip(prompts, outputs, strict=True)
        for wanted, generated in zip(prompt.answer_ids, output, strict=False)
    )
    return RecallScore(right, sum(len(prompt.answer_ids) for prompt in prompts))


def _document(facts: Sequence[tuple[int, int]], length: int, rng: random.Random) -> list[int]:
    """BOS, and plain words in bytes with the facts between them in random order, ``length`` tokens in all."""
    if length + 2 > MAX_LENGTH:
        raise ValueError(f"context_length={length + 2} is more than the model's {MAX_LENGTH} positions")
    # a space follows each fact: two facts side by side would read as a third one
    filler_length = length - 1 - 3 * len(facts)
    filler = b""
    while len(filler) < filler_length:
        filler += rng.choice(_WORDS).encode() + b" "
    filler = filler[: max(filler_length, 0)]
    gaps = [i + 1 for i, byte in enumerate(filler) if byte == ord(" ")]
    runs = _runs(facts, rng)
    if len(gaps) < len(runs):
        raise ValueError(
            f"context_length={length + 2} has no room for {len(facts)} facts; use {12 * len(facts) + 16} tokens, or fewer facts"
        )
    planted = dict(zip(rng.sample(gaps, len(runs)), runs, strict=True))
    document = [BOS]
    for i in range(len(filler) + 1):
        for key, value in planted.get(i, ()):
            document += [key, value, ord(" ")]
        document += filler[i : i + 1]
    return document


def _runs(facts: Sequence[tuple[int, int]], rng: random.Random) -> list[list[tuple[int, int]]]:
    """The facts in random order, cut into runs of one to three.

    Some pages then hold four or five facts, whose codewords together bound any query as tightly as a match would: without
    them a handful of pages would do for any page selection, and a weak one would look perfect.
    """
    shuffled = rng.sample(facts, len(facts))
    runs = []
    while shuffled:
        length = rng.randint(1, 3)
        runs.append(shuffled[:length])
        shuffled = shuffled[length:]
    return runs
