"""machine_rates: this machine as `Hardware`, from short runs of the engine's own operations in one process per rank."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from distributed_sparse.kernels.huge_pages import zeros
from distributed_sparse.kernels.layer.linear import linear
from distributed_sparse.kernels.layer.rms_norm import add_rms_norm
from distributed_sparse.selection.base import Policy, attend_selection
from distributed_sparse.selection.dense import DenseConfig, DensePolicy
from distributed_sparse.shard.collectives.collectives import Collectives
from distributed_sparse.tools.bench.layer import Inputs, LayerSettings, make_inputs, mean_tokens, newest_runs
from distributed_sparse.tools.bench.timing import Times, time_in_turn
from distributed_sparse.tools.planner.hardware import MEASURED, Hardware, Interconnect, Protocol, Rate
from distributed_sparse.tools.planner.launches import dense_launches
from distributed_sparse.tools.planner.rank import RankCostModel

CPU = torch.device("cpu")

MAX_TOKENS = 16384
"""Tokens of all sequences in the timed attention: more than any processor cache holds."""

CACHES = 3
"""Sets of matrices and pages to use in turn, so that no processor cache holds them."""

REPEATS = 7

BUFFER_BYTES = 1 << 28
"""Buffer of each rank that gives the read bandwidth: far larger than any processor cache."""


NO_LINKS = Interconnect(1.0, (Protocol(0.0, 0.0, 1.0),))
"""Links of a single rank, which sends nothing."""


def large_message(small: int) -> int:
    """Bytes of the all-reduce that gives the links' bandwidth, beside a step's own message."""
    return max(1 << 22, 2 * small)


@dataclass(frozen=True)
class Found:
    """Rates of one rank's process while the others ran the same."""

    reading: Rate
    matrices: Rate
    """Bytes per second with one token."""
    operations: Rate
    """Operations per second with a token per sequence."""
    dense: Rate
    methods: list[tuple[Rate, Rate]]
    """Attention and scoring of each method; the same rate twice where they cannot be separated."""
    kernel: Rate
    all_reduces: tuple[Rate, Rate] | None
    """All-reduce of the step's own message and of a large one; None with one rank."""


