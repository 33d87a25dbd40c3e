"""Session: one engine at work on examples: it answers them, compares itself with the dense run, and traces steps."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from distributed_sparse.sampling_params import SamplingParams
from distributed_sparse.tools.evaluation.distributions import kl_divergence, same_top_token, table_bytes
from distributed_sparse.tools.evaluation.meter import Counters, Meter, decode_contexts, page_bytes, pages_held
from distributed_sparse.tools.evaluation.suite import Answer, Example
from distributed_sparse.tools.evaluation.trace_summary import chosen_steps, summarise

if TYPE_CHECKING:
    from distributed_sparse import LLM

GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True)
class Answered:
    """An answer with what was seen on the way.

    Attributes:
        answer: what the suite judges.
        logprobs: float32 [rows, vocab] the distributions that runs are compared by; None where they do not fit into memory.
        pages: pages that the sequence held at its end.
        num_output_tokens: tokens generated.
    """

    answer: Answer
    logprobs: np.ndarray | None
    pages: int
    num_output_tokens: int


class Session:
    """An engine and its meter.

    Args:
        llm: open, and used by nobody else.
        table_limit: bytes that log-probabilities over the whole vocabulary may take at a time.
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
        """Answer examples together, all of them generated or all judged; the counters are of the answers alone.

        Args:
            forced: of generated answers, the tokens after which distributions are compared, by example: the dense run's; None:
                the ones that are generated now.
            most_compared: positions per generated answer that are compared; 0: none.
        """
        if examples[0].max_tokens == 0:
            return self._judge(examples)
        outputs = self._generate(
            [example.token_ids for example in examples],
            [
                GREEDY.updated(
                    {
                        "max_tokens": e.max_tokens,
                        "decode_last_prompt_tokens": e.num_question_tokens,
                        "seed": seed_of(e),
                        "trace_steps": self._no_steps,
                    }
                )
                for e in examples
            ],
        )
        answers = [Answer(output.outputs[0].text, tuple(output.outputs[0].token_ids)) for output in outputs]
        counters = self._meter.measure(
            context
            for example, answer in zip(examples, answers)
            for context in decode_contexts(len(example.token_ids), example.num_question_tokens, len(answer.token_ids))
        )
        found = []
        for example, answer in zip(examples, answers):
            said = answer.token_ids if forced is None else forced[example.id]
            table = self._compare(example, list(said[:most_compared]))
            num_tokens = len(example.token_ids) + len(answer.token_ids) - 1
            found.append(Answered(answer, table, self._pages(num_tokens), len(answer.token_ids)))
        return found, counters

    def _judge(self, examples: Sequence[Example]) -> tuple[list[Answered], Counters]:
        found = []
        for example in examples:  # one at a time: the tables are large
            logprobs, rows = self._score(example, example.token_ids, example.num_question_tokens, example.positions)
            top = () if rows is None else tuple(rows.argmax(-1).tolist())
            answer = Answer(token_ids=top, logprobs=logprobs.astype(np.float64))
            found.append(Answered(answer, rows, self._pages(len(example.token_ids)), 0))
        counters = self._meter.measure(
            context for e in examples for context in decode_contexts(len(e.token_ids), e.num_question_tokens)
        )
        return found, counters

    def _compare(self, example: Example, said: list[int]) -> np.ndarray | None:
        """The distributions of the answer's first tokens, after the prompt and what has been said of it."""
        token_ids = example.token_ids + said
        if not said or table_bytes(len(said), self._llm.model_config.vocab_size) > self._table_limit:
            return None
        num_decoded = example.num_question_tokens + len(said)
        _, rows = self._score(example, token_ids, num_decoded, range(len(example.token_ids), len(token_ids)))
        self._meter.measure(decode_contexts(len(token_ids), num_decoded))
        return rows

    def _score(
        self, example: Example, token_ids: list[int], num_decoded: int, positions: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Log-probabilities of the tokens at `positions`, ascending; and of all tokens there, where they fit into memory."""
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

    def trace(self, example: Example, said: Sequence[int], num_steps: int | None) -> dict[str, Any]:
        """Trace decode steps of an example and of an answer that is given to it; see `trace_summary.summarise`.

        Args:
            said: the answer's tokens; the last one is not read.
            num_steps: how many of the steps that say what is judged, spread evenly; None: all steps, one after the other.
        """
        # the last judged token is not read either: there may be no room for what would follow it
        token_ids = example.token_ids[: max(example.positions, default=len(example.token_ids))] + list(said[:-1])
        num_decoded = example.num_question_tokens + len(token_ids) - len(example.token_ids)
        first = len(token_ids) - num_decoded
        steps = list(range(num_decoded))
        if num_steps is not None:
            length = len(example.token_ids)
            saying = [p - 1 for p in example.positions] or range(length - 1, length - 1 + len(said))
            steps = [saying[i] - first for i in chosen_steps(len(saying), num_steps)]
        params = GREEDY.updated(
            {"max_tokens": 1, "decode_last_prompt_tokens": num_decoded, "trace_steps": steps, "seed": seed_of(example)}
        )
        (output,) = self._generate([token_ids], [params])
        return summarise(output.outputs[0].trace or [], self._llm.config.page_size)

    def _generate(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        for output in outputs:
            if output.error is not None:
                raise ValueError(f"the engine refused or failed an example: {output.error}")
        return outputs


def seed_of(example: Example) -> int:
    """The seed of an example's request: methods that draw do so alike whatever ran before."""
    return int.from_bytes(hashlib.sha256(example.id.encode()).digest()[:7])


def compared(reference: np.ndarray | None, own: np.ndarray | None) -> dict[str, Any]:
    """{"kl": nats per position, "top1": whether the most likely token is the same}; empty lists without distributions."""
    if reference is None or own is None:
        return {"kl": [], "top1": []}
    return {"kl": kl_divergence(reference, own), "top1": same_top_token(reference, own)}
