"""measure: this machine as `Hardware`: short runs of the engine's own operations, in as many processes as there are ranks."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from distributed_sparse.bench.layer import Inputs, LayerSettings, make_inputs
from distributed_sparse.bench.measure import read_bandwidth, time_in_turn
from distributed_sparse.kernels.rms_norm import add_rms_norm
from distributed_sparse.kernels.rotary import rotary
from distributed_sparse.planner.hardware import MEASURED, Hardware, Interconnect, Protocol
from distributed_sparse.planner.rank import RankOnPaper
from distributed_sparse.planner.times import KERNELS_PER_LAYER
from distributed_sparse.selection.base import Policy, attend_selection
from distributed_sparse.selection.dense import DenseConfig, DensePolicy
from distributed_sparse.selection.metadata import AppendRuns
from distributed_sparse.shard.collectives import Collectives

CPU = torch.device("cpu")

MAX_TOKENS = 16384
"""Of all sequences that attention is timed with: enough to leave every processor cache."""

CACHES = 3
"""Sets of matrices and of pages that are taken in turn, for the same reason."""

REPEATS = 7

BUFFER_BYTES = 1 << 28
"""What tells the read bandwidth: far larger than any processor cache, and one for each rank."""


def large_message(small: int) -> int:
    """Bytes of the all-reduce that tells the links' bandwidth, beside a step's own message."""
    return max(1 << 22, 2 * small)


@dataclass(frozen=True)
class Found:
    """What one rank's process reached while the others did the same; as in `Hardware`."""

    bandwidth: float
    weights_share: float
    flops: float
    dense_share: float
    methods: list[tuple[float, float]]
    """(sparse_share, select_share) of each."""
    kernel_s: float
    all_reduce_s: float
    """Of the step's own message."""
    large_all_reduce_s: float


