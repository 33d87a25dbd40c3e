"""session: run examples on one engine: answers, distributions to compare with the dense run, and traces."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from distributed_sparse.sampling_params import SamplingParams
from distributed_sparse.tools.evaluation.meter import Counters, Meter, decode_contexts, page_bytes, pages_held
from distributed_sparse.tools.evaluation.suite import Answer, Example
from distributed_sparse.tools.evaluation.trace_summary import chosen_steps, summarise

if TYPE_CHECKING:
    from distributed_sparse import LLM


@dataclass(frozen=True)
class Answered:
    """An answer and its measurements.

    Attributes:
        answer: input of the suite's `score`.
        logprobs: float32 [positions, vocab], the distributions that runs are compared by; None if they do not fit into memory.
        pages: pages that the sequence held at its end.
    """

    answer: Answer
    logprobs: np.ndarray | None
    pages: int


class Session:
    """An engine and its meter.

    Args:
        llm: open, for this session's exclusive use.
        table_limit: most bytes of log-probabilities over the whole vocabulary at a time.
    """

    def __init__(self, llm: LLM, table_limit: int) -> None:
        self._llm, self._table_limit = llm, table_limit
        self._meter = Meter(llm)
        self._no_steps: list[int] | None = [] if llm.config.trace else None
        ranks = llm.stats()["ranks"]
        self.page_bytes = page_bytes(ranks)
        self._kept_pages = ranks[0]["evict_window"]

    # ---- answers

    def answer(
        self, examples: Sequence[Example], forced: Mapping[str, Sequence[int]] | None, most_compared: int
    ) -> tuple[list[Answered], Counters]:
        """Answer a batch of examples, all of them generated or all judged; the counters cover the answers alone.

        Args:
            forced: for generated answers, by example id, the tokens that are fed to get the distributions: the dense run's
                answers; None: the answers generated here.
            most_compared: positions per generated answer whose distributions are computed; 0: none.
        """
        if examples[0].max_tokens == 0:
            return self._judge(examples)
        params = [_greedy(example, example.max_tokens, example.num_question_tokens, self._no_steps) for example in examples]
        outputs = self._generate([example.token_ids for example in examples], params)
        answers = [Answer(output.outputs[0].text, tuple(output.outputs[0].token_ids)) for output in outputs]
        counters = self._meter.measure(
            context
            for example, answer in zip(examples, answers)
            for context in decode_contexts(len(example.token_ids), example.num_question_tokens, len(answer.token_ids))
        )
        found = []
        for example, answer in zip(examples, answers):
            answer_ids = answer.token_ids if forced is None else forced[example.id]
            table = self._compare(example, list(answer_ids[:most_compared]))
            num_tokens = len(example.token_ids) + len(answer.token_ids) - 1
            found.append(Answered(answer, table, self._pages(num_tokens)))
        return found, counters

    def _judge(self, examples: Sequence[Example]) -> tuple[list[Answered], Counters]:
        found = []
        for example in examples:  # one at a time, since the tables are large
            logprobs, rows = self._score(example, example.token_ids, example.num_question_tokens, example.positions)
            top = () if rows is None else tuple(rows.argmax(-1).tolist())
            answer = Answer(token_ids=top, logprobs=logprobs.astype(np.float64))
            found.append(Answered(answer, rows, self._pages(len(example.token_ids))))
        counters = self._meter.measure(
            context for e in examples for context in decode_contexts(len(e.token_ids), e.num_question_tokens)
        )
        return found, counters

    def _compare(self, example: Example, answer_ids: list[int]) -> np.ndarray | None:
        """The distributions at the tokens `answer_ids` when the prompt and these tokens are fed; None if they do not fit."""
        token_ids = example.token_ids + answer_ids
        if not answer_ids or table_bytes(len(answer_ids), self._llm.model_config.vocab_size) > self._table_limit:
            return None
        num_decoded = example.num_question_tokens + len(answer_ids)
        _, rows = self._score(example, token_ids, num_decoded, range(len(example.token_ids), len(token_ids)))
        self._meter.measure(decode_contexts(len(token_ids), num_decoded))
        return rows

    def _score(
        self, example: Example, token_ids: list[int], num_decoded: int, positions: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Log-probabilities of the tokens at `positions` (ascending), and of the whole vocabulary there if they fit."""
        first = positions[0]
        whole = table_bytes(len(token_ids) - first, self._llm.model_config.vocab_size) <= self._table_limit
        (scored,) = self._llm.score(
            token_ids,
            whole_vocabulary=whole,
            decode_last_prompt_tokens=num_decoded,
            seed=seed_of(example),
            trace_steps=self._no_steps,
            first=first,
        )
        rows = [position - first for position in positions]
        return scored.token_logprobs[rows], None if scored.logprobs is None else scored.logprobs[rows]

    def _pages(self, num_tokens: int) -> int:
        return pages_held(num_tokens, self._llm.config.page_size, self._kept_pages)

    # ---- traces

    def trace(self, example: Example, answer_ids: Sequence[int], num_steps: int | None) -> dict[str, Any]:
        """Trace decode steps of an example followed by a given answer; see `trace_summary.summarise`.

        Args:
            answer_ids: the answer's tokens; the last one is not fed.
            num_steps: number of traced steps, evenly spread over those that predict a judged or answer token; None: all decode
                steps.
        """
        # nor is the last judged token fed: there may be no room for the token after it
        token_ids = example.token_ids[: max(example.positions, default=len(example.token_ids))] + list(answer_ids[:-1])
        num_decoded = example.num_question_tokens + len(token_ids) - len(example.token_ids)
        first = len(token_ids) - num_decoded
        steps = list(range(num_decoded))
        if num_steps is not None:
            length = len(example.token_ids)
            predicting = [p - 1 for p in example.positions] or range(length - 1, length - 1 + len(answer_ids))
            steps = [predicting[i] - first for i in chosen_steps(len(predicting), num_steps)]
        (output,) = self._generate([token_ids], [_greedy(example, 1, num_decoded, steps)])
        return summarise(output.outputs[0].trace or [], self._llm.config.page_size)

    def _generate(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        for output in outputs:
            if output.error is not None:
                raise ValueError(f"the engine refused or failed an example: {output.error}")
        return outputs


def _greedy(example: Example, max_tokens: int, num_decoded: int, trace_steps: list[int] | None) -> SamplingParams:
    return SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        decode_last_prompt_tokens=num_decoded,
        trace_steps=trace_steps,
        seed=seed_of(example),
    )


def seed_of(example: Example) -> int:
    """The seed of an example's request, so that a method's random draws do not depend on earlier requests."""
    return int.from_bytes(hashlib.sha256(example.id.encode()).digest()[:7])


def table_bytes(length: int, vocab_size: int) -> int:
    """Bytes of float32 log-probabilities over the whole vocabulary at `length` positions."""
    return 4 * length * vocab_size


def kl_divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(reference || other) in nats, float64 [rows].

    Args:
        reference, other: [rows, vocab] natural log-probabilities.
    """
    p, q = reference.astype(np.float64), other.astype(np.float64)
    with np.errstate(invalid="ignore"):
        terms = np.exp(p) * (p - q)
    # a -inf of the reference contributes 0; rounding of float32 inputs can make the sum slightly negative
    return np.maximum(np.where(np.isneginf(p), 0.0, terms).sum(-1), 0.0)


def compared(reference: np.ndarray | None, own: np.ndarray | None) -> dict[str, Any]:
    """{"kl": nats per position, "top1": whether the most likely tokens are equal}; empty lists without distributions."""
    if reference is None or own is None:
        return {"kl": [], "top1": []}
    return {"kl": kl_divergence(reference, own), "top1": reference.argmax(-1) == own.argmax(-1)}
