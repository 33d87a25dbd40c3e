"""kernels: every kernel's time over a grid, beside its bytes at the measured copy bandwidth and other libraries."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch

from distributed_sparse.cache import Geometry, PageMinMax, QuantizedKeys
from distributed_sparse.tools.bench.failures import caught
from distributed_sparse.tools.bench.layer import Inputs, LayerSettings, make_rotation
from distributed_sparse.tools.bench.ops import OPS
from distributed_sparse.tools.bench.ops.base import Op, Shape
from distributed_sparse.tools.bench.rows import Row
from distributed_sparse.tools.bench.timing import Times, copy_bandwidth, one_line, time_in_turn
from distributed_sparse.utils.validation import check_choice

CHECKED_ROWS = 4
"""At most so many (sequence, KV head) rows are compared with the float64 reference."""

OWN = ""
"""Name of the kernel itself among its peers' names."""

GRID = ("context", "batch", "token_budget", "page_size")

DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"context": (8192, 32768), "batch": (1,), "dtype": "float32", "prefill_tokens": 256, "repeats": 11},
    "cuda": {"context": (8192, 32768, 131072), "batch": (1, 8, 64), "dtype": "bfloat16", "prefill_tokens": 0, "repeats": 31},
}
"""Defaults by device."""


@dataclass(frozen=True)
class KernelSettings:
    """The grid, and the shape of one layer's attention. Empty or None fields come from `DEFAULTS`."""

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
    """torch threads, which the caller sets; None: torch's default."""
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
    settings: KernelSettings, on_row: Callable[[dict[str, Any]], object] = lambda row: None
) -> list[dict[str, Any]]:
    """Time every op at every point of the grid.

    Args:
        on_row: called with each row as soon as it is known.

    Returns:
        Rows of "op", "implementation" and the point. "implementation" is "triton"; or "cpu", which is C++ where the op has it,
        else torch; or the name of a peer, with its fastest variant. A row has either median ms with 10th and 90th percentile,
        "launched" (`Times.launched`), "MB" (read and written, by the op's formula), "bytes_ms" (their time at the measured copy
        bandwidth), "bandwidth_share", "TFLOP_per_s" where operations are the limit, "over_ours" (a peer's time over the op's
        own) and "checked"; or "unavailable" with the reason; or "wrong" with the difference from the reference or the failure.
    """
    device = torch.device(settings.device)
    bandwidth = copy_bandwidth(device)
    rows: list[dict[str, Any]] = []
    done: set[tuple[Any, ...]] = set()
    for shape in shapes(settings):
        ops = [op for op in (OPS[name](shape) for name in settings.ops) if _is_new(op, done)]
        point = {name: getattr(shape, name) for name in GRID}
        for row in _bench_point(ops, shape, settings, bandwidth):
            implementation = row.setdefault("implementation", "triton" if device.type == "cuda" else "cpu")
            row |= {name: value for name, value in point.items() if name in OPS[row["op"]].axes}
            row |= {"dtype": settings.dtype, "copy_bandwidth_GB_per_s": bandwidth / 1e9}
            rows.append({"op": row.pop("op"), "implementation": implementation, **row})
            on_row(rows[-1])
    return rows


def shapes(settings: KernelSettings) -> Iterator[Shape]:
    """The points of the grid."""
    assert settings.dtype is not None
    for values in product(*(getattr(settings, name) for name in GRID)):
        point = dict(zip(GRID, values))
        yield Shape(
            **point,
            num_heads=settings.num_heads,
            num_kv_heads=settings.num_kv_heads,
            head_dim=settings.head_dim,
            prefill_tokens=min(settings.prefill_tokens or point["context"], point["context"]),
            dtype=getattr(torch, settings.dtype),
            device=torch.device(settings.device),
        )


def _is_new(op: Op, done: set[tuple[Any, ...]]) -> bool:
    key = (op.name, *(getattr(op.shape, name) for name in op.axes))
    new = key not in done
    done.add(key)
    return new


def _bench_point(ops: list[Op], shape: Shape, settings: KernelSettings, bandwidth: float) -> Iterator[dict[str, Any]]:
    """Rows of all ops at one shape. Only this frame holds the point's data, which is freed before the next point."""
    if not ops:
        return
    with caught("the point's data") as failed:
        data = _make_data(settings, shape)
    for op in ops:
        yield from [{"op": op.name, **failed}] if failed else _bench_op(op, data, settings, bandwidth)


def _make_data(settings: KernelSettings, shape: Shape) -> list[Inputs]:
    """Caches of different contents, or sets of queries on a large one, to use in turn."""
    geometry = Geometry(
        shape.num_kv_heads, shape.group, shape.head_dim, shape.page_size, shape.dtype, shape.device, first_kv_head=0
    )
    layer = LayerSettings.of(
        geometry,
        shape.context,
        shape.batch,
        heavy_tokens=0,  # one token of nearly all the weight would make statistics that float32 cannot hold
        key_spread=1.0,
        caches=settings.caches,
        seed=settings.seed,
    )
    return make_rotation(layer, geometry, (PageMinMax(), QuantizedKeys(4)))


