"""step: the overhead of a step beside the shards' own time: scheduling, the channel both ways, commit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from distributed_sparse import LLM, SamplingParams
from distributed_sparse.tools.bench.models import NEGLIGIBLE, bench_model
from distributed_sparse.tools.bench.synthetic import EngineSpec
from distributed_sparse.tools.bench.timing import read_bandwidth


@dataclass(frozen=True)
class StepSettings:
    """`batch` sequences decode `tokens` tokens each, on a model of negligible size."""

    tensor_parallel_size: int = 2
    batch: int = 8
    tokens: int = 400
    backend: str = "auto"
    device: str = "cpu"


PROMPT_TOKENS = 3

PAGE_SIZE = 16


def bench_step(settings: StepSettings) -> dict[str, Any]:
    """Medians over decode steps, in ms: the whole step as the Driver sees it, the slowest shard's own time, and the rest.

    The rest ("overhead") is the Driver and the channel: schedule, encode, send, wake the shards, receive, commit. The "gap" is
    the shards' idle time between two steps: from the last result received until all shards have begun the next step.
    "bytes_ms" is the time of a rank's weights and attention's bytes at the machine's measured read bandwidth.
    """
    with bench_model(NEGLIGIBLE, device=settings.device) as model:
        spec = EngineSpec(
            model=model,
            sparse=None,
            tensor_parallel_size=settings.tensor_parallel_size,
            page_size=PAGE_SIZE,
            max_model_len=PROMPT_TOKENS + settings.tokens,
            max_num_seqs=settings.batch,
        )
        engine_args: dict[str, Any] = {"max_num_batched_tokens": max(2048, settings.batch), **spec.engine_args}
        with LLM(str(model.path), distributed_executor_backend=settings.backend, **engine_args) as llm:
            params = SamplingParams(temperature=0.0, max_tokens=settings.tokens, ignore_eos=True)
            prompts = [[3 + row % 250] * PROMPT_TOKENS for row in range(settings.batch)]
            outputs = llm.generate(prompts, params, use_tqdm=False)
            assert all(len(output.outputs[0].token_ids) == settings.tokens for output in outputs)
            stats = llm.stats()
    weights = max(rank["weight_bytes"] for rank in stats["ranks"])
    cache = stats["attention"]["bytes_read"] / stats["steps"] / settings.tensor_parallel_size
    bytes_ms = (weights + cache) / read_bandwidth(torch.device(settings.device)) * 1e3
    return {"steps": stats["steps"], **stats["time_ms"], "bytes_ms": bytes_ms, "settings": asdict(settings)}