def measure_cpu(
    ranks: list[RankOnPaper], context: int, batch: int, num_threads: int | None = None, timeout_s: float = 600.0
) -> list[Hardware]:
    """This machine's CPUs as the device of each of `ranks`, at what they reach with such a context and batch.

    The ranks' processes run together, each with its share of the cores, and the slowest one counts. Some ten seconds.

    Args:
        ranks: of one tensor_parallel_size, one per method.
        num_threads: torch threads of each rank; None: its share of the cores, as the engine has it.
        timeout_s: for all of it.

    Raises:
        RuntimeError: a process ended, or said nothing in time.
    """
    world_size = ranks[0].shard.world_size
    context = min(context, MAX_TOKENS)
    num_threads = num_threads or max(1, len(os.sched_getaffinity(0)) // world_size)
    batch = min(batch, MAX_TOKENS // context)
    spawn = multiprocessing.get_context("spawn")  # torch's threads do not outlive a fork
    papers = [(rank.model, world_size, rank.sparse, rank.geometry.page_size, rank.geometry.dtype) for rank in ranks]
    with tempfile.TemporaryDirectory() as folder:
        processes, ends = [], []
        try:
            for number in range(world_size):
                here, there = spawn.Pipe(duplex=False)
                arguments = (number, papers, context, batch, num_threads, str(Path(folder) / "store"), there)
                processes.append(spawn.Process(target=_run, args=arguments, daemon=True))
                processes[-1].start()
                there.close()
                ends.append(here)
            deadline = time.monotonic() + timeout_s
            found = [_receive(number, end, deadline - time.monotonic()) for number, end in enumerate(ends)]
            for process in processes:
                process.join(max(deadline - time.monotonic(), 0.0))
        finally:
            for process in processes:
                process.terminate()
                process.join()
    return _as_hardware(found, ranks, batch)


def _receive(number: int, end: Connection, timeout_s: float) -> Found:
    try:
        if end.poll(max(timeout_s, 0.0)):
            return end.recv()
    except EOFError:
        raise RuntimeError(f"the measuring process of rank {number} ended; its error stands above") from None
    raise RuntimeError(f"the measuring process of rank {number} did not answer in time")


def _as_hardware(found: list[Found], ranks: list[RankOnPaper], batch: int) -> list[Hardware]:
    """The slowest of the ranks, as they wait for each other."""
    world_size = len(found)

    def least(name: str) -> float:
        return min(getattr(each, name) for each in found)

    def slowest(shares: list[float]) -> float:
        """The slowest rate that a rank reached, as a share of the slowest bandwidth."""
        return min(each.bandwidth * share for each, share in zip(found, shares)) / bandwidth

    # Whoever comes last waits for nobody: the shortest time is the operation's own.
    links = _links(ranks[0].all_reduce_bytes_each(batch), least("all_reduce_s"), least("large_all_reduce_s"), world_size)
    bandwidth = least("bandwidth")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // world_size
    return [
        Hardware(
            name=MEASURED,
            memory_bytes=memory,
            bandwidth=bandwidth,
            flops_16=least("flops"),
            flops_32=least("flops"),
            links=links,
            weights_share=slowest([each.weights_share for each in found]),
            dense_share=slowest([each.dense_share for each in found]),
            sparse_share=slowest([each.methods[place][0] for each in found]),
            select_share=slowest([each.methods[place][1] for each in found]),
            flops_share=1.0,
            kernel_s=max(each.kernel_s for each in found),
            measured=True,
        )
        for place in range(len(ranks))
    ]


def _links(small: int, small_s: float, large_s: float, world_size: int) -> Interconnect:
    """Latency and bandwidth of a ring in which messages of two sizes took so long."""
    if world_size == 1:
        return Interconnect(1.0, (Protocol(0.0, 0.0, 1.0),))
    factor = 2 * (world_size - 1) / world_size
    bandwidth = factor * (large_message(small) - small) / max(large_s - small_s, 1e-6)
    return Interconnect(bandwidth, (Protocol(max(small_s - factor * small / bandwidth, 0.0), 0.0, 1.0),))


# ---- in a rank's process


def _run(
    number: int, papers: list[tuple[Any, ...]], context: int, batch: int, num_threads: int, store: str, answer: Connection
) -> None:
    ranks = [RankOnPaper(*paper) for paper in papers]
    world_size = ranks[0].shard.world_size
    torch.set_num_threads(num_threads)
    collectives = Collectives(number, world_size, CPU, dist.FileStore(store, world_size) if world_size > 1 else None)
    collectives.meet()
    with torch.inference_mode():
        answer.send(_measure(ranks, context, batch, collectives))
    collectives.barrier()  # nobody leaves while another still reduces
    collectives.close()


def _measure(ranks: list[RankOnPaper], context: int, batch: int, collectives: Collectives) -> Found:
    rank = ranks[0]
    kinds = tuple(dict.fromkeys(kind for each in ranks for policy in each.policies for kind in policy.metadata))
    settings = LayerSettings(
        context=context,
        batch=batch,
        num_heads=rank.sizes.num_attention_heads,
        num_kv_heads=rank.geometry.num_kv_heads,
        head_dim=rank.geometry.head_dim,
        page_size=rank.geometry.page_size,
    )
    collectives.barrier()
    bandwidth = read_bandwidth(CPU, BUFFER_BYTES)
    collectives.barrier()
    weights_share, flops = _matrices(rank, batch, bandwidth)
    inputs = [make_inputs(settings, rank.geometry, kinds, seed) for seed in range(CACHES)]
    collectives.barrier()
    dense = _shares(DensePolicy(DenseConfig(), rank.geometry), inputs, rank, bandwidth)[0]
    methods = []
    for each in ranks:
        collectives.barrier()
        policy = each.policies[-1]
        methods.append((dense, dense) if isinstance(policy, DensePolicy) else _shares(policy, inputs, rank, bandwidth))
    collectives.barrier()
    kernel_s = _small_operations(rank, inputs[0])
    small = rank.all_reduce_bytes_each(batch)
    all_reduce_s, large_s = (_all_reduce(size, rank, collectives) for size in (small, large_message(small)))
    return Found(bandwidth, weights_share, flops, dense, methods, kernel_s, all_reduce_s, large_s)


def _layer_matrices(rank: RankOnPaper) -> list[tuple[int, int]]:
    """(out, in) of a layer's matrices on a rank."""
    hidden, inner, sizes = rank.model.hidden_size, rank.sizes.intermediate_size, rank.sizes
    return [(sizes.q_size + 2 * sizes.kv_size, hidden), (hidden, sizes.q_size), (2 * inner, hidden), (hidden, inner)]


def _matrices(rank: RankOnPaper, batch: int, bandwidth: float) -> tuple[float, float]:
    """Share of the bandwidth that a layer's matrices reach with one row, and operations per second with a row per sequence."""
    dtype, shapes = rank.geometry.dtype, _layer_matrices(rank)
    layers = [[torch.full(shape, 0.01, dtype=dtype) for shape in shapes] for _ in range(CACHES)]
    inputs = {rows: [torch.ones(rows, width, dtype=dtype) for _, width in shapes] for rows in (1, batch)}

    def run(number: int, rows: int) -> None:
        for x, matrix in zip(inputs[rows], layers[number % CACHES]):
            F.linear(x, matrix)

    functions: dict[str, Callable[[int], object]] = {str(rows): partial(run, rows=rows) for rows in inputs}
    times = time_in_turn(functions, REPEATS, CPU)
    elements = sum(height * width for height, width in shapes)
    share = elements * dtype.itemsize / times["1"].median / bandwidth
    return share, 2 * elements * batch / times[str(batch)].median


def _shares(policy: Policy, inputs: list[Inputs], rank: RankOnPaper, bandwidth: float) -> tuple[float, float]:
    """Shares of the bandwidth that a layer's attention and its selection reach."""
    scale, page_size = rank.geometry.scale, rank.geometry.page_size
    selections = [policy.select(one.q, one.cache, one.batch) for one in inputs]

    def select(number: int) -> None:
        one = inputs[number % CACHES]
        policy.select(one.q, one.cache, one.batch)

    def attend(number: int) -> Tensor:
        one = inputs[number % CACHES]
        return attend_selection(one.q, one.cache, one.batch, selections[number % CACHES], scale)

    times = time_in_turn({"select": select, "attend": attend}, REPEATS, CPU)
    tokens = 0.0
    for one, selection in zip(inputs, selections):
        tokens += selection.attended(one.batch.last_page_len, page_size).sum().item() / CACHES
        tokens += selection.read_apart.sum().item() / CACHES if selection.read_apart is not None else 0.0
    kv_bytes = tokens * 2 * rank.geometry.head_dim * rank.geometry.dtype.itemsize
    select_s, attend_s = times["select"].median, times["attend"].median
    scored = 0 if selections[0].is_dense else policy.bytes_scored(inputs[0].batch.context_lens.tolist())
    if scored == 0 or selections[0].partial is not None:  # choosing reads no bytes of its own, or K and V, too
        share = (kv_bytes + scored) / (select_s + attend_s) / bandwidth
        return share, share
    return kv_bytes / attend_s / bandwidth, scored / select_s / bandwidth


def _small_operations(rank: RankOnPaper, one: Inputs) -> float:
    """Seconds of one of a layer's kernels, on average over those that are neither a matrix nor attention."""
    model, geometry, sizes = rank.model, rank.geometry, rank.sizes
    batch, dtype = len(one.q), geometry.dtype
    x = torch.ones(batch, model.hidden_size, dtype=dtype)
    gate, norm = torch.ones(batch, sizes.intermediate_size, dtype=dtype), torch.ones(model.hidden_size, dtype=dtype)
    k, v = one.k[:, :, -1].contiguous(), one.v[:, :, -1]
    angle = torch.zeros(batch, model.head_dim // 2)
    newest = one.batch.context_lens.long() - 1
    rows = torch.arange(batch, dtype=torch.int32)
    page = one.batch.page_table.gather(1, (newest // geometry.page_size)[:, None])[:, 0]
    runs = AppendRuns(page, rows, (newest % geometry.page_size).int(), torch.ones_like(rows))

    def layer(number: int) -> None:
        rotary(one.q, k, angle, angle)
        one.cache.append(k, v, runs)
        for _ in range(2):
            add_rms_norm(x, x, norm, model.rms_norm_eps)
        F.silu(gate) * gate

    return time_in_turn({"layer": layer}, 3 * REPEATS, CPU)["layer"].median / KERNELS_PER_LAYER


def _all_reduce(num_bytes: int, rank: RankOnPaper, collectives: Collectives) -> float:
    """Median seconds of an all-reduce after some work, as it comes in a layer; 0 with one rank."""
    message = torch.zeros(num_bytes // rank.geometry.dtype.itemsize, dtype=rank.geometry.dtype)
    matrix, x = torch.ones(1024, 1024), torch.ones(1, 1024)
    seconds = []
    for _ in range(3 * REPEATS):
        F.linear(x, matrix)
        started = time.perf_counter()
        collectives.all_reduce(message)
        seconds.append(time.perf_counter() - started)
    return median(seconds) if collectives.world_size > 1 else 0.0
