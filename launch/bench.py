"""Benchmarks: `python -m launch.bench layer|step ...`. Medians and ratios of one run; `--json FILE` keeps the result."""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields
from typing import Any

from distributed_sparse.bench.report import print_table, write_json

LAYER_COLUMNS = {
    "method": "{}",
    "ms": "{:.3f}",
    "p10_ms": "{:.3f}",
    "p90_ms": "{:.3f}",
    "density": "{:.3f}",
    "MB": "{:.1f}",
    "bytes_ms": "{:.3f}",
    "bandwidth_share": "{:.0%}",
    "speedup_over_sdpa": "{:.2f}x",
    "bytes_limit": "{:.2f}x",
}


def main(arguments: list[str] | None = None) -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(prog="python -m launch.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    from distributed_sparse.bench.layer import LayerSettings
    from distributed_sparse.bench.step import StepSettings

    layer = commands.add_parser("layer", help="one attention layer's decode against torch SDPA")
    _add_settings(layer, LayerSettings)
    layer.add_argument("--threads", type=int, help="torch threads (default: torch's own)")
    step = commands.add_parser("step", help="driver and channel overhead per step, on a model of negligible size")
    _add_settings(step, StepSettings)
    given = vars(parser.parse_args(arguments))
    command, json_file, threads = given.pop("command"), given.pop("json"), given.pop("threads", None)
    if command == "layer":
        _layer(LayerSettings(**given), threads, json_file)
    else:
        _step(StepSettings(**given), json_file)


def _layer(settings: Any, threads: int | None, json_file: str | None) -> None:
    import torch

    from distributed_sparse.bench.layer import PARTS, bench_layer

    if threads is not None:
        torch.set_num_threads(threads)
    rows = bench_layer(settings)
    print(
        f"One layer's decode, context {settings.context}, batch {settings.batch}, {settings.num_heads}/{settings.num_kv_heads} "
        f"heads, d {settings.head_dim}, {settings.dtype}, {torch.get_num_threads()} threads; "
        f"measured read bandwidth {rows[0]['read_bandwidth_GB_per_s']:.1f} GB/s"
    )
    print_table(rows, LAYER_COLUMNS)
    print("The parts of a step, each with a clock around it, mean ms (bytes_ms above: the bytes at the measured bandwidth)")
    parts = [{"method": row["method"], **row["parts_ms"]} for row in rows if row["parts_ms"]]
    print_table(parts, {"method": "{}"} | dict.fromkeys(PARTS, "{:.3f}"))
    if json_file:
        write_json(json_file, "layer", asdict(settings), rows)


def _step(settings: Any, json_file: str | None) -> None:
    from distributed_sparse.bench.step import bench_step

    row = bench_step(settings)
    print(f"Decode steps at tensor_parallel_size={settings.tensor_parallel_size}, batch {settings.batch}; medians in ms")
    columns = ("step_p50", "shard_p50", "gap_p50", "overhead_p50", "driver_p50", "driver_cpu_p50", "bytes_ms")
    print_table([row], dict.fromkeys(columns, "{:.3f}"))
    if json_file:
        write_json(json_file, "step", asdict(settings), [row])


def _add_settings(parser: argparse.ArgumentParser, settings: type) -> None:
    """One option per field of a settings class, with its default."""
    for field in fields(settings):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            help=f"default {field.default}",
        )
    parser.add_argument("--json", metavar="FILE", help="also write the result there")


if __name__ == "__main__":
    main()
