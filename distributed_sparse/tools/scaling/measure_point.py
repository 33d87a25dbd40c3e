"""measure_point: measure one point in its own engine, after a warm-up."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from distributed_sparse.config import EngineConfig
from distributed_sparse.model.config import ModelConfig
from distributed_sparse.model.limits import resolve_dtype
from distributed_sparse.selection import layer_configs
from distributed_sparse.selection.dense import DenseConfig
from distributed_sparse.tools.common.latency import latencies
from distributed_sparse.tools.common.load import send
from distributed_sparse.tools.common.results import Record
from distributed_sparse.tools.evaluation.meter import Counters, Meter
from distributed_sparse.tools.scaling.expectations import contexts_of, expectations
from distributed_sparse.tools.scaling.grid import Point
from distributed_sparse.tools.scaling.leaks import Surroundings
from distributed_sparse.tools.scaling.reference import disagreements, make_reference

if TYPE_CHECKING:
    from distributed_sparse import LLM

OpenEngine = Callable[[EngineConfig], AbstractContextManager["LLM"]]

RANK_KEYS = ("rank", "device", "kv_heads", "weight_bytes", "page_bytes", "cache_bytes", "metadata_bytes")


def measure(
    point: Point,
    open_engine: OpenEngine,
    surroundings: Surroundings,
    compared: int,
    makes_reference: bool,
    reference: Record | None,
) -> Record:
    """Run a point. The caller then asks `surroundings` for leaks, whether this returns or raises.

    Args:
        surroundings: is given the engine's processes.
        compared: number of requests whose tokens are kept and compared with other points'.
        makes_reference: whether other points are compared with this one.
        reference: the record of the point that this one is compared with, or None.

    Returns:
        The record for `checks`, the summary and the plots; see docs/scaling.md.

    Raises:
        ValueError: a setting is invalid for the model or the cluster.
        RuntimeError: the engine failed, was rebuilt during the measurement, or is on another number of nodes.
    """
    with open_engine(point.engine) as llm:
        ranks = llm.stats()["ranks"]
        surroundings.watch(ranks)
        _check_nodes(point, ranks)
        workload, vocab_size = point.workload, llm.model_config.vocab_size
        requests = workload.requests(0, workload.num_prompts or 0, vocab_size)
        warm_up = workload.requests(len(requests), workload.warm_up or 0, vocab_size)
        meter = Meter(llm)
        meter.measure(contexts_of(send(llm, warm_up, workload.batch)))
        before = llm.stats()
        times = send(llm, requests, workload.batch)
        after = llm.stats()
        _check_generation(before["generation"], after)
        counters = meter.measure(contexts_of(times))
        parts = _parts(llm, point, len(requests) + len(warm_up), vocab_size, after["generation"])
        dtype = str(resolve_dtype(point.engine.dtype, llm.model_config.dtype)).removeprefix("torch.")
        record = {
            "dtype": dtype,
            **latencies(times),
            "time_ms": after["time_ms"] | parts,
            "ranks": [{key: rank[key] for key in RANK_KEYS} for rank in ranks],
            "nodes": len({rank["node_id"] for rank in ranks}),
            "pages": after["pages"]["total"],
            "steps": after["steps"] - before["steps"],
            "all_reduce": {key: after["all_reduce"][key] - before["all_reduce"][key] for key in ("calls", "bytes")},
            **_attention(point, llm.model_config, counters, ranks),
            "cache_bytes_read_per_step": _bytes_read(point, before, after, counters),
            "expected": expectations(point, llm.model_config, times),
            "token_ids": [one.token_ids for one in times[:compared]],
            "tokens_sha256": hashlib.sha256(json.dumps([one.token_ids for one in times]).encode()).hexdigest(),
        }
        low_precision = dtype != "float32"
        if makes_reference:
            record["reference"] = make_reference(llm, requests[:compared], workload.batch, greedy=low_precision)
        elif reference is not None and low_precision:
            record["disagreements"] = disagreements(llm, requests[:compared], reference["reference"]["token_ids"])
            record["compared_with"] = reference["key"]
        record["pages_used_at_end"] = llm.stats()["pages"]["used"]
    return record


def _check_generation(generation: int, stats: dict[str, Any]) -> None:
    if stats["generation"] != generation:
        raise RuntimeError("the engine lost a shard and was rebuilt while it was measured; run the point again")


def _parts(llm: LLM, point: Point, first: int, vocab_size: int, generation: int) -> dict[str, float]:
    """Times of the parts of a step in ms, of a batch of its own, whose steps wait for the device and run without CUDA graphs.

    Empty if no step has decode rows alone.
    """
    load = point.workload
    batch = load.profiled_batch(first, vocab_size, point.engine.max_num_batched_tokens)
    send(llm, batch, load.batch)
    stats = llm.stats()
    _check_generation(generation, stats)
    return {name: ms for name, ms in stats["time_ms"].items() if not name.endswith("_p50")}


def _bytes_read(point: Point, before: dict[str, Any], after: dict[str, Any], counters: Counters) -> list[float] | None:
    """Cache bytes that each rank reads in a step that decodes a whole batch."""
    if counters.steps == 0:
        return None
    of_ranks = zip(before["attention"]["bytes_read_of_ranks"], after["attention"]["bytes_read_of_ranks"], strict=True)
    return [(now - then) / counters.steps * point.workload.batch for then, now in of_ranks]


def _attention(point: Point, model: ModelConfig, counters: Counters, ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Density of the measured decode steps; None without any."""
    if counters.context == 0:
        return {"density": {"layers": None, "ranks": None, "skew": None}}
    density = counters.attended / counters.context  # [layer, KV head]
    layers = layer_configs(point.engine.resolve_sparse(), model.num_hidden_layers, point.engine.page_size)
    selecting = [i for i, layer in enumerate(layers) if not isinstance(layer, DenseConfig)] or list(range(len(layers)))
    of_ranks = [float(density[selecting, slice(*rank["kv_heads"])].mean()) for rank in ranks]
    skew = max(of_ranks) / (sum(of_ranks) / len(of_ranks))
    return {"density": {"layers": density, "ranks": of_ranks, "skew": skew}}


def _check_nodes(point: Point, ranks: Sequence[dict[str, Any]]) -> None:
    nodes = {rank["node_id"] for rank in ranks}
    if point.nodes is not None and len(nodes) != point.nodes:
        raise RuntimeError(
            f"the ranks are on {len(nodes)} nodes, not nodes={point.nodes}: a group that fits stays within a node; "
            "choose tensor_parallel_size by the GPUs of a node, or leave `nodes` out"
        )
