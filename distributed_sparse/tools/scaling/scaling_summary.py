"""scaling_summary: the points and the results of their checks as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distributed_sparse.tools.common.results import Record
from distributed_sparse.tools.common.tables import megabytes, number, table
from distributed_sparse.tools.scaling.checks import Outcome
from distributed_sparse.tools.scaling.grid import Point

LEGEND = """\
Each point ran in its own engine, after unmeasured warm-up requests. Times are the client's, on one monotonic clock, by the
definitions of `vllm bench serve`: TTFT from sending a request to its first token, TPOT from its first token to its last, per
token after the first, ITL from one token to the next.

- Each time is mean / median / p99, in ms. Output and total (with prompts) are tokens per second.
- speed-up: median TPOT of the point with the fewest ranks, at otherwise equal settings, over this point's; efficiency: that
  over the ratio of ranks.
- Split of a step: step p50 and driver (time outside the shards) are medians of the last 256 steps up to the last measured one,
  prefill and warm-up included. Timed step and its parts are rank 0's means over decode steps of a further, unmeasured batch,
  whose steps wait for the device at each part and run without CUDA graphs (`-`: there was none).
- Bytes are per rank, MB = 10^6 bytes; read: weights, and what each rank itself read of K, V and metadata, in a decode step of a
  whole batch.
- density: tokens attended / tokens in context, in the layers that select; skew: the rank that attends most / the mean."""

PARTS = ("select", "attend", "all_reduce", "other", "driver")
"""Parts of a step."""

Tried = Sequence[tuple[Point, Record]]


def summary(identity: dict[str, Any], tried: Tried, outcomes: Sequence[Outcome]) -> str:
    """The Markdown text."""
    done = [(point, record) for point, record in tried if "error" not in record]
    failed = [(point, record) for point, record in tried if "error" in record]
    parts = [
        "# Scaling",
        f"commit {identity['commit'] or 'unknown'}, sources {identity['sources']}; {identity['cores']} cores of "
        f"{identity['cpu']}, GPU: {identity['gpu'] or 'none'}; "
        + ", ".join(f"{name} {version}" for name, version in identity["versions"].items()),
        *_common(tried),
        "## Checks\n\n" + _checks(outcomes),
    ]
    if failed:
        parts.append("## Points that failed\n\n" + "\n".join(f"- {point.label}: {record['error']}" for point, record in failed))
    if done:
        parts += [
            LEGEND,
            "## Times and rates\n\n" + _times(done),
            "## Split of a step (ms)\n\n" + _split(done),
            "## Bytes, all-reduce, density\n\n" + _bytes(done),
        ]
    return "\n\n".join(parts) + "\n"


def split_ms(record: Record) -> dict[str, float | None]:
    """A step's time by part in ms; None without a profiled step. "shard" is the sum of the parts without "driver"."""
    ms = record["time_ms"]
    # ranks with a queued step plan wait for each other inside it, so the slowest rank's time may exceed the step's period
    found: dict[str, float | None] = {"driver": max(ms["overhead_p50"], 0.0)}
    if "shard" not in ms:
        return found | dict.fromkeys(("shard", "select", "attend", "all_reduce", "other"))
    known = {name: ms.get(name, 0.0) for name in ("select", "attend", "all_reduce")}
    return found | known | {"shard": ms["shard"], "other": ms["shard"] - sum(known.values())}


def speed_ups(done: Tried) -> dict[str, tuple[float, float]]:
    """Point key -> (speed-up, efficiency) over the point of fewest ranks, in groups of several points."""
    found = {}
    for point, record in done:
        group = [(p, r) for p, r in done if p.group == point.group]
        base, reference = min(group, key=lambda one: one[0].engine.tensor_parallel_size)
        if len(group) > 1 and record["tpot_ms"] is not None and reference["tpot_ms"] is not None:
            speed_up = reference["tpot_ms"]["median"] / record["tpot_ms"]["median"]
            ranks = point.engine.tensor_parallel_size / base.engine.tensor_parallel_size
            found[point.key] = (speed_up, speed_up / ranks)
    return found


