"""Benchmarks: `python -m launch.bench kernels|layer|decode|step|serve ...`. Medians and ratios of one run.

Each prints a table; `--json FILE` keeps rows, settings, machine, versions and commit; `--plot FILE.png` draws the rows. Every
result is compared with a reference before it is timed; a wrong one is reported and the exit code is 1. If something cannot be
measured here, or another library fails, the reason is printed and the rest continues.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, fields
from itertools import product
from pathlib import Path
from typing import Any

from distributed_sparse.commands.lifetime import FAILED, INTERRUPTED, USAGE, ends_on_sigterm
from distributed_sparse.commands.parser import command_parser
from distributed_sparse.tools.bench.bench_report import print_table, write_json

Rows = list[dict[str, Any]]
Run = Callable[[dict[str, Any]], tuple[dict[str, Any], Rows]]
"""Runs a subcommand with the given options and prints its table; returns its settings and rows."""


def _columns(table: str) -> dict[str, str]:
    """Column -> format, from "column format" pairs."""
    words = table.split()
    return dict(zip(words[::2], words[1::2]))


LAYER_COLUMNS = _columns("""
    method {} ms {:.3f} p10_ms {:.3f} p90_ms {:.3f} launched {} density {:.3f} MB {:.1f} bytes_ms {:.3f}
    bandwidth_share {:.0%} speedup_over_sdpa {:.2f}x bytes_limit {:.2f}x
""")
KERNEL_COLUMNS = _columns("""
    op {} implementation {} context {} batch {} token_budget {} page_size {} ms {:.3f} p10_ms {:.3f} p90_ms {:.3f} launched {}
    MB {:.2f} bytes_ms {:.3f} bandwidth_share {:.0%} TFLOP_per_s {:.2f} over_ours {:.2f}x checked {}
""")
DECODE_COLUMNS = _columns("""
    contestant {} tensor_parallel_size {} context {} batch {} tpot_ms {:.2f} p10_ms {:.2f} p90_ms {:.2f} MB_per_step {:.1f}
    bytes_ms {:.2f} over_bytes {:.2f}x speedup_over_dense {:.2f}x bytes_limit {:.2f}x speedup_over_transformers {:.2f}x
    speedup_over_one_rank {:.2f}x
""")
TTFT_COLUMNS = _columns("""
    contestant {} tensor_parallel_size {} prompt_len {} ttft_ms {:.1f} p10_ms {:.1f} p90_ms {:.1f} over_transformers {:.2f}x
""")
SERVE_COLUMNS = _columns("""
    method {} request_rate {} completed {} failed {} duration {:.2f} request_throughput {:.2f} output_throughput {:.1f}
    min_output_throughput {:.1f} max_output_throughput {:.1f} total_token_throughput {:.1f}
