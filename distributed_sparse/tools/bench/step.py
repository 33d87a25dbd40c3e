"""step: the overhead of a step beside the shards' own time: scheduling, the channel both ways, commit."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from distributed_sparse import LLM, SamplingParams
from distributed_sparse.model.config import ModelConfig
from distributed_sparse.tools.bench.models import ATTENTION_HEAVY, CONFIGS
from distributed_sparse.tools.bench.timing import read_bandwidth
from distributed_sparse.tools.planner.rank import RankCostModel


@dataclass(frozen=True)
class StepSettings:
    """`batch` sequences decode `tokens` tokens each, on a model of negligible size."""

    tensor_parallel_size: int = 2
    batch: int = 8
    tokens: int = 400
    backend: str = "auto"
    device: str = "cpu"


NEGLIGIBLE_MODEL = CONFIGS[ATTENTION_HEAVY] | {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
"""GPU kernels support its head_dim."""

PROMPT_TOKENS = 3

PAGE_SIZE = 16


def bench_step(settings: StepSettings) -> dict[str, Any]:
    """Medians over decode steps, in ms: the whole step as the Driver sees it, the slowest shard's own time, and the rest.

    The rest ("overhead") is the Driver and the channel: schedule, encode, send, wake the shards, receive, commit. The "gap" is
    the shards' idle time between two steps: from the last result received until all shards have begun the next step.
    "bytes_ms" is the time of a rank's weights and attention's bytes at the machine's measured read bandwidth.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(NEGLIGIBLE_MODEL))
        rank = RankCostModel(
            ModelConfig.from_pretrained(Path(folder)), settings.tensor_parallel_size, None, PAGE_SIZE, torch.float32
        )
        max_model_len = PROMPT_TOKENS + settings.tokens
        num_pages = settings.batch * -(-max_model_len // PAGE_SIZE) + 1
        with LLM(
            folder,
            tensor_parallel_size=settings.tensor_parallel_size,
            distributed_executor_backend=settings.backend,
            load_format="dummy",
            device=settings.device,
            page_size=PAGE_SIZE,
            max_model_len=max_model_len,
            max_num_seqs=settings.batch,
            max_num_batched_tokens=max(2048, settings.batch),
            kv_cache_memory_bytes=num_pages * sum(rank.page_bytes),
        ) as llm:
            params = SamplingParams(temperature=0.0, max_tokens=settings.tokens, ignore_eos=True)
            prompts = [[3 + row % 250] * PROMPT_TOKENS for row in range(settings.batch)]
            outputs = llm.generate(prompts, params, use_tqdm=False)
            assert all(len(output.outputs[0].token_ids) == settings.tokens for output in outputs)
            stats = llm.stats()
    weights = max(rank["weight_bytes"] for rank in stats["ranks"])
    cache = stats["attention"]["bytes_read"] / stats["steps"] / settings.tensor_parallel_size
    bytes_ms = (weights + cache) / read_bandwidth(torch.device(settings.device)) * 1e3
    return {"steps": stats["steps"], **stats["time_ms"], "bytes_ms": bytes_ms, "settings": asdict(settings)}
