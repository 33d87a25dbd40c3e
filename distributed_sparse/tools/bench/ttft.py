"""ttft: time to first token of computed prompts, by engines and transformers in turns."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from torch import Tensor

from distributed_sparse.protocol.client import NewRequest
from distributed_sparse.sampling_params import SamplingParams
from distributed_sparse.tools.bench.contestants import TIMEOUT_S, Contestant, Engine, Round, Task
from distributed_sparse.tools.bench.decode import DecodeSettings, Point, benchmarked
from distributed_sparse.tools.bench.models import BenchModel
from distributed_sparse.tools.bench.timing import Times
from distributed_sparse.tools.bench.transformers_peer import check_token, first_token, transformers_model
from distributed_sparse.tools.common.load import send

WARM_UP_TOKENS = 512
"""Length of the prompt before the first round."""

PEER = "transformers"


def bench_ttft(settings: DecodeSettings, on_row: Callable[[dict[str, Any]], object] = lambda row: None) -> list[dict[str, Any]]:
    """Measure the time to first token of each method and of transformers. In each round all take turns with one new prompt.

    Returns:
        Rows of "contestant", "tensor_parallel_size", "prompt_len", and either "ttft_ms" (median of the rounds) with "p10_ms",
        "p90_ms" and "over_transformers" (median of the rounds' ratios); or "unavailable" or "wrong" with the reason.
    """
    rows: list[dict[str, Any]] = []
    num_ranks = max(settings.tensor_parallel_size)
    with benchmarked(settings.model, settings.dtype, settings.device, settings.threads, num_ranks) as (model, _):
        for prompt_len in settings.ttft:
            of_length = _of_length(settings, model, prompt_len)
            for row in of_length:
                row |= {"prompt_len": prompt_len, "dtype": model.dtype_name}
                on_row(row)
            rows += of_length
    return rows


@dataclass(frozen=True)
class Prompts(Task):
    """One new prompt for each round, the first of which is the warm-up."""

    max_num_batched_tokens: int = 2048
    turns: list[list[int]] = field(default_factory=list)
    logits: dict[int, Tensor] = field(default_factory=dict)
    """transformers' logits of a prompt's first token, by round."""


class FirstToken(Engine):
    """This project's engine with one method, which computes prompts."""

    task: Prompts

    def open(self) -> None:
        task = self.task
        batched = task.max_num_batched_tokens
        load = f"a prompt of {task.context} tokens"
        self._llm = self.spec.start(load, max_num_batched_tokens=batched, step_timeout_s=TIMEOUT_S)
        self._turns = enumerate(task.turns)

    def round(self) -> Round:
        assert self._llm is not None
        number, prompt = next(self._turns)
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, seed=0)
        [times] = send(self._llm, [NewRequest(uuid.uuid4().hex, prompt, params)], 1)
        if number in self.task.logits:
            logits, dtype = self.task.logits[number], self.task.model.dtype
            check_token(f"{self.name}: the first token", times.token_ids[0], logits, dtype)
        return Round([times.ttft])


class TransformersFirstToken(Contestant):
    """transformers, which is also the reference."""

    task: Prompts
    name = PEER
    is_peer = True

    @property
    def num_bytes(self) -> int:
        return self.rank.weight_bytes

    def open(self) -> None:
        self._hf = transformers_model(self.task.model)
        self._turns = enumerate(self.task.turns)

    def round(self) -> Round:
        number, prompt = next(self._turns)
        seconds, self.task.logits[number] = first_token(self._hf, prompt)
        return Round([seconds])

    def close(self) -> None:
        self.__dict__.pop("_hf", None)


def _of_length(settings: DecodeSettings, model: BenchModel, prompt_len: int) -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    lengths = [min(prompt_len, WARM_UP_TOKENS)] + [prompt_len] * settings.rounds
    task = Prompts(
        model,
        context=prompt_len,
        batch=1,
        num_tokens=settings.page_size,
        warm_up_s=0.0,
        page_size=settings.page_size,
        threads=settings.threads,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        turns=[generator.integers(3, model.config.vocab_size, length).tolist() for length in lengths],
    )
    methods = product(settings.sections().items(), settings.tensor_parallel_size)
    contestants: list[Contestant] = [TransformersFirstToken(task)] if PEER in settings.peer else []
    contestants += [FirstToken(task, name, sparse, size, None) for (name, sparse), size in methods]
    point = Point(contestants, len(lengths))
    point.take_turns(contestants)
    timed = {key: [own.median for own in rounds[1:]] for key, rounds in point.rounds.items() if key not in point.failed}
    of_peer = timed.get(f"{PEER} 1")
    rows: list[dict[str, Any]] = []
    for one in contestants:
        rows.append({"contestant": one.name, "tensor_parallel_size": one.tensor_parallel_size})
        if one.key in point.failed:
            rows[-1] |= point.failed[one.key]
            continue
        spread = Times(timed[one.key]).ms
        rows[-1] |= {"ttft_ms": spread.pop("ms"), **spread, "checked": "not checked"}
        if of_peer is not None:
            ratios = [own / peer for own, peer in zip(timed[one.key], of_peer)]
            rows[-1] |= {"over_transformers": float(np.median(ratios)), "checked": "its first token with transformers'"}
    return rows
