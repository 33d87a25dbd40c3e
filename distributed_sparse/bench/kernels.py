"""kernels: every kernel's time over a grid, beside its bytes at the measured copy bandwidth and beside other libraries."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch

from distributed_sparse.bench.accuracy import WrongResult
from distributed_sparse.bench.layer import Inputs, LayerSettings, make_inputs
from distributed_sparse.bench.measure import (
    Unavailable,
    check_memory,
    copy_bandwidth,
    out_of_memory_is_unavailable,
    time_in_turn,
)
from distributed_sparse.bench.ops import OPS
from distributed_sparse.bench.ops.base import Op, Row, Shape, row_of
from distributed_sparse.selection.metadata import Geometry, PageMinMax, QuantizedKeys
from distributed_sparse.validation import check_choice

CHECKED_ROWS = 4
"""(sequence, KV head) rows that are compared with the float64 reference, where there are more."""

CONTIGUOUS_SHARE = 0.45
"""Of the free memory: contiguous K and V are kept beside the pages, for peers that need them, where both take no more."""

LARGE_CACHE_BYTES = 1 << 30
"""One cache of this size is enough: no processor holds it, and lists are drawn anew for every set of arguments."""

GRID = ("context", "batch", "token_budget", "page_size")

DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"context": (8192, 32768), "batch": (1,), "dtype": "float32", "prefill_tokens": 256, "repeats": 11},
    "cuda": {"context": (8192, 32768, 131072), "batch": (1, 8, 64), "dtype": "bfloat16", "prefill_tokens": 0, "repeats": 31},
}
"""What is left open, by device."""


@dataclass(frozen=True)
class KernelSettings:
    """The grid, and the shape of one layer's attention. What is empty or None is taken from `DEFAULTS`."""

    context: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    token_budget: tuple[int, ...] = (2048,)
    page_size: tuple[int, ...] = (16,)
    ops: tuple[str, ...] = tuple(OPS)
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    prefill_tokens: int | None = None
    """Tokens of a prompt chunk; 0: the whole context."""
    dtype: str | None = None
    device: str = "cpu"
    threads: int | None = None
    """torch threads, set by who calls; None: torch's own."""
    caches: int = 3
    repeats: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.ops:
            check_choice("--ops", name, list(OPS))
        for name, value in DEFAULTS[check_choice("--device", self.device, list(DEFAULTS))].items():
            if getattr(self, name) in (None, ()):
                object.__setattr__(self, name, value)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"--num-heads {self.num_heads} is no multiple of --num-kv-heads {self.num_kv_heads}")


@torch.inference_mode()
def bench_kernels(
    settings: KernelSettings, told: Callable[[dict[str, Any]], object] = lambda row: None
) -> list[dict[str, Any]]:
    """Time every op at every point of the grid.

    Args:
        told: is given each row as soon as it is there.

    Returns:
        Rows of "op", "implementation" ("torch", "triton" or a peer's name), the point, and either median ms with its 10th and
        90th percentile, "MB" (read and written, by the op's formula), "bytes_ms" (their time at the measured copy bandwidth),
        "bandwidth_share", "TFLOP_per_s" where operations are the limit, "over_ours" (a peer's time over the op's own) and
        "checked"; or "unavailable", why it could not be measured; or "wrong", how it differs from the reference.
    """
    device = torch.device(settings.device)
    bandwidth = copy_bandwidth(device)
    rows: list[dict[str, Any]] = []
    done: set[tuple[Any, ...]] = set()
    for shape in shapes(settings):
        ops = [op for op in (OPS[name](shape) for name in settings.ops) if _is_new(op, done)]
        if not ops:
            continue
        point = {name: getattr(shape, name) for name in GRID}
        try:
            with out_of_memory_is_unavailable():
                data = _make_data(settings, shape)
        except Unavailable as reason:
            found: Iterator[dict[str, Any]] = iter([{"op": op.name, "unavailable": str(reason)} for op in ops])
        else:
            found = (row for op in ops for row in _bench_op(op, data, settings, bandwidth))
        for row in found:
            implementation = row.setdefault("implementation", "triton" if device.type == "cuda" else "torch")
            row |= {name: value for name, value in point.items() if name in OPS[row["op"]].axes}
            row |= {"dtype": settings.dtype, "copy_bandwidth_GB_per_s": bandwidth / 1e9}
            rows.append({"op": row.pop("op"), "implementation": implementation, **row})
            told(rows[-1])
    return rows


def shapes(settings: KernelSettings) -> Iterator[Shape]:
    """The points of the grid."""
    assert settings.dtype is not None
    for context, batch, budget, page_size in product(*(getattr(settings, name) for name in GRID)):
        yield Shape(
            context=context,
            batch=batch,
            token_budget=budget,
            page_size=page_size,
            num_heads=settings.num_heads,
            num_kv_heads=settings.num_kv_heads,
            head_dim=settings.head_dim,
            prefill_tokens=min(settings.prefill_tokens or context, context),
            dtype=getattr(torch, settings.dtype),
            device=torch.device(settings.device),
        )


def _is_new(op: Op, done: set[tuple[Any, ...]]) -> bool:
    key = (op.name, *(getattr(op.shape, name) for name in op.axes))
    new = key not in done
    done.add(key)
    return new


