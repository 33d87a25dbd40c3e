"""ttft: the time from a prompt to its first token, truly computed, of engines and of transformers in turns."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch

from distributed_sparse.bench.accuracy import WrongResult
from distributed_sparse.bench.decode import DecodeSettings, one_ray
from distributed_sparse.bench.measure import (
    Times,
    Unavailable,
    check_memory,
    out_of_memory_is_unavailable,
    torch_threads,
)
from distributed_sparse.bench.models import BenchModel, bench_model
from distributed_sparse.bench.synthetic import SyntheticLLM, SyntheticShard
from distributed_sparse.bench.transformers_peer import check_token, first_token, transformers_model
from distributed_sparse.client import EngineError
from distributed_sparse.driver.client_messages import NewRequest
from distributed_sparse.model.limits import resolve_device, resolve_dtype
from distributed_sparse.planner.rank import RankOnPaper
from distributed_sparse.sampling_params import SamplingParams
from distributed_sparse.scaling.load import send

WARM_UP_TOKENS = 512
"""Of the prompt before the first round."""

NEVER = 1 << 62
"""No prompt is so long that it would be filled instead of computed."""

PEER = "transformers"


def bench_ttft(settings: DecodeSettings, told: Callable[[dict[str, Any]], object] = lambda row: None) -> list[dict[str, Any]]:
    """Time to first token of each method and of transformers, in rounds in which all take turns with the same new prompt.

    Returns:
        Rows of "contestant", "tensor_parallel_size", "prompt_len", and either "ttft_ms" (median of the rounds) with "p10_ms"
        and "p90_ms", and "over_transformers", the median of the rounds' ratios; or "unavailable" or "wrong", with the reason.
    """
    device = resolve_device(settings.device)
    rows: list[dict[str, Any]] = []
    with bench_model(settings.model) as model, torch_threads(settings.threads), one_ray(settings):
        dtype = resolve_dtype(settings.dtype, model.config.dtype)
        for prompt_len in settings.ttft:
            of_length = _of_length(settings, model, dtype, device, prompt_len)
            for row in of_length:
                row |= {"prompt_len": prompt_len, "dtype": str(dtype).removeprefix("torch.")}
                told(row)
            rows += of_length
    return rows


def _of_length(
    settings: DecodeSettings, model: BenchModel, dtype: torch.dtype, device: torch.device, prompt_len: int
) -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    lengths = [min(prompt_len, WARM_UP_TOKENS)] + [prompt_len] * settings.rounds
    prompts = [generator.integers(3, model.config.vocab_size, length).tolist() for length in lengths]
    with ExitStack() as opened:
        rows: list[dict[str, Any]] = []
        hf = None
        if PEER in settings.peer:
            rows.append({"contestant": PEER, "tensor_parallel_size": 1})
            try:
                with out_of_memory_is_unavailable():
                    hf = transformers_model(model, dtype, device)
            except Unavailable as reason:
                rows[-1]["unavailable"] = str(reason)
        engines = []
        for (name, sparse), size in product(settings.sections().items(), settings.tensor_parallel_size):
            row: dict[str, Any] = {"contestant": name, "tensor_parallel_size": size}
            rows.append(row)
            try:
                llm = opened.enter_context(_engine(settings, model, sparse, size, dtype, device, prompt_len))
                engines.append((row, llm))
            except (Unavailable, EngineError, ValueError) as reason:
                row["unavailable"] = str(reason)
        seconds: dict[int, list[float]] = {number: [] for number in range(len(rows))}
        for number, prompt in enumerate(prompts):
            logits = None
            if hf is not None:
                taken, logits = first_token(hf, prompt)
                seconds[0] += [taken] if number else []
            for row, llm in engines:
                params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, seed=0)
                [times] = send(llm, [NewRequest(uuid.uuid4().hex, prompt, params)], 1)
                if logits is not None:
                    try:
                        check_token(f"{row['contestant']}: the first token", times.token_ids[0], logits, dtype)
                    except WrongResult as wrong:
                        row["wrong"] = str(wrong)
                seconds[rows.index(row)] += [times.ttft] if number else []
    for number, row in enumerate(rows):
        if seconds[number] and "wrong" not in row:
            spread = Times(seconds[number]).ms
            row |= {"ttft_ms": spread.pop("ms"), **spread}
            if hf is not None:
                row["over_transformers"] = float(
                    np.median([own / of_peer for own, of_peer in zip(seconds[number], seconds[0])])
                )
            row["checked"] = "its first token with transformers'" if hf is not None else "not checked"
    return rows


def _engine(
    settings: DecodeSettings,
    model: BenchModel,
    sparse: dict[str, Any] | None,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    prompt_len: int,
) -> SyntheticLLM:
    paper = RankOnPaper(model.config, size, sparse, settings.page_size, dtype)
    max_model_len = prompt_len + settings.page_size
    cache_bytes = (-(-max_model_len // settings.page_size) + 1) * sum(paper.page_bytes)
    check_memory(f"a prompt of {prompt_len} tokens", paper.weight_bytes + cache_bytes, device)
    with out_of_memory_is_unavailable():
        return SyntheticLLM(
            str(model.path),
            partial(SyntheticShard, fill_from=NEVER, num_threads=settings.threads),
            load_format=model.load_format,
            tensor_parallel_size=size,
            sparse=sparse,
            dtype=str(dtype).removeprefix("torch."),
            device=device.type,
            page_size=settings.page_size,
            max_model_len=max_model_len,
            max_num_seqs=1,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            kv_cache_memory_bytes=cache_bytes,
            step_timeout_s=3600.0,
        )
