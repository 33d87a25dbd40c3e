"""times: the time of a decode step on given hardware: a limit by bytes alone, and an expected time."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch

from distributed_sparse.tools.planner.hardware import Hardware
from distributed_sparse.tools.planner.rank import TOKEN_BYTES, RankCostModel


@dataclass(frozen=True)
class StepTime:
    """Seconds of a decode step by cause; they add up because nothing overlaps."""

    weights_s: float
    attention_s: float
    select_s: float
    kernels_s: float
    all_reduce_s: float
    gather_s: float
    """Gather of logits and broadcast of the sampled tokens."""
    driver_s: float

    @property
    def total_s(self) -> float:
        return sum(astuple(self))


def limit_s(rank: RankCostModel, hardware: Hardware, context: int, batch: int, density: float | None = None) -> float:
    """Lower bound in seconds: the bytes that a rank reads at full bandwidth, and nothing else."""
    read = rank.weight_bytes_read(batch) + rank.attention([context] * batch, density).read
    return read / hardware.bandwidth


def launches_s(rank: RankCostModel, hardware: Hardware, context: int, enforce_eager: bool) -> float:
    """Seconds of a step's kernels beside their bytes, replayed from one CUDA graph or launched one by one."""
    if hardware.measured:  # its rates of attention and scoring include the small operations of a selection
        return rank.dense_launches * hardware.kernel_s
    kernels = rank.dense_launches + rank.sparse_launches(context)
    if rank.why_eager(enforce_eager) is None:
        return hardware.graph_launch_s + kernels * hardware.graph_gap_s
    return kernels * hardware.kernel_s


def expected(
    rank: RankCostModel,
    hardware: Hardware,
    context: int,
    batch: int,
    density: float | None = None,
    enforce_eager: bool = False,
) -> StepTime:
    """The expected time of a decode step of `batch` sequences of `context` tokens.

    Matrices take the longer of reading and computing them. Bytes are read at the share of the bandwidth that kernels reach, and
    every kernel has a fixed cost besides. A method's networks are read whole.

    Args:
        density: see `RankCostModel.attention`.
        enforce_eager: no CUDA graphs, as in the engine.
    """
    world_size, links = rank.shard.world_size, hardware.links
    attention = rank.attention([context] * batch, density)
    flops = hardware.flops_16 if rank.geometry.dtype.itemsize == torch.float16.itemsize else hardware.flops_32
    reading = rank.weight_bytes_read(batch) / (hardware.bandwidth * hardware.weights_share)
    computing = 2 * rank.matrix_elements * batch / (flops * hardware.flops_share)
    each = links.all_reduce_s(rank.all_reduce_bytes_each(batch), world_size)
    logits = links.all_gather_s(rank.gather_bytes(batch), world_size)
    tokens = links.broadcast_s(batch * TOKEN_BYTES, world_size)
    return StepTime(
        weights_s=max(reading, computing),
        attention_s=attention.dense_kv / (hardware.bandwidth * hardware.dense_share)
        + attention.sparse_kv / (hardware.bandwidth * hardware.sparse_share),
        select_s=(attention.scored + rank.constant_bytes) / (hardware.bandwidth * hardware.select_share),
        kernels_s=launches_s(rank, hardware, context, enforce_eager),
        all_reduce_s=rank.all_reduce_calls * each,
        gather_s=logits + tokens,
        driver_s=hardware.driver_s,
    )