""")
SERVE_LATENCIES = _columns("method {} request_rate {}") | {
    f"{statistic}_{name}_ms": "{:.1f}" for name in ("ttft", "tpot", "itl", "e2el") for statistic in ("mean", "median", "p99")
}
STEP_COLUMNS = ("step_p50", "shard_p50", "gap_p50", "overhead_p50", "driver_p50", "driver_cpu_p50", "bytes_ms")


def main(arguments: Sequence[str] | None = None, prog: str = "python -m launch.bench") -> int:
    """Run the command line; returns the exit code: 0 done, 1 wrong result or failed engine, 2 bad usage, 130 interrupted."""
    given = parse(sys.argv[1:] if arguments is None else arguments, prog)
    command, run, json_file, plot = (given.pop(name) for name in ("command", "run", "json", "plot"))
    try:
        if plot:
            from distributed_sparse.tools.common.figures import check_plots

            check_plots("--plot needs", "leave --plot out")
        with ends_on_sigterm():
            settings, rows = run(given)
        if json_file:
            write_json(json_file, command, settings, rows)
        if plot:
            _plot(plot, command, rows, f"{command}, {settings.get('model', 'no model')}, {settings['device']}")
    except KeyboardInterrupt:
        return INTERRUPTED
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    return FAILED if any("wrong" in row for row in rows) else 0


def parse(arguments: Sequence[str], prog: str = "python -m launch.bench") -> dict[str, Any]:
    """The parsed command line; SystemExit(2) if it is invalid."""
    parser = command_parser(__doc__, "bench", prog)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (settings, run, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name in arguments[:1]:  # importing the settings of the others would import torch
            module = importlib.import_module(f"distributed_sparse.tools.bench.{name}")
            _add_settings(command, getattr(module, settings), run)
    return vars(parser.parse_args(arguments))


# ---- the subcommands


def _kernels(given: dict[str, Any]) -> tuple[dict[str, Any], Rows]:
    from distributed_sparse.tools.bench.kernels import KernelSettings, bench_kernels
    from distributed_sparse.tools.bench.timing import torch_threads

    settings = KernelSettings(**given)
    with torch_threads(settings.threads) as threads:
        rows = bench_kernels(settings, lambda row: print(f"  {_kernel_name(row)}", file=sys.stderr))
    print(
        f"Kernels on {settings.device}, {settings.num_heads}/{settings.num_kv_heads} heads, d {settings.head_dim}, "
        f"{settings.dtype}, {threads} threads; measured copy bandwidth "
        f"{max((row['copy_bandwidth_GB_per_s'] for row in rows), default=0):.1f} GB/s, read and written together"
    )
    _print(rows, KERNEL_COLUMNS, _kernel_name)
    return asdict(settings), rows


def _kernel_name(row: dict[str, Any]) -> str:
    point = [f"{name}={row[name]}" for name in ("context", "batch", "token_budget", "page_size") if name in row]
    return " ".join([row["op"], row["implementation"], *point])


def _layer(given: dict[str, Any]) -> tuple[dict[str, Any], Rows]:
    from distributed_sparse.tools.bench.failures import caught
    from distributed_sparse.tools.bench.layer import PARTS, LayerSettings, bench_layer
    from distributed_sparse.tools.bench.timing import torch_threads

    rows: Rows = []
    of_all = {name: value for name, value in given.items() if name not in ("context", "batch", "threads")}
    with torch_threads(given["threads"]) as threads:
        for context, batch in product(given["context"], given["batch"]):
            settings = LayerSettings(**of_all, context=context, batch=batch)
            point = {"context": context, "batch": batch}
            print(
                f"One layer's decode, context {context}, batch {batch}, {settings.num_heads}/{settings.num_kv_heads} "
                f"heads, d {settings.head_dim}, {settings.dtype}, {settings.device}, {threads} threads",
                end="",
            )
            with caught("layer") as failed:
                of_point = bench_layer(settings)
            if failed:
                print(f": {' '.join(f'{how}: {why}' for how, why in failed.items())}")
                rows.append({"method": "all", **point, **failed})
                continue
            print(f"; measured read bandwidth {of_point[0]['read_bandwidth_GB_per_s']:.1f} GB/s")
            _print(of_point, LAYER_COLUMNS, lambda row: row["method"])
            parts = [{"method": row["method"], **row["parts_ms"]} for row in of_point if row.get("parts_ms")]
            if parts:
                print("The parts of a step, each timed separately, mean ms (bytes_ms above: the bytes at that bandwidth)")
                print_table(parts, {"method": "{}"} | dict.fromkeys(PARTS, "{:.3f}"))
            rows += [{**row, **point} for row in of_point]
    return given, rows


def _decode(given: dict[str, Any]) -> tuple[dict[str, Any], Rows]:
    from distributed_sparse.tools.bench.decode import DecodeSettings, bench_decode
    from distributed_sparse.tools.bench.ttft import bench_ttft

    settings = DecodeSettings(**given)
    rows = bench_decode(settings, _tell) if settings.context else []
    if rows:
        bandwidths = {row["read_bandwidth_GB_per_s"] for row in rows if "read_bandwidth_GB_per_s" in row}
        print(
            f"Decode of {settings.model} on {settings.device}: caches filled with random keys and values, no prompt computed. "
            f"{settings.rounds} rounds of {settings.output_len} tokens, in turns; "
            f"read bandwidth per rank {', '.join(f'{each:.1f}' for each in sorted(bandwidths, reverse=True))} GB/s"
        )
        _print(rows, DECODE_COLUMNS, _contestant)
        if any(row.get("in_turns") is False for row in rows):
            print("Not all could be open together: they ran one after the other, so ratios include drift of the machine.")
        for checked in dict.fromkeys(row["checked"] for row in rows if "checked" in row):
            names = dict.fromkeys(row["contestant"] for row in rows if row.get("checked") == checked)
            print(f"Compared before: {checked} ({', '.join(names)})")
    prompts = bench_ttft(settings, _tell) if settings.ttft else []
    if prompts:
        print(f"Time to first token of {settings.model}, prompts computed, {settings.rounds} rounds in turns")
        _print(prompts, TTFT_COLUMNS, _contestant)
    return asdict(settings), rows + prompts


def _contestant(row: dict[str, Any]) -> str:
    where = " ".join(f"{name}={row[name]}" for name in ("context", "batch", "prompt_len") if name in row)
    return f"{row['contestant']} tensor_parallel_size={row['tensor_parallel_size']} {where}"


def _tell(row: dict[str, Any]) -> None:
    """Progress on stderr."""
    how = "unavailable" if "unavailable" in row else "wrong" if "wrong" in row else "done"
    print(f"  {_contestant(row)}: {how}", file=sys.stderr)


def _step(given: dict[str, Any]) -> tuple[dict[str, Any], Rows]:
    from distributed_sparse.client.client import EngineError
    from distributed_sparse.tools.bench import step

    settings = step.StepSettings(**given)
    try:
        row = step.bench_step(settings)
    except EngineError as error:
        row = {"wrong": f"the engine failed: {error}"}
    print(f"Decode steps at tensor_parallel_size={settings.tensor_parallel_size}, batch {settings.batch}; medians in ms")
    _print([row], dict.fromkeys(STEP_COLUMNS, "{:.3f}"), lambda row: "decode")
    return given, [row]


def _serve(given: dict[str, Any]) -> tuple[dict[str, Any], Rows]:
    from distributed_sparse.tools.bench.serve import ServeSettings, bench_serve

    settings = ServeSettings(**given)
    rows = bench_serve(settings, lambda row: print(f"  {_served(row)}", file=sys.stderr))
    print(
        f"{settings.num_prompts} requests of {settings.random_input_len} + {settings.random_output_len} tokens to "
        f"{settings.model} on {settings.device}, {settings.tensor_parallel_size} ranks; arrivals do not wait for completions. "
        f"The median of {settings.rounds} rounds; throughput per second, latencies in ms"
    )
    _print(rows, SERVE_COLUMNS, _served)
    measured = [row for row in rows if row.get("mean_ttft_ms") is not None]
    if measured:
        print_table(measured, SERVE_LATENCIES)
    for row in rows:
        for error in row.get("errors", ()):
            print(f"{_served(row)}: failed: {error}")
    return {**given, "request_rate": [str(rate) for rate in settings.request_rate]}, rows


def _served(row: dict[str, Any]) -> str:
    return f"{row['method']} at {row.get('request_rate', 'any')} requests per second"


COMMANDS: dict[str, tuple[str, Run, str]] = {
    "kernels": ("KernelSettings", _kernels, "each kernel beside its bytes and other libraries"),
    "layer": ("LayerSettings", _layer, "one attention layer's decode against torch SDPA"),
    "decode": ("DecodeSettings", _decode, "the whole engine's time per token over a filled cache, beside transformers"),
    "step": ("StepSettings", _step, "driver and channel overhead per step, on a model of negligible size"),
    "serve": ("ServeSettings", _serve, "open-loop arrivals: TTFT, TPOT, ITL and throughput as in `vllm bench serve`"),
}
"""Name, also of its module in tools/bench -> (class of its settings, function that runs and prints, help)."""


# ---- printing


def _print(rows: Rows, columns: dict[str, str], name: Callable[[dict[str, Any]], str]) -> None:
    """Print measured rows as a table of the columns that some row fills, then the other rows with their reasons."""
    measured = [row for row in rows if "unavailable" not in row and "wrong" not in row]
    if measured:
        print_table(measured, {key: form for key, form in columns.items() if any(row.get(key) is not None for row in measured)})
    for how in ("unavailable", "wrong"):
        for row in rows:
            if how in row:
                print(f"{how}: {name(row)}: {row[how]}")


def _plot(path: str, command: str, rows: Rows, title: str) -> None:
    """Write one picture, or for `decode` with both tables a second one with the times to first token."""
    from distributed_sparse.tools.bench.bench_plots import write_plot

    file = Path(path)
    prompts = [row for row in rows if "prompt_len" in row]
    others = [row for row in rows if "prompt_len" not in row]
    if others:
        write_plot(file, command, others, title)
    if prompts:
        write_plot(file.with_name(f"{file.stem}-ttft{file.suffix}") if others else file, "ttft", prompts, title)


# ---- options


def _numbers(kind: type) -> Callable[[str], tuple[Any, ...]]:
    def parse(text: str) -> tuple[Any, ...]:
        found = tuple(kind(part) for part in text.split(",") if part.strip())
        if any(not number > 0 for number in found):
            raise argparse.ArgumentTypeError(f"{text} has a number that is not above 0")
        return found

    parse.__name__ = f"list of {kind.__name__}"  # argparse shows it in errors
    return parse


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip() and part.strip() != "none")


PARSERS: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "int | None": int,
    "str | None": str,
    "tuple[int, ...]": _numbers(int),
    "tuple[float, ...]": _numbers(float),
    "tuple[str, ...]": _names,
}
"""Parser of an option, by the annotation of its settings field."""

GRIDS = {"layer": ("context", "batch")}
"""Single-valued settings whose option takes a list."""


def _add_settings(parser: argparse.ArgumentParser, settings: type, run: Run) -> None:
    """Add one option per field of a settings class, with its default; lists are comma-separated."""
    command = parser.prog.split()[-1]
    for field in fields(settings):
        assert field.default is not MISSING
        grid = field.name in GRIDS.get(command, ())
        default = (field.default,) if grid else field.default
        kind = "tuple[int, ...]" if grid else str(field.type)
        options: dict[str, Any] = {"type": PARSERS[kind], "default": default}
        if field.name == "device":
            options["choices"] = ("cpu", "cuda")
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        options["help"] = f"default {shown}" if shown not in ("", None) else "default: by the device, or nothing"
        parser.add_argument(f"--{field.name.replace('_', '-')}", **options)
    if command in GRIDS:  # these settings describe one point and have no threads
        parser.add_argument("--threads", type=int, help="torch threads (default: torch's own)")
    parser.add_argument("--json", metavar="FILE", help="also write the result there")
    parser.add_argument("--plot", metavar="FILE.png", help="also draw it (needs matplotlib)")
    parser.set_defaults(run=run)