def _make_data(settings: KernelSettings, shape: Shape) -> list[Inputs]:
    """Caches of different contents, which are taken in turn; one where it is so large that no processor holds it."""
    layer = LayerSettings(
        context=shape.context,
        batch=shape.batch,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        page_size=shape.page_size,
        heavy_tokens=0,  # a pilot in which one token has all the weight has statistics that float32 cannot hold
        key_spread=1.0,
    )
    geometry = Geometry(
        shape.num_kv_heads, shape.group, shape.head_dim, shape.page_size, shape.dtype, shape.device, first_kv_head=0
    )
    kv_bytes = 2 * shape.rows * shape.context * shape.row_bytes
    copies = kv_bytes * (1 / shape.page_size + (shape.head_dim / 2 + 4) / (2 * shape.row_bytes))
    count = 1 if kv_bytes >= LARGE_CACHE_BYTES else settings.caches
    held = int(count * (kv_bytes + copies))
    check_memory(f"a cache of {shape.batch} x {shape.context} tokens", held, shape.device)
    contiguous = True
    try:
        check_memory("K and V once more", int((held + count * kv_bytes) / (2 * CONTIGUOUS_SHARE)), shape.device)
    except Unavailable:
        contiguous = False
    kinds = (PageMinMax(), QuantizedKeys(4))
    return [make_inputs(layer, geometry, kinds, settings.seed + number, contiguous) for number in range(count)]


def _bench_op(op: Op, data: list[Inputs], settings: KernelSettings, bandwidth: float) -> Iterator[dict[str, Any]]:
    """The op's own row, then its peers'."""
    assert settings.repeats is not None
    refused: list[dict[str, Any]] = []
    try:
        with out_of_memory_is_unavailable():
            generator = torch.Generator(op.shape.device).manual_seed(settings.seed)
            arguments = [op.arguments(data[number % len(data)], generator) for number in range(max(settings.caches, len(data)))]
            checked, result = _check(op, data[0], arguments[0], settings.seed)
            functions: dict[str, Callable[[int], object]] = {"": lambda number: op.run(arguments[number % len(arguments)])}
            for peer in op.peers(data[0], arguments[0]):
                try:
                    functions[peer] = _peer(op, peer, data, arguments, result)
                except Unavailable as reason:
                    refused.append({"op": op.name, "implementation": peer, "unavailable": str(reason)})
                except WrongResult as wrong:
                    refused.append({"op": op.name, "implementation": peer, "wrong": str(wrong)})
            del result
            times = time_in_turn(functions, settings.repeats, op.shape.device)
    except Unavailable as reason:
        yield {"op": op.name, "unavailable": str(reason)}
    except WrongResult as wrong:
        yield {"op": op.name, "wrong": str(wrong)}
    except Exception as error:  # a kernel that does not compile, say: the others are timed all the same
        yield {"op": op.name, "wrong": f"{op.name} failed: {type(error).__name__}: {error}"}
    else:
        num_bytes = sum(op.num_bytes)
        for implementation, taken in times.items():
            row = {
                "op": op.name,
                **taken.ms,
                "MB": num_bytes / 1e6,
                "bytes_ms": num_bytes / bandwidth * 1e3,
                "bandwidth_share": num_bytes / taken.median / bandwidth,
                "TFLOP_per_s": None if op.num_operations is None else op.num_operations / taken.median / 1e12,
                "over_ours": taken.median / times[""].median,
                "checked": checked,
            }
            yield {**row, "implementation": implementation} if implementation else row
        yield from refused


def _check(op: Op, data: Inputs, arguments: Any, seed: int) -> tuple[str, Any]:
    """Compare one run with the reference: what of it was compared, and its result. Raises `WrongResult`."""
    rows = [] if op.checks_whole else _some_rows(data, op.shape, seed)
    op.before_check(arguments)
    result = op.run(arguments)
    op.check(data, arguments, result, rows)
    return op.compared(len(rows)), result


def _peer(op: Op, name: str, data: list[Inputs], arguments: list[Any], result: Any) -> Callable[[int], object]:
    """A peer's function of the round's number, once it has given what the op gives.

    Raises:
        Unavailable: it cannot be had, or fails in its own way.
        WrongResult: it gives something else.
    """
    try:
        with out_of_memory_is_unavailable():
            made = [op.peers(one, arguments[0])[name]() for one in data]
            of_peer = made[0](arguments[0])
    except Unavailable:
        raise
    except Exception as error:
        raise Unavailable(f"{name} failed: {type(error).__name__}: {error}") from error
    op.check_peer(name, arguments[0], result, of_peer)
    return partial(_run_peer, made, arguments)


def _run_peer(made: list[Callable[[Any], Any]], arguments: list[Any], number: int) -> Any:
    place = number % len(arguments)
    return made[place % len(made)](arguments[place])


def _some_rows(data: Inputs, shape: Shape, seed: int) -> list[Row]:
    """All rows, or `CHECKED_ROWS` of them, among them always one of the first sequence."""
    everything = list(product(range(shape.batch), range(shape.num_kv_heads)))
    if len(everything) > CHECKED_ROWS:
        always = everything.pop(shape.num_kv_heads - 1)
        everything = [always, *random.Random(seed).sample(everything, CHECKED_ROWS - 1)]
    return [row_of(data, b, h) for b, h in everything]
