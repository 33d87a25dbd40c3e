"""memory: how many pages fit on this rank, the step plans that profile and warm it up, and which models have GPU kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch

from distributed_sparse.cache import Geometry
from distributed_sparse.config import EngineConfig
from distributed_sparse.protocol.step import DecodeRow, PrefillChunk, SlotSetup, StepPlan

HEAD_DIMS, MAX_GROUP_SIZE = (64, 96, 128, 256), 16
"""Supported by the Triton kernels."""

DEFAULT_CPU_CACHE_BYTES = 4 << 30
"""Limit of a CPU rank's cache without `kv_cache_memory_bytes`. The OS commits pages only as they are filled."""


def check_kernels(geometry: Geometry) -> None:
    """Check that the GPU kernels support the model.

    Raises:
        ValueError: unsupported head_dim or number of query heads per KV head; names the supported ones.
    """
    if geometry.device.type != "cuda":
        return
    if geometry.head_dim not in HEAD_DIMS:
        raise ValueError(
            f"head_dim={geometry.head_dim} has no GPU kernel; supported are {', '.join(map(str, HEAD_DIMS))}; use device='cpu'"
        )
    if geometry.group_size > MAX_GROUP_SIZE:
        raise ValueError(
            f"{geometry.group_size} query heads per KV head have no GPU kernel; at most {MAX_GROUP_SIZE} do; use device='cpu'"
        )


def max_pages(
    config: EngineConfig, device: torch.device, page_bytes: int, max_model_len: int, profile: Callable[[], int]
) -> int:
    """Pages that fit on this rank, the null page included.

    `kv_cache_memory_bytes` decides if set. Otherwise, on a GPU: the memory that a profiling run leaves free under
    `gpu_memory_utilization`; on CPU: enough for max_num_seqs sequences of max_model_len, at most `DEFAULT_CPU_CACHE_BYTES`.

    Args:
        page_bytes: bytes of one page over all layers, metadata included.
        profile: runs the largest step that the configuration allows; returns the bytes that CUDA graphs will hold in addition.

    Raises:
        ValueError: the pages cannot hold one sequence of max_model_len and the null page.
    """
    per_sequence = -(-max_model_len // config.page_size)
    if config.kv_cache_memory_bytes is not None:
        pages = config.kv_cache_memory_bytes // page_bytes
    else:
        on_cpu = device.type == "cpu"
        budget = DEFAULT_CPU_CACHE_BYTES if on_cpu else _free_gpu_bytes(config.gpu_memory_utilization, device, profile)
        pages = min(config.max_num_seqs * per_sequence + 1, budget // page_bytes)
    if pages < per_sequence + 1:
        raise ValueError(
            f"the cache holds {max(pages - 1, 0) * config.page_size} tokens, less than one sequence of "
            f"max_model_len={max_model_len}; lower max_model_len or raise kv_cache_memory_bytes to at least "
            f"{(per_sequence + 1) * page_bytes} per rank"
        )
    return pages


def _free_gpu_bytes(utilization: float, device: torch.device, profile: Callable[[], int]) -> int:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    graph_bytes = profile()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)  # other processes, the CUDA context
    return max(0, int(total * utilization) - peak - graph_bytes - others)


def warm_up_plan(num_decode: int, context_len: int, chunk_lens: list[int], num_targets: int = 0) -> StepPlan:
    """A step plan on the null page: decode rows in slots 0, 1, ..., prompt chunks in slot 0; no slot has a page of its own.

    Runs before READY, to compile every kernel and to measure the largest step's memory.

    Args:
        num_decode: decode rows; each is sampled with every mask.
        context_len: tokens in the context of each decode row.
        chunk_lens: tokens of each prompt chunk.
        num_targets: prompt tokens of the first chunk whose log-probabilities over the whole vocabulary are computed.
    """
    setups = [
        SlotSetup(
            slot=slot,
            prompt_length=1,
            prefill_length=1,
            seed=0,
            sample_index=0,
            temperature=1.0,
            top_p=0.9,
            top_k=8,
            min_p=0.1,
            logprobs=None,
            suppressed=[],
            suppress_until=0,
        )
        for slot in range(max(num_decode, 1))
    ]
    chunks = [PrefillChunk(slot=0, start=0, tokens=[0] * length, samples=[]) for length in chunk_lens]
    if num_targets:
        chunks[0].targets, chunks[0].prompt_logprobs = [0] * num_targets, -1
    return StepPlan(
        step=0,
        generation=0,
        setups=setups,
        decode=[DecodeRow(slot=slot, position=context_len - 1, token=0, samples=[slot]) for slot in range(num_decode)],
        prefill=chunks,
    )
