"""padded_shard: decode steps at the shapes that a GPU would capture, run without capture: what CUDA graphs compute."""

from __future__ import annotations

from distributed_sparse.config import EngineConfig
from distributed_sparse.shard.collectives.collectives import Collectives
from distributed_sparse.shard.shard import Shard


def padded_shard(config: EngineConfig, rank: int, world_size: int, collectives: Collectives) -> Shard:
    """As `Shard`; every rank must be one."""
    return Shard(config, rank, world_size, collectives, fixed_shapes=True)
