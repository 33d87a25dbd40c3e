"""What fits on a rank, and which models its kernels are for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distributed_sparse.cache import Geometry
from distributed_sparse.config import EngineConfig
from distributed_sparse.shard.attention import SparseAttention
from distributed_sparse.shard.batch import StepBatch
from distributed_sparse.shard.collectives.collectives import Collectives
from distributed_sparse.shard.memory import check_kernels, max_pages
from distributed_sparse.shard.shard import Shard
from distributed_sparse.shard.tracer import Tracer
from tests.support.checkpoints import tiny_checkpoint

CUDA = Geometry(8, 4, 128, 16, torch.bfloat16, torch.device("cuda"), 0)


def test_a_model_without_gpu_kernels_is_refused_by_name_on_a_gpu_and_runs_on_cpu() -> None:
    check_kernels(CUDA)
    with pytest.raises(ValueError, match=r"head_dim=80 has no GPU kernel; supported are 64, 96, 128, 256; use device='cpu'"):
        check_kernels(replace(CUDA, head_dim=80))
    with pytest.raises(ValueError, match="32 query heads per KV head have no GPU kernel; at most 16 do"):
        check_kernels(replace(CUDA, group_size=32))
    check_kernels(replace(CUDA, head_dim=80, group_size=32, device=torch.device("cpu")))


def test_the_memory_profile_runs_every_slot_over_the_longest_context_and_a_full_budget_of_prompt_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int, int]] = []
    begin = SparseAttention.begin

    def spy(self: SparseAttention, batch: StepBatch, tracer: Tracer | None = None) -> None:
        prefill = 0 if batch.prefill is None else int(batch.prefill.query_start[-1])
        seen.append((batch.num_decode, 0 if batch.decode is None else batch.decode.max_context_len, prefill))
        begin(self, batch, tracer)

    config = EngineConfig(
        model=str(tiny_checkpoint(tmp_path)),
        device="cpu",
        max_model_len=96,
        max_num_seqs=6,
        max_num_batched_tokens=250,
        kv_cache_memory_bytes=1 << 24,
        sparse={"method": "quest", "token_budget": 32, "recent_pages": 1, "dense_layers": 0},
    )
    shard = Shard(config, 0, 1, Collectives())
    shard.load()
    monkeypatch.setattr(SparseAttention, "begin", spy)
    with torch.inference_mode():
        shard._profile_memory()
    assert seen == [(6, 96, 250)]


def test_a_gpus_cache_takes_what_the_profile_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """90 of 100 GB: less the largest step's peak, what CUDA graphs will hold, and what others hold on the device."""
    gb = 1 << 30
    told = {
        "max_memory_allocated": 30 * gb,
        "mem_get_info": (63 * gb, 100 * gb),
        "memory_reserved": 33 * gb,  # so others hold 4
        **dict.fromkeys(("empty_cache", "reset_peak_memory_stats", "synchronize")),
    }
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    config = EngineConfig(model="none", max_num_seqs=1000, gpu_memory_utilization=0.9)

    def pages(graph_bytes: int) -> int:
        return max_pages(config, torch.device("cuda"), gb // 16, 1600, lambda: graph_bytes)

    assert pages(0) == 16 * (90 - 30 - 4)
    assert pages(6 * gb) == 16 * (90 - 30 - 6 - 4)
    with pytest.raises(ValueError, match="the cache holds 48 tokens, less than one sequence of max_model_len=1600"):
        pages(56 * gb - gb // 4)


def test_a_closed_shard_holds_neither_weights_nor_cache(tmp_path: Path) -> None:
    config = EngineConfig(model=str(tiny_checkpoint(tmp_path)), device="cpu", max_model_len=64, max_num_seqs=2)
    shard = Shard(config, 0, 1, Collectives())
    shard.allocate(shard.load().max_pages)
    shard.close()
    shard.close()
    assert not any(hasattr(shard, name) for name in ("model", "cache", "attention", "slots"))