def measure_cpu(
    ranks: list[RankCostModel], context: int, batch: int, num_threads: int | None = None, timeout_s: float = 600.0
) -> list[Hardware]:
    """This machine's CPUs as the device of each of `ranks`, at the rates that they reach with this context and batch.

    The ranks' processes run together, each with its share of the cores, and the slowest one counts. Takes some ten seconds.
    Other contexts or batches have other rates, for example contexts that fit into a processor cache.

    Args:
        ranks: of one tensor_parallel_size, one per method.
        context: tokens of each timed sequence, at most `MAX_TOKENS`; for a grid, its largest context.
        batch: timed sequences, at most as many as fit into `MAX_TOKENS`; for a grid, its largest batch.
        num_threads: torch threads of each rank; None: its share of the cores, as in the engine.
        timeout_s: for the whole measurement.

    Raises:
        RuntimeError: a process ended or timed out.
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
        raise RuntimeError(f"the measuring process of rank {number} ended; see its error above") from None
    raise RuntimeError(f"the measuring process of rank {number} did not answer in time")


def _as_hardware(found: list[Found], ranks: list[RankCostModel], batch: int) -> list[Hardware]:
    """The rates of the slowest rank, as ranks wait for each other."""
    world_size = len(found)
    reading, matrices, operations, dense = (
        _least(getattr(each, name) for each in found) for name in ("reading", "matrices", "operations", "dense")
    )
    kernel = max((each.kernel for each in found), key=_median)
    links, common = NO_LINKS, [reading, matrices, operations, dense, kernel]
    of_ranks = [each.all_reduces for each in found if each.all_reduces is not None]
    if of_ranks:
        # The last rank to arrive does not wait, so the shortest time is that of the operation itself.
        small, large = (_least(each[place] for each in of_ranks) for place in range(2))
        links = _links(ranks[0].all_reduce_bytes_each(batch), small.median, large.median, world_size)
        common += [small, large]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // world_size
    device = Hardware(
        name=MEASURED,
        memory_bytes=memory,
        bandwidth=reading.median,
        flops_16=operations.median,
        flops_32=operations.median,
        links=links,
        weights_share=matrices.median / reading.median,
        dense_share=dense.median / reading.median,
        flops_share=1.0,
        kernel_s=kernel.median,
        measured=True,
    )
    devices = []
    for place in range(len(ranks)):
        attention, scoring = (_least(each.methods[place][part] for each in found) for part in range(2))
        rates = tuple(dict.fromkeys([*common, attention, scoring]))
        sparse, select = attention.median / reading.median, scoring.median / reading.median
        devices.append(replace(device, sparse_share=sparse, select_share=select, rates=rates))
    return devices


def _median(rate: Rate) -> float:
    return rate.median


def _least(rates: Iterable[Rate]) -> Rate:
    return min(rates, key=_median)


def _links(small: int, small_s: float, large_s: float, world_size: int) -> Interconnect:
    """Latency and bandwidth of a ring, from the times of messages of two sizes."""
    factor = 2 * (world_size - 1) / world_size
    bandwidth = factor * (large_message(small) - small) / max(large_s - small_s, 1e-6)
    return Interconnect(bandwidth, (Protocol(max(small_s - factor * small / bandwidth, 0.0), 0.0, 1.0),))


# ---- in a rank's process


def _run(
    number: int, papers: list[tuple[Any, ...]], context: int, batch: int, num_threads: int, store: str, answer: Connection
) -> None:
    ranks = [RankCostModel(*paper) for paper in papers]
    world_size = ranks[0].shard.world_size
    torch.set_num_threads(num_threads)
    collectives = Collectives(number, world_size, CPU, dist.FileStore(store, world_size) if world_size > 1 else None)
    collectives.rendezvous()
    with torch.inference_mode():
        answer.send(_measure(ranks, context, batch, collectives))
    collectives.barrier()  # no rank leaves while another still reduces
    collectives.close()


def _measure(ranks: list[RankCostModel], context: int, batch: int, collectives: Collectives) -> Found:
    rank = ranks[0]
    kinds = tuple(dict.fromkeys(kind for each in ranks for policy in each.policies for kind in policy.metadata))
    settings = LayerSettings.of(rank.geometry, context, batch)
    collectives.barrier()
    reading = _reading()
    collectives.barrier()
    matrices, operations = _matrices(rank, batch)
    inputs = [make_inputs(settings, rank.geometry, kinds, seed, scattered=False) for seed in range(CACHES)]
    collectives.barrier()
    dense = _attention(DensePolicy(DenseConfig(), rank.geometry), inputs, rank, "dense")[0]
    methods = []
    for each in ranks:
        collectives.barrier()
        policy = each.policies[-1]
        is_dense = isinstance(policy, DensePolicy)
        methods.append((dense, dense) if is_dense else _attention(policy, inputs, each, each.method))
    collectives.barrier()
    kernel = _small_operations(rank, inputs[0])
    all_reduces = None
    if collectives.world_size > 1:
        small = rank.all_reduce_bytes_each(batch)
        all_reduces = _all_reduce(small, rank, collectives), _all_reduce(large_message(small), rank, collectives)
    return Found(reading, matrices, operations, dense, methods, kernel, all_reduces)


def _per_second(name: str, amount: float, times: Times, unit: str = "bytes/s") -> Rate:
    """The rate of doing `amount` in each of these times."""
    low, high = times.spread
    return Rate(name, unit, amount / times.median, amount / high, amount / low)


def _seconds(name: str, times: Times, parts: int = 1) -> Rate:
    """The time of one of `parts` equal parts."""
    low, high = times.spread
    return Rate(name, "s", times.median / parts, low / parts, high / parts)


def _reading() -> Rate:
    """Read bandwidth of memory that no processor cache holds."""
    buffer = zeros((BUFFER_BYTES // torch.float32.itemsize,), torch.float32, CPU).fill_(1)
    return _per_second("reading", BUFFER_BYTES, time_in_turn({"read": lambda _: buffer.sum()}, REPEATS, CPU)["read"])


def _layer_matrices(rank: RankCostModel) -> list[tuple[int, int]]:
    """(out, in) of a layer's matrices on a rank."""
    hidden, inner, sizes = rank.model.hidden_size, rank.sizes.intermediate_size, rank.sizes
    return [(sizes.q_size + 2 * sizes.kv_size, hidden), (hidden, sizes.q_size), (2 * inner, hidden), (hidden, inner)]


