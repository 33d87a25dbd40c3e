"""memory: what this rank's device can do, and how many pages fit on it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from distributed_sparse.cache import Geometry
from distributed_sparse.config import EngineConfig

HEAD_DIMS, MAX_GROUP_SIZE = (64, 96, 128, 256), 16
"""What the Triton kernels are written for."""

DEFAULT_CPU_CACHE_BYTES = 4 << 30
"""What a CPU rank takes at most without `kv_cache_memory_bytes`. Pages are touched only as they are filled."""


def check_kernels(geometry: Geometry) -> None:
    """Refuse a model that the GPU's kernels are not written for.

    Raises:
        ValueError: its head_dim or its number of query heads per KV head; names what is supported.
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
    """Pages that this rank has room for.

    Set by hand with `kv_cache_memory_bytes`. Otherwise, on a GPU: what a profiling run leaves free under
    `gpu_memory_utilization`; on CPU: enough for max_num_seqs sequences of max_model_len, at most `DEFAULT_CPU_CACHE_BYTES`.

    Args:
        page_bytes: bytes of one page over all layers, metadata included.
        profile: runs the largest step that the configuration allows; returns the bytes that CUDA graphs will hold beside it.

    Raises:
        ValueError: they would not hold one sequence of max_model_len beside the null page.
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
