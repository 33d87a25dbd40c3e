"""serve: open-loop arrivals of requests, with the names and definitions of `vllm bench serve`."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from distributed_sparse.client.client import EngineError
from distributed_sparse.llm import LLM
from distributed_sparse.sampling_params import SamplingParams
from distributed_sparse.tools.bench.accuracy import WrongResult
from distributed_sparse.tools.bench.decode import DecodeSettings, benchmarked
from distributed_sparse.tools.bench.failures import caught
from distributed_sparse.tools.bench.models import BenchModel
from distributed_sparse.tools.bench.synthetic import EngineSpec, SyntheticLLM
from distributed_sparse.tools.common.latency import RequestTimes, latencies, spread_ms
from distributed_sparse.tools.planner.plan import sparse_sections

CHECKED_REQUESTS = 2

TIE_NATS = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""Two tokens count as tied if their log-probabilities differ by at most this many nats."""


@dataclass(frozen=True)
class ServeSettings:
    """The requests, their arrivals, and the engine."""

    model: str = DecodeSettings.model
    method: tuple[str, ...] = ("dense", "quest")
    set: tuple[str, ...] = ()
    request_rate: tuple[float, ...] = (math.inf,)
    """Requests per second; inf: all at once."""
    burstiness: float = 1.0
    """Shape of the gamma distribution of the gaps: 1 is Poisson, less is burstier; inf: equal gaps."""
    num_prompts: int = 16
    random_input_len: int = 512
    random_output_len: int = 32
    num_warmups: int = 8
    """Unmeasured requests, sent at once before an engine's first rate."""
    rounds: int = 3
    """Runs at each rate with different prompts and arrivals; the one of median output throughput is reported."""
    seed: int = 0
    tensor_parallel_size: int = 1
    dtype: str = "auto"
    device: str = "cpu"
    threads: int | None = None
    page_size: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048

    def __post_init__(self) -> None:
        for name in ("num_prompts", "random_input_len", "random_output_len", "num_warmups", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is below 1")
        for name, values in (("request-rate", self.request_rate), ("burstiness", (self.burstiness,))):
            if any(not value > 0 for value in values):
                raise ValueError(f"--{name} {values} must be above 0")

    def prompts(self, count: int, round_number: int, vocab_size: int) -> list[list[int]]:
        """Prompts of random token ids; round 0 is the warm-up."""
        generators = (np.random.default_rng([self.seed, round_number, number]) for number in range(count))
        return [generator.integers(3, vocab_size, self.random_input_len).tolist() for generator in generators]


@dataclass
class Served:
    """One request as its client saw it."""

    times: RequestTimes
    due: float
    """When it should be sent (`time.monotonic`)."""
    error: str | None = None


def arrival_times(count: int, request_rate: float, burstiness: float, seed: int) -> list[float]:
    """Arrival times of requests in seconds from the start, as in `get_request` of `vllm bench serve`.

    Gaps, including the first request's, follow a gamma distribution of mean 1 / request_rate. They are scaled so that the last
    request arrives at count / request_rate.

    Args:
        burstiness: shape of the distribution; inf: equal gaps.
    """
    if math.isinf(request_rate):
        return [0.0] * count
    if math.isinf(burstiness):
        times = np.arange(1.0, count + 1)
    else:
        gaps = np.random.default_rng(seed).gamma(burstiness, 1.0 / (request_rate * burstiness), count)
        times = np.cumsum(gaps)
    stretched = times * (count / request_rate / times[-1]) if times[-1] > 0 else times
    return stretched.tolist()


def bench_serve(settings: ServeSettings, on_row: Callable[[dict[str, Any]], object] = lambda row: None) -> list[dict[str, Any]]:
    """Serve the same requests with each method at each rate.

    Returns:
        Rows of "method", "request_rate" and the results that `vllm bench serve` saves: "duration" (s, from the start of the
        first gap to the end of the last request), "completed", "failed", "total_input_tokens", "total_output_tokens",
        "request_throughput", "output_throughput", "total_token_throughput" (per second), and
        {mean, median, p99}_{ttft, tpot, itl, e2el}_ms. In addition "max_send_delay_ms" (how late the client sent),
        {min, max}_output_throughput of the rounds, and "greedy_agreement" (the share of tokens of checked requests that a dense
        prefill of prompt and output ranks first). Or "unavailable" or "wrong" with the reason.
    """
    rows: list[dict[str, Any]] = []
    num_ranks = settings.tensor_parallel_size
    with benchmarked(settings.model, settings.dtype, settings.device, settings.threads, num_ranks) as (model, _):
        for method, sparse in sparse_sections(settings.method, settings.set).items():
            of_method: list[dict[str, Any]] = []
            with caught(method) as failed, _engine(settings, model, sparse) as llm:
                warm_ups = settings.prompts(settings.num_warmups, 0, model.config.vocab_size)
                asyncio.run(serve(llm, warm_ups, [0.0] * len(warm_ups), settings.random_output_len))
                for rate in settings.request_rate:
                    rounds = range(1, settings.rounds + 1)
                    of_method.append(median_round([_at_rate(settings, llm, rate, method, model.dtype, n) for n in rounds]))
            if failed:
                of_method.append({**failed})
            for row in of_method:
                row |= {"method": method, "tensor_parallel_size": settings.tensor_parallel_size}
                rows.append({"method": row.pop("method"), **row})
                on_row(rows[-1])
    return rows


def _engine(settings: ServeSettings, model: BenchModel, sparse: dict[str, Any]) -> SyntheticLLM:
    """An engine with room for the requests that run at once; prompts are computed."""
    spec = EngineSpec(
        model=model,
        sparse=sparse,
        tensor_parallel_size=settings.tensor_parallel_size,
        page_size=settings.page_size,
        max_model_len=settings.random_input_len + settings.random_output_len + 1,
        max_num_seqs=min(settings.max_num_seqs, settings.num_prompts),
        threads=settings.threads,
    )
    load = f"{spec.max_num_seqs} requests at once"
    return spec.start(load, max_num_batched_tokens=settings.max_num_batched_tokens, seed=settings.seed)


def _at_rate(
    settings: ServeSettings, llm: LLM, rate: float, method: str, dtype: torch.dtype, round_number: int
) -> dict[str, Any]:
    prompts = settings.prompts(settings.num_prompts, round_number, llm.model_config.vocab_size)
    due = arrival_times(settings.num_prompts, rate, settings.burstiness, settings.seed + round_number)
    served, duration = asyncio.run(serve(llm, prompts, due, settings.random_output_len))
    row: dict[str, Any] = {"request_rate": rate if math.isfinite(rate) else "inf", "burstiness": settings.burstiness}
    try:
        agreement = greedy_agreement(llm, prompts, served, method, dtype, settings.random_output_len)
    except WrongResult as wrong:
        return {**row, "wrong": str(wrong)}
    return row | summary(served, duration) | {"greedy_agreement": agreement}


def median_round(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of median output throughput, with all rounds' extremes and errors; or the first wrong row."""
    for row in rounds:
        if "wrong" in row:
            return row
    by_throughput = sorted(rounds, key=lambda row: row["output_throughput"])
    return by_throughput[(len(rounds) - 1) // 2] | {
        "min_output_throughput": by_throughput[0]["output_throughput"],
        "max_output_throughput": by_throughput[-1]["output_throughput"],
        "errors": sorted({error for row in rounds for error in row["errors"]}),
    }


async def serve(llm: LLM, prompts: Sequence[list[int]], due: Sequence[float], output_len: int) -> tuple[list[Served], float]:
    """Send each request when it is due, whether or not others have ended, and wait for all of them.

    Args:
        due: seconds from now.
        output_len: tokens to generate per request.

    Returns:
        The requests as the client saw them, and the seconds from now until all had ended.
    """
    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
    started = time.monotonic()
    served = await asyncio.gather(*(_one(llm, prompt, params, started + after) for prompt, after in zip(prompts, due)))
    return served, time.monotonic() - started


async def _one(llm: LLM, prompt: list[int], params: SamplingParams, due: float) -> Served:
    await asyncio.sleep(max(0.0, due - time.monotonic()))
    times = RequestTimes(time.monotonic(), len(prompt))
    served = Served(times, due)
    try:
        stream = await asyncio.to_thread(llm.stream, prompt, params)  # submitting may block
        async for output in stream:
            tokens = output.outputs[0].token_ids
            if len(tokens) > len(times.token_ids):
                times.arrivals.append(time.monotonic())
                times.token_ids = list(tokens)
            served.error = output.error
    except (EngineError, ValueError) as error:
        served.error = str(error)
    return served


def summary(served: Sequence[Served], duration: float) -> dict[str, Any]:
    """Totals and latencies under the names of `vllm bench serve`, over the completed requests.

    Args:
        duration: seconds until all requests, failed ones included, had ended.
    """
    completed = [one.times for one in served if one.error is None]
    errors = sorted({one.error for one in served if one.error is not None})
    row: dict[str, Any] = {
        "completed": len(completed),
        "failed": len(served) - len(completed),
        "max_send_delay_ms": max(one.times.sent - one.due for one in served) * 1e3,
        "errors": errors,
    }
    if not completed:
        return {**row, "wrong": f"no request was completed: {errors[0]}"}
    found = latencies(completed)
    num_input = sum(one.num_prompt_tokens for one in completed)
    num_output = sum(len(one.token_ids) for one in completed)
    row |= {
        "duration": duration,
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(completed) / duration,
        "output_throughput": num_output / duration,
        "total_token_throughput": (num_input + num_output) / duration,
    }
    found["e2el_ms"] = spread_ms([one.arrivals[-1] - one.sent for one in completed])
    for name in ("ttft", "tpot", "itl", "e2el"):
        spread = found[f"{name}_ms"] or dict.fromkeys(("mean", "median", "p99"))
        row |= {f"{statistic}_{name}_ms": value for statistic, value in spread.items()}
    return row


def greedy_agreement(
    llm: LLM, prompts: Sequence[list[int]], served: Sequence[Served], method: str, dtype: torch.dtype, output_len: int
) -> float | None:
    """The share of the first completed requests' tokens that a dense prefill of prompt and output ranks first.

    A dense engine must reach 1 up to ties, which differ because requests decode in a changing batch but are prefilled alone.

    Raises:
        WrongResult: a request has another number of tokens, or a dense engine another token than its prefill.
    """
    equal, total = 0, 0
    checked = [place for place, one in enumerate(served) if one.error is None][:CHECKED_REQUESTS]
    for place in checked:
        prompt, tokens = prompts[place], served[place].times.token_ids
        if len(tokens) != output_len:
            raise WrongResult(f"{method}: request {place} has {len(tokens)} tokens instead of {output_len}")
        params = SamplingParams(max_tokens=1, prompt_logprobs=1, ignore_eos=True)
        output = llm.generate([*prompt, *tokens], params, use_tqdm=False)[0]
        assert output.prompt_logprobs is not None
        for position, token in enumerate(tokens, len(prompt)):
            of_position = output.prompt_logprobs[position]
            assert of_position is not None
            best = max(entry.logprob for entry in of_position.values())
            behind = best - of_position[token].logprob
            equal, total = equal + (behind == 0.0), total + 1
            if method == "dense" and behind > TIE_NATS[dtype]:
                number = position - len(prompt) + 1
                raise WrongResult(
                    f"{method}: token {number} of request {place} is behind the best one of its prefill by {behind:.2g} nats"
                )
    return equal / total if total else None
