"""plan: cost plans: a grid of ranks, contexts, batches and methods, with bytes, memory and times beside dense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from distributed_sparse.config import PAGE_SIZES, set_override
from distributed_sparse.model.config import ModelConfig
from distributed_sparse.model.limits import resolve_max_model_len
from distributed_sparse.selection import resolve_sparse_config
from distributed_sparse.tools.planner.hardware import Hardware
from distributed_sparse.tools.planner.rank import RankCostModel
from distributed_sparse.tools.planner.times import expected, limit_s
from distributed_sparse.utils.validation import check_bool, check_float, check_int, shown

DENSE: dict[str, Any] = {"method": "dense"}

DEFAULT_RESERVE_BYTES = 2 << 30
"""Memory that an engine measures in its profiling run: CUDA context, activations of the largest step, sampler."""

HardwareOf = Callable[[list[RankCostModel]], list[Hardware]]
"""The device of each of these ranks, which have one tensor_parallel_size and a method each."""


def sparse_sections(methods: Sequence[str], overrides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A `sparse:` section for each method, with the overrides "sparse.KEY=VALUE" in all but dense.

    Raises:
        ValueError: an override of another section or of the method, or a section that is invalid.
    """
    sections: dict[str, dict[str, Any]] = {}
    for method in methods:
        run: dict[str, Any] = {"sparse": {"method": method}}
        for override in overrides:
            set_override(run, override)
        if set(run) != {"sparse"} or not isinstance(run["sparse"], dict):
            other = next((key for key in run if key != "sparse"), "sparse")
            raise ValueError(f"--set {other}: only keys of `sparse` can be set here: --set sparse.token_budget=1024")
        if run["sparse"].get("method") != method:
            raise ValueError(f"--set sparse.method={shown(run['sparse'].get('method'))}: give it as --method")
        sections[method] = DENSE if method == "dense" else run["sparse"]
        resolve_sparse_config(sections[method])
    return sections


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The points: every combination. `sparse` holds sections as in a run's YAML; dense is always planned beside them.

    Raises:
        ValueError: a value that no engine would take.
    """

    tensor_parallel_sizes: Sequence[int] = (1,)
    contexts: Sequence[int] = (32768,)
    batches: Sequence[int] = (1,)
    sparse: Sequence[dict[str, Any]] = field(default_factory=lambda: ({"method": "quest"},))
    density: float | None = None
    page_size: int = 16
    gpu_memory_utilization: float = 0.9
    reserve_bytes: int = DEFAULT_RESERVE_BYTES
    enforce_eager: bool = False

    def __post_init__(self) -> None:
        for name, values, what in (
            ("tensor_parallel_size", self.tensor_parallel_sizes, "ranks"),
            ("context", self.contexts, "tokens of prompt and output together"),
            ("batch", self.batches, "sequences that decode at once"),
        ):
            if not values:
                raise ValueError(f"{name} is empty; give a number of {what}, or several: 1,8")
            for value in values:
                check_int(name, value, 1, remedy=f"give a number of {what}")
        if self.density is not None:
            check_float("density", self.density, 0.0, 1.0, low_excluded=True, remedy="give tokens attended / tokens in context")
        if self.page_size not in PAGE_SIZES:
            raise ValueError(f"page_size={self.page_size} has no kernel; use one of {', '.join(map(str, PAGE_SIZES))}")
        remedy = "0.9 is usual"
        check_float("gpu_memory_utilization", self.gpu_memory_utilization, 0.0, 1.0, low_excluded=True, remedy=remedy)
        check_int("reserve", self.reserve_bytes, 0, remedy="give bytes")
        check_bool("enforce_eager", self.enforce_eager)


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


def plan(model: ModelConfig, dtype: torch.dtype, grid: Grid, hardware_of: HardwareOf) -> list[dict[str, Any]]:
    """One row per point and method, dense first. Bytes are those of one rank and one step, times are in seconds.

    Raises:
        ValueError: a context exceeds the model's positions, the ranks do not divide its heads, a sparse section is invalid for
            it, or a method's traffic depends on the data and no density is given.
    """
    for context in grid.contexts:
        resolve_max_model_len(context, model)
    rows: list[dict[str, Any]] = []
    sections = [DENSE, *(section for section in grid.sparse if section != DENSE)]
    for world_size in grid.tensor_parallel_sizes:
        ranks = [RankCostModel(model, world_size, section, grid.page_size, dtype) for section in sections]
        devices = hardware_of(ranks)
        for context in grid.contexts:
            for batch in grid.batches:
                of_point = [_row(rank, device, context, batch, grid) for rank, device in zip(ranks, devices)]
                for row, section in zip(of_point, sections):
                    row["sparse"] = section
                    for name in ("limit_s", "tpot_s"):
                        row[name.replace("_s", "_speedup")] = of_point[0][name] / row[name]
                    compared = row is not of_point[0] and row["memory"]["fits"]
                    row["pays"] = row["tpot_s"] < of_point[0]["tpot_s"] if compared else None
                rows += of_point
    return rows


def _row(rank: RankCostModel, device: Hardware, context: int, batch: int, grid: Grid) -> dict[str, Any]:
    attention = rank.attention([context] * batch, grid.density)
    time = expected(rank, device, context, batch, grid.density, grid.enforce_eager)
    held = memory(rank, device, context, batch, grid.gpu_memory_utilization, grid.reserve_bytes)
    return {
        "method": rank.method,
        "tensor_parallel_size": rank.shard.world_size,
        "context": context,
        "batch": batch,
        "weight_bytes_read": rank.weight_bytes_read(batch),
        "kv_bytes_read": attention.dense_kv + attention.sparse_kv,
        "scored_bytes": attention.scored,
        "written_bytes": attention.written,
        "memory": {**asdict(held), "fits": held.fits},
        "all_reduce_calls": rank.all_reduce_calls,
        "all_reduce_bytes": rank.all_reduce_calls * rank.all_reduce_bytes_each(batch),
        "launches": rank.dense_launches + rank.sparse_launches(context),
        "captured": not device.measured and rank.why_eager(grid.enforce_eager) is None,
        "limit_s": limit_s(rank, device, context, batch, grid.density),
        "tpot_s": time.total_s,
        "parts_s": asdict(time),
    }
