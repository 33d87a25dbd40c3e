"""ttft: time to first token of computed prompts, by engines and transformers in turns."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distributed_sparse.llm import LLM
from distributed_sparse.protocol.client import NewRequest
from distributed_sparse.sampling_params import SamplingParams
from distributed_sparse.tools.bench.contestants import TIMEOUT_S
from distributed_sparse.tools.bench.decode import DecodeSettings, benchmarked
from distributed_sparse.tools.bench.failures import caught
from distributed_sparse.tools.bench.models import BenchModel
from distributed_sparse.tools.bench.synthetic import EngineSpec
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


@dataclass
class Entrant:
    """A contestant of this benchmark."""

    row: dict[str, Any]
    """The result so far; a contestant with "unavailable" or "wrong" takes no further part."""
    is_peer: bool = False
    run: Callable[[list[int]], tuple[float, Any]] | None = None
    """Returns a prompt's seconds and first token (transformers: that token's logits)."""
    seconds: list[float] = field(default_factory=list)

    @contextmanager
    def may_fail(self) -> Iterator[None]:
        with caught(self.row["contestant"], self.is_peer) as failed:
            yield
        if self.takes_part:  # keep the first failure
            self.row |= failed

    def close(self, llm: LLM) -> None:
        with self.may_fail():
            llm.shutdown()

    @property
    def takes_part(self) -> bool:
        return not {"unavailable", "wrong"} & self.row.keys()


def _of_length(settings: DecodeSettings, model: BenchModel, prompt_len: int) -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    lengths = [min(prompt_len, WARM_UP_TOKENS)] + [prompt_len] * settings.rounds
    prompts = [generator.integers(3, model.config.vocab_size, length).tolist() for length in lengths]
    with ExitStack() as opened:
        peer = _peer(model) if PEER in settings.peer else None
        engines: list[Entrant] = []
        for (name, sparse), size in product(settings.sections().items(), settings.tensor_parallel_size):
            engines.append(Entrant({"contestant": name, "tensor_parallel_size": size}))
            with engines[-1].may_fail():
                spec = EngineSpec(
                    model=model,
                    sparse=sparse,
                    tensor_parallel_size=size,
                    page_size=settings.page_size,
                    max_model_len=prompt_len + settings.page_size,
                    max_num_seqs=1,
                    threads=settings.threads,
                )
                load = f"a prompt of {prompt_len} tokens"
                batched = settings.max_num_batched_tokens
                llm = spec.start(load, max_num_batched_tokens=batched, step_timeout_s=TIMEOUT_S)
                opened.callback(engines[-1].close, llm)
                engines[-1].run = partial(_first_token, llm)
        for number, prompt in enumerate(prompts):
            _take_turns(peer, engines, prompt, model.dtype, is_timed=number > 0)
    entrants = [*([peer] if peer else []), *engines]
    for one in entrants:
        if one.takes_part:
            one.row |= _measured(one, peer if peer is not None and peer.takes_part else None)
    return [one.row for one in entrants]


def _peer(model: BenchModel) -> Entrant:
    """transformers, which is also the reference."""
    entrant = Entrant({"contestant": PEER, "tensor_parallel_size": 1}, is_peer=True)
    with entrant.may_fail():
        entrant.run = partial(first_token, transformers_model(model))
    return entrant


def _first_token(llm: LLM, prompt: list[int]) -> tuple[float, int]:
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, seed=0)
    [times] = send(llm, [NewRequest(uuid.uuid4().hex, prompt, params)], 1)
    return times.ttft, times.token_ids[0]


def _take_turns(peer: Entrant | None, engines: list[Entrant], prompt: list[int], dtype: torch.dtype, is_timed: bool) -> None:
    """Give one prompt to all that have not failed."""
    logits: Tensor | None = None
    for one in [*([peer] if peer else []), *engines]:
        if not one.takes_part:
            continue
        assert one.run is not None
        with one.may_fail():
            seconds, found = one.run(prompt)
            if one is peer:
                logits = found
            elif logits is not None:
                check_token(f"{one.row['contestant']}: the first token", found, logits, dtype)
            if is_timed:
                one.seconds.append(seconds)


def _measured(one: Entrant, peer: Entrant | None) -> dict[str, Any]:
    spread = Times(one.seconds).ms
    row: dict[str, Any] = {"ttft_ms": spread.pop("ms"), **spread}
    if peer is None:
        return {**row, "checked": "not checked"}
    ratios = [own / of_peer for own, of_peer in zip(one.seconds, peer.seconds)]
    return {**row, "over_transformers": float(np.median(ratios)), "checked": "its first token with transformers'"}