def varying(tried: Tried) -> list[str]:
    """The axes with more than one value."""
    axes = list(dict.fromkeys(axis for point, _ in tried for axis in point.axes))
    return [axis for axis in axes if len({point.axes.get(axis) for point, _ in tried}) > 1] or axes[:1]


def _common(tried: Tried) -> list[str]:
    if not tried:
        return []
    point = tried[0][0]
    engine, load = point.engine, point.workload
    own = set(varying(tried))
    stated: dict[str, Any] = {
        "model": engine.model, "load_format": engine.load_format, "dtype": engine.dtype, "device": engine.device,
        "page_size": engine.page_size, "tensor_parallel_size": engine.tensor_parallel_size,
        "context": load.input_len, "output_len": load.output_len, "batch": load.batch,
    }  # fmt: skip
    return [", ".join(f"{name}={value}" for name, value in stated.items() if name not in own)]


def _checks(outcomes: Sequence[Outcome]) -> str:
    lines = []
    for name in dict.fromkeys(outcome.check for outcome in outcomes):
        of_check = [outcome for outcome in outcomes if outcome.check == name and outcome.failures is not None]
        held = sum(not outcome.failures for outcome in of_check)
        lines.append(f"- {name}: holds for {held} of {len(of_check)} points" if of_check else f"- {name}: nothing to compare")
        for outcome in of_check:
            shown = (outcome.failures or [])[:3]
            lines += [f"  - FAILED, {outcome.point}: {failure}" for failure in shown]
            if len(outcome.failures or []) > 3:
                lines.append(f"  - and {len(outcome.failures or []) - 3} more of this point")
    return "\n".join(lines) or "None was made."


def _rows(done: Tried, head: Sequence[str], cells: Any) -> str:
    axes = varying(done)
    rows = [[*(point.axes.get(axis, "-") for axis in axes), *cells(point, record)] for point, record in done]
    return table([*axes, *head], rows)


def _times(done: Tried) -> str:
    gains = speed_ups(done)

    def cells(point: Point, record: Record) -> list[str]:
        gain = gains.get(point.key)
        return [
            *(_spread(record[name]) for name in ("ttft_ms", "tpot_ms", "itl_ms")),
            number(record["output_tokens_per_s"], 1),
            number(record["total_tokens_per_s"], 1),
            number(record["requests_per_s"], 2),
            *(["-", "-"] if gain is None else [number(part, 2) for part in gain]),
        ]

    return _rows(done, ["TTFT", "TPOT", "ITL", "output / s", "total / s", "requests / s", "speed-up", "efficiency"], cells)


def _split(done: Tried) -> str:
    def cells(point: Point, record: Record) -> list[str]:
        split, ms = split_ms(record), record["time_ms"]
        in_order = ("driver", "shard", *(part for part in PARTS if part != "driver"))
        return [number(ms["step_p50"], 2), *(_or_dash(split[part]) for part in in_order)]

    return _rows(done, ["step p50", "driver", "timed step", "select", "attend", "all-reduce", "other"], cells)


def _bytes(done: Tried) -> str:
    def cells(point: Point, record: Record) -> list[str]:
        rank, density, cache_read = record["ranks"][0], record["density"], record["cache_bytes_read_per_step"]
        return [
            *(megabytes(rank[name]) for name in ("weight_bytes", "cache_bytes", "metadata_bytes")),
            megabytes(record["expected"]["weight_bytes_read_per_step"]),
            "-" if cache_read is None else " ".join(megabytes(of_rank) for of_rank in cache_read),
            str(record["all_reduce"]["calls"]),
            megabytes(record["all_reduce"]["bytes"]),
            "-" if density["ranks"] is None else " ".join(number(value) for value in density["ranks"]),
            _or_dash(density["skew"], 3),
        ]

    head = ["weights", "cache", "metadata", "read: weights", "read: cache, each rank", "all-reduce calls", "all-reduce MB"]
    return _rows(done, [*head, "density of each rank", "skew"], cells)


def _spread(ms: dict[str, float] | None) -> str:
    return "-" if ms is None else " / ".join(number(ms[name], 2) for name in ("mean", "median", "p99"))


def _or_dash(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else number(value, digits)