def _matrices(rank: RankCostModel, batch: int) -> tuple[Rate, Rate]:
    """Bytes per second of a layer's matrices with one token, and operations per second with a token per sequence."""
    dtype, shapes = rank.geometry.dtype, _layer_matrices(rank)
    layers = [[zeros(shape, dtype, CPU).fill_(0.01) for shape in shapes] for _ in range(CACHES)]
    inputs = {rows: [torch.ones(rows, width, dtype=dtype) for _, width in shapes] for rows in (1, batch)}

    def run(number: int, rows: int) -> None:
        for x, matrix in zip(inputs[rows], layers[number % CACHES]):
            linear(x, matrix)

    functions: dict[str, Callable[[int], object]] = {str(rows): partial(run, rows=rows) for rows in inputs}
    times = time_in_turn(functions, REPEATS, CPU)
    elements = sum(height * width for height, width in shapes)
    reading = _per_second("matrices, reading", elements * dtype.itemsize, times["1"])
    return reading, _per_second("matrices, computing", 2 * elements * batch, times[str(batch)], "op/s")


def _attention(policy: Policy, inputs: list[Inputs], rank: RankCostModel, method: str) -> tuple[Rate, Rate]:
    """Bytes per second of a layer's attention and of its selection."""
    selections = [policy.select(one.q, one.cache, one.batch) for one in inputs]

    def select(number: int) -> None:
        one = inputs[number % CACHES]
        policy.select(one.q, one.cache, one.batch)

    def attend(number: int) -> Tensor:
        one = inputs[number % CACHES]
        return attend_selection(one.q, one.cache, one.batch, selections[number % CACHES], rank.geometry.scale)

    times = time_in_turn({"select": select, "attend": attend}, REPEATS, CPU)
    kv_bytes = sum(mean_tokens(inputs, selections)) * 2 * rank.geometry.head_dim * rank.geometry.dtype.itemsize
    scored = 0 if selections[0].is_dense else policy.bytes_scored(inputs[0].batch.context_lens.tolist())
    if scored == 0 or selections[0].partial is not None:  # selection reads no metadata, or also K and V
        together = Times([sum(of_round) for of_round in zip(times["select"].samples, times["attend"].samples)])
        rate = _per_second(f"{method}: attention", kv_bytes + scored, together)
        return rate, rate
    attention = _per_second(f"{method}: attention", kv_bytes, times["attend"])
    return attention, _per_second(f"{method}: scoring", scored, times["select"])


def _small_operations(rank: RankCostModel, one: Inputs) -> Rate:
    """Mean seconds of a layer's kernels that are neither a matrix nor attention."""
    model, geometry, sizes = rank.model, rank.geometry, rank.sizes
    batch, dtype = len(one.q), geometry.dtype
    x = torch.ones(batch, model.hidden_size, dtype=dtype)
    gate, norm = torch.ones(batch, sizes.intermediate_size, dtype=dtype), torch.ones(model.hidden_size, dtype=dtype)
    k, v = one.k[:, :, -1].contiguous(), one.v[:, :, -1]
    angle = torch.zeros(batch, model.head_dim // 2)
    runs = newest_runs(one)

    def layer(number: int) -> None:
        one.cache.rotary_append(one.q, k, v, angle, angle, runs)
        for _ in range(2):
            add_rms_norm(x, x, norm, model.rms_norm_eps)
        F.silu(gate) * gate

    times = time_in_turn({"layer": layer}, 3 * REPEATS, CPU)["layer"]
    return _seconds("a kernel beside its bytes", times, dense_launches(1, model.qk_norm) - dense_launches(0, model.qk_norm))


def _all_reduce(num_bytes: int, rank: RankCostModel, collectives: Collectives) -> Rate:
    """Seconds of an all-reduce after some work, as in a layer."""
    message = torch.zeros(num_bytes // rank.geometry.dtype.itemsize, dtype=rank.geometry.dtype)
    matrix, x = torch.ones(1024, 1024), torch.ones(1, 1024)
    seconds = []
    for _ in range(3 * REPEATS):
        linear(x, matrix)
        started = time.perf_counter()
        collectives.all_reduce(message)
        seconds.append(time.perf_counter() - started)
    return _seconds(f"all-reduce of {num_bytes} bytes", Times(seconds))
