"""memory: the memory of a rank: weights, the cache of a batch, and the largest batch that fits."""

from __future__ import annotations

from dataclasses import dataclass

from distributed_sparse.tools.planner.hardware import Hardware
from distributed_sparse.tools.planner.rank import RankCostModel

DEFAULT_RESERVE_BYTES = 2 << 30
"""Memory that an engine measures in its profiling run: CUDA context, activations of the largest step, sampler."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weight_bytes: int
    cache_bytes: int
    """K and V of the batch's pages, the null page included."""
    metadata_bytes: int
    constant_bytes: int
    available_bytes: int
    """For all of these: `gpu_memory_utilization` of the device minus the reserve."""
    max_batch: int
    """Sequences of this context that fit at once."""

    @property
    def fits(self) -> bool:
        used = self.weight_bytes + self.cache_bytes + self.metadata_bytes + self.constant_bytes
        return used <= self.available_bytes


def memory(
    rank: RankCostModel,
    hardware: Hardware,
    context: int,
    batch: int,
    utilization: float,
    reserve_bytes: int = DEFAULT_RESERVE_BYTES,
) -> Memory:
    """Memory of `batch` sequences of `context` tokens, prompt and output together."""
    of_cache, of_metadata = rank.page_bytes
    each = rank.pages(context)
    pages = batch * each + 1
    available = int(hardware.memory_bytes * utilization) - reserve_bytes
    room = (available - rank.weight_bytes - rank.constant_bytes) // (of_cache + of_metadata) - 1
    return Memory(
        weight_bytes=rank.weight_bytes,
        cache_bytes=pages * of_cache,
        metadata_bytes=pages * of_metadata,
        constant_bytes=rank.constant_bytes,
        available_bytes=available,
        max_batch=max(room, 0) // each,
    )