def _bench_op(op: Op, data: list[Inputs], settings: KernelSettings, bandwidth: float) -> Iterator[dict[str, Any]]:
    """The op's own row, then its peers'."""
    assert settings.repeats is not None
    refused: dict[str, dict[str, str]] = {}
    with caught(op.name) as failed:
        generator = torch.Generator(op.shape.device).manual_seed(settings.seed)
        arguments = [op.arguments(data[number % len(data)], generator) for number in range(settings.caches)]
        checked, result = _check(op, data[0], arguments[0], settings.seed)
        functions: dict[str, Callable[[int], object]] = {OWN: lambda number: op.run(arguments[number % len(arguments)])}
        for peer in op.peers(data[0], arguments[0]):
            with caught(peer, is_peer=True) as peer_failed:
                functions[peer] = _peer(op, peer, data, arguments, result)
            if peer_failed:
                refused[peer] = peer_failed
        del result
        times = _time_in_turn(functions, settings.repeats, op.shape.device, len(arguments), refused)
    if failed:
        yield {"op": op.name, **failed}
        return
    num_bytes, operations = sum(op.num_bytes()), op.num_operations()
    for implementation, taken in _fastest_variants(times).items():
        row = {
            "op": op.name,
            **taken.ms,
            "launched": taken.launched,
            "MB": num_bytes / 1e6,
            "bytes_ms": num_bytes / bandwidth * 1e3,
            "bandwidth_share": num_bytes / taken.median / bandwidth,
            "TFLOP_per_s": None if operations is None else operations / taken.median / 1e12,
            "over_ours": taken.median / times[OWN].median,
            "checked": checked,
        }
        yield row if implementation == OWN else {**row, "implementation": implementation}
    yield from ({"op": op.name, **row} for row in _refused_libraries(refused, times))


def _check(op: Op, data: Inputs, arguments: Any, seed: int) -> tuple[str, Any]:
    """Compare one run with the reference; how much of it was compared, and its result. Raises `WrongResult`."""
    rows = [] if op.checks_whole else _some_rows(data, op.shape, seed)
    op.before_check(arguments)
    result = op.run(arguments)
    op.check(arguments, result, rows)
    return op.compared(len(rows)), result


def _peer(op: Op, name: str, data: list[Inputs], arguments: list[Any], result: Any) -> Callable[[int], object]:
    """A peer as a function of the round's number, after its result was compared with the op's.

    Raises:
        Unavailable: the peer cannot run here.
        WrongResult: its result differs.
    """
    made = [op.peers(one, arguments[0])[name]() for one in data]
    op.check_peer(name, arguments[0], result, made[0](arguments[0]))
    return partial(_run_peer, name, made, arguments)


class PeerFailed(Exception):
    """A peer failed while it was timed.

    Attributes:
        peer: its name.
    """

    def __init__(self, peer: str, error: Exception) -> None:
        super().__init__(f"{peer} failed: {one_line(error)}")
        self.peer = peer


def _run_peer(name: str, made: list[Callable[[Any], Any]], arguments: list[Any], number: int) -> Any:
    place = number % len(arguments)
    try:
        return made[place % len(made)](arguments[place])
    except Exception as error:
        raise PeerFailed(name, error) from error


def _time_in_turn(
    functions: dict[str, Callable[[int], object]],
    repeats: int,
    device: torch.device,
    rotation: int,
    refused: dict[str, dict[str, str]],
) -> dict[str, Times]:
    """Time all functions. When a peer fails, note it in `refused` and start again without it."""
    while True:
        try:
            return time_in_turn(functions, repeats, device, rotation=rotation)
        except PeerFailed as error:
            refused[error.peer] = {"unavailable": str(error)}
            functions = {name: function for name, function in functions.items() if name != error.peer}


def _library(name: str) -> str:
    """The library of a peer's name "library/variant"."""
    return name.partition("/")[0]


def _fastest_variants(times: dict[str, Times]) -> dict[str, Times]:
    """Each library's fastest variant, under its full name."""
    fastest: dict[str, str] = {}
    for name in sorted(times, key=lambda name: times[name].median):
        fastest.setdefault(_library(name), name)
    return {name: taken for name, taken in times.items() if fastest[_library(name)] == name}


def _refused_libraries(refused: dict[str, dict[str, str]], times: dict[str, Times]) -> list[dict[str, Any]]:
    """Rows for refused peers: every wrong variant, and each library of which no variant was timed."""
    rows: dict[str, dict[str, Any]] = {}
    timed = {_library(name) for name in times}
    for name, row in refused.items():
        if "wrong" in row:
            rows[name] = {"implementation": name, **row}
        elif _library(name) not in timed:
            rows.setdefault(_library(name), {"implementation": _library(name), **row})
    return list(rows.values())


def _some_rows(data: Inputs, shape: Shape, seed: int) -> list[Row]:
    """All rows, or `CHECKED_ROWS` of them with always one of the first sequence."""
    everything = list(product(range(shape.batch), range(shape.num_kv_heads)))
    if len(everything) > CHECKED_ROWS:
        always = everything.pop(shape.num_kv_heads - 1)
        everything = [always, *random.Random(seed).sample(everything, CHECKED_ROWS - 1)]
    return [Row(data.batch, b, h, shape.num_kv_heads) for b, h in everything]
