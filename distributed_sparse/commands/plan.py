"""Plan an engine from a model's shape: bytes, memory, limits and expected times of decode, sparse beside dense.

    python -m launch.plan --model configs/models/llama-3.1-8b --gpu h100 --tensor-parallel-size 1,2,4,8 \
        --context 32768,131072 --batch 1,8,64 --method quest

Bytes are exact and equal the engine's counters. Times follow from them and from data sheets, without any measurement, except
with `--gpu cpu --measure`, which first times this machine at the largest context and batch of the grid.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed_sparse.commands.lifetime import FAILED, INTERRUPTED, USAGE
from distributed_sparse.commands.parser import command_parser
from distributed_sparse.tools.bench.bench_report import print_table, write_json
from distributed_sparse.tools.common.figures import check_plots
from distributed_sparse.tools.planner.hardware import MEASURED, PRESETS, Hardware, Interconnect, Protocol, Rate
from distributed_sparse.utils.validation import check_choice, check_dtype, check_float

if TYPE_CHECKING:  # modules that import torch are imported where they are used, so that --help is quick
    from distributed_sparse.model.config import ModelConfig
    from distributed_sparse.tools.planner.plan import Grid, HardwareOf
    from distributed_sparse.tools.planner.rank import RankCostModel

HELD = ("weight_bytes", "cache_bytes", "metadata_bytes", "constant_bytes")
NOTES = {(False, None): "does not fit", (True, False): "does not pay"}

COLUMNS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "method": ("{}", lambda row: row["method"]),
    "TP": ("{}", lambda row: row["tensor_parallel_size"]),
    "context": ("{}", lambda row: row["context"]),
    "batch": ("{}", lambda row: row["batch"]),
    "weights_GB": ("{:.2f}", lambda row: row["weight_bytes_read"] / 1e9),
    "KV_GB": ("{:.2f}", lambda row: row["kv_bytes_read"] / 1e9),
    "scored_GB": ("{:.3f}", lambda row: row["scored_bytes"] / 1e9),
    "written_MB": ("{:.2f}", lambda row: row["written_bytes"] / 1e6),
    "held_GB": ("{:.1f}", lambda row: sum(size for name, size in row["memory"].items() if name in HELD) / 1e9),
    "fits": ("{}", lambda row: "yes" if row["memory"]["fits"] else "NO"),
    "max_batch": ("{}", lambda row: row["memory"]["max_batch"]),
    "reduce_MB": ("{:.2f}", lambda row: row["all_reduce_bytes"] / 1e6),
    "reduce_ms": ("{:.2f}", lambda row: row["parts_s"]["all_reduce_s"] * 1e3),
    "limit_ms": ("{:.2f}", lambda row: row["limit_s"] * 1e3),
    "tpot_ms": ("{:.2f}", lambda row: row["tpot_s"] * 1e3),
    "limit": ("{:.2f}x", lambda row: row["limit_speedup"]),
    "speedup": ("{:.2f}x", lambda row: row["tpot_speedup"]),
    "": ("{}", lambda row: NOTES.get((row["memory"]["fits"], row["pays"]), "")),
}
"""Column -> (format, value of a row)."""


OVERRIDES = {
    "memory": ("memory_bytes", "bytes of a rank's device"),
    "bandwidth": ("bandwidth", "bytes per second that a device reads at most"),
    "weights-share": ("weights_share", "share of it that matrices reach"),
    "attention-share": ("dense_share", "share of it that attention over whole contexts reaches"),
    "sparse-share": ("sparse_share", "share of it that attention over a selection reaches"),
    "select-share": ("select_share", "share of it that scoring reaches"),
    "kernel-latency": ("kernel_s", "seconds that each kernel costs beside its bytes, launched by itself"),
    "graph-gap-time": ("graph_gap_s", "seconds that each kernel of a CUDA graph costs beside its bytes"),
    "graph-launch-time": ("graph_launch_s", "seconds of a CUDA graph's launch"),
    "driver-time": ("driver_s", "seconds of a step outside the ranks"),
}
"""Options that replace a number of the hardware: name -> (field of Hardware, help)."""

RATES = {"TP": "{}", "rate": "{}", "median": "{:.4g}", "p10": "{:.4g}", "p90": "{:.4g}", "unit": "{}"}

SHOWN = {"bytes/s": (1e-9, "GB/s"), "op/s": (1e-9, "Gop/s"), "s": (1e6, "us")}
"""Unit of a rate -> (factor, unit in the table)."""

MOST_VARIED = 1.5
"""A rate whose p90 exceeds its p10 by more than this factor is unreliable."""


def main(argv: Sequence[str] | None = None, prog: str = "python -m launch.plan") -> int:
    """Run the command line; returns the exit code: 0 done, 1 measurement failed, 2 bad usage, 130 interrupted."""
    args = _parser(prog).parse_args(argv)
    from distributed_sparse.tools.planner.plan import plan

    try:
        model, dtype, grid, hardware_of = _prepare(args)
        rows = plan(model, dtype, grid, hardware_of)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    title = f"{args.model}, {str(dtype).removeprefix('torch.')}, {args.gpu}, pages of {grid.page_size}"
    title += ", eager" if grid.enforce_eager else ""
    if args.measure:
        _print_rates(args.devices)
    print(f"{title}: one rank's bytes and one step's times, {'measured rates' if args.measure else 'computed, not measured'}")
    cells = [{name: value(row) for name, (_, value) in COLUMNS.items()} for row in rows]
    print_table(cells, {name: form for name, (form, _) in COLUMNS.items()})
    _print_losses(rows)
    if args.json:
        devices = {size: {name: asdict(device) for name, device in of_size.items()} for size, of_size in args.devices.items()}
        write_json(args.json, "plan", {"model": args.model, "hardware": devices, "grid": asdict(grid)}, rows)
    if args.plot:
        from distributed_sparse.tools.planner.planner_plot import write_plot

        write_plot(args.plot, rows, title)
    return 0


def _prepare(args: argparse.Namespace) -> tuple[ModelConfig, Any, Grid, HardwareOf]:
    from distributed_sparse.model.limits import resolve_dtype
    from distributed_sparse.tools.planner.plan import DEFAULT_RESERVE_BYTES, Grid, sparse_sections

    if args.plot:
        check_plots("--plot needs", "leave --plot out")
    check_choice("gpu", args.gpu, [*PRESETS, MEASURED])
    if args.gpu == MEASURED and not args.measure:
        raise ValueError(f"--gpu {MEASURED} has no data sheet; add --measure, which times this machine")
    if args.gpu != MEASURED and args.measure:
        raise ValueError(f"--measure times this machine's CPUs, no {args.gpu}; leave it out, or plan for --gpu {MEASURED}")
    model = _model(args.model)
    dtype = resolve_dtype(check_dtype("dtype", args.dtype), model.dtype)
    grid = Grid(
        tensor_parallel_sizes=args.tensor_parallel_size,
        contexts=args.context,
        batches=args.batch,
        sparse=list(sparse_sections(args.method, args.set).values()),
        density=args.density,
        page_size=args.page_size,
        gpu_memory_utilization=args.gpu_memory_utilization,
        reserve_bytes=DEFAULT_RESERVE_BYTES if args.reserve is None else args.reserve,
        enforce_eager=args.enforce_eager,
    )
    changes: dict[str, Any] = {
        field: check_float(f"--{name}", value, 0.0, low_excluded=not name.endswith(("latency", "time")), remedy=text)
        for name, (field, text) in OVERRIDES.items()
        if (value := getattr(args, name.replace("-", "_"))) is not None
    }
    args.devices = {}  # tensor_parallel_size -> method -> Hardware

    def hardware_of(ranks: list[RankCostModel]) -> list[Hardware]:
        if args.measure:
            from distributed_sparse.tools.bench.machine_rates import measure_cpu

            found = measure_cpu(ranks, max(grid.contexts), max(grid.batches), args.threads)
        else:
            found = [PRESETS[args.gpu]] * len(ranks)
        devices = [replace(device, **changes, links=_links(device.links, args)) for device in found]
        args.devices[ranks[0].shard.world_size] = {rank.method: device for rank, device in zip(ranks, devices)}
        return devices

    return model, dtype, grid, hardware_of


def _model(given: str) -> ModelConfig:
    """The model of a folder, its config.json or a hub id."""
    from distributed_sparse.model.checkpoint import resolve_checkpoint
    from distributed_sparse.model.config import ModelConfig

    path = Path(given).expanduser()
    if path.is_file():
        if path.name != "config.json":
            raise ValueError(f"--model {given}: is no config.json; give one, the folder that holds it, or a hub id")
        return ModelConfig.from_pretrained(path.parent)
    return ModelConfig.from_pretrained(resolve_checkpoint(given, "dummy"))


def _links(links: Interconnect, args: argparse.Namespace) -> Interconnect:
    """The links with the values from the command line."""
    if args.all_reduce_bandwidth is not None:
        remedy = "give bytes per second that a rank sends in one direction"
        bandwidth = check_float("--all-reduce-bandwidth", args.all_reduce_bandwidth, 0.0, low_excluded=True, remedy=remedy)
        links = replace(links, bandwidth=bandwidth)
    if args.all_reduce_latency is not None:
        latency = check_float("--all-reduce-latency", args.all_reduce_latency, 0.0, remedy="give seconds of a small all-reduce")
        links = replace(links, protocols=(Protocol(latency, 0.0, 1.0),))
    return links


def _print_rates(devices: dict[int, dict[str, Hardware]]) -> None:
    """Print the rates of each tensor_parallel_size, and on stderr those that varied too much to be reliable."""
    found: dict[tuple[int, Rate], None] = {}  # methods share most of their rates
    for world_size, of_size in devices.items():
        found |= {(world_size, rate): None for device in of_size.values() for rate in device.rates}
    lines = []
    for world_size, rate in found:
        factor, unit = SHOWN[rate.unit]
        numbers = {"median": rate.median * factor, "p10": rate.low * factor, "p90": rate.high * factor}
        lines.append({"TP": world_size, "rate": rate.name, "unit": unit, **numbers})
    print("Measured on this machine: median, 10th and 90th percentile, of the slowest rank")
    print_table(lines, RATES)
    print()
    for world_size in devices:
        varied = [rate for size, rate in found if size == world_size and rate.varied > MOST_VARIED]
        if varied:
            names = ", ".join(f"{rate.name} ({rate.varied:.1f}x)" for rate in varied)
            print(
                f"warning: at tensor_parallel_size {world_size}, p90 is more than {MOST_VARIED} times p10 of {names}: "
                "times that follow from them are rough; measure again while nothing else runs",
                file=sys.stderr,
            )


def _print_losses(rows: Sequence[dict[str, Any]]) -> None:
    losses = [row for row in rows if row["pays"] is False]
    if not losses:
        pays = any(row["pays"] for row in rows)
        print(
            "Every sparse method is expected to pay at every point that fits."
            if pays
            else "No point with a sparse method fits."
        )
        return
    print("Where it does not pay (expected TPOT no shorter than dense):")
    for row in losses:
        print(
            f"  {row['method']} at tensor_parallel_size {row['tensor_parallel_size']}, context {row['context']}, "
            f"batch {row['batch']}: {row['tpot_speedup']:.2f}x"
        )


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = command_parser(__doc__, "plan", prog)
    parser.add_argument("--model", required=True, metavar="MODEL", help="a config.json, the folder that holds it, or a hub id")
    parser.add_argument("--gpu", required=True, metavar="NAME", help=f"{', '.join(PRESETS)}; or {MEASURED}, with --measure")
    parser.add_argument(
        "--measure", action="store_true", help=f"time this machine first (--gpu {MEASURED}), at the largest context and batch"
    )
    threads = "torch threads of each rank that is timed (default: its share of the cores)"
    parser.add_argument("--threads", type=_positive, metavar="N", help=threads)
    for name, default, text in (
        ("tensor-parallel-size", (1,), "ranks"),
        ("context", (32768,), "tokens of each sequence, prompt and output together"),
        ("batch", (1,), "sequences that decode at once"),
    ):
        parser.add_argument(f"--{name}", type=_ints, default=default, metavar="N,N", help=f"{text} (default: {default[0]})")
    parser.add_argument(
        "--method",
        type=_names,
        default=("quest",),
        metavar="NAME,NAME",
        help="sparse methods, planned beside dense; an unknown one lists all names (default: quest)",
    )
    parser.add_argument("--set", action="append", default=[], metavar="sparse.KEY=VALUE", help="a key of the methods")
    parser.add_argument(
        "--density",
        type=float,
        metavar="D",
        help="tokens attended / in context, if it depends on the data",
    )
    parser.add_argument("--dtype", default="auto", help="of weights and cache (default: the checkpoint's)")
    parser.add_argument("--page-size", type=int, default=16, metavar="N", help="tokens per page (default: 16)")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9, metavar="SHARE", help="default: 0.9")
    reserve = "bytes beside weights and cache: CUDA context, activations, sampler (default: 2 GiB)"
    parser.add_argument("--reserve", type=int, metavar="BYTES", help=reserve)
    parser.add_argument("--enforce-eager", action="store_true", help="plan an engine without CUDA graphs")
    replaced = parser.add_argument_group("replace numbers of the hardware")
    for name, (_, text) in OVERRIDES.items():
        replaced.add_argument(f"--{name}", type=float, metavar="X", help=text)
    replaced.add_argument("--all-reduce-latency", type=float, metavar="S", help="seconds of a small all-reduce")
    replaced.add_argument("--all-reduce-bandwidth", type=float, metavar="X", help="bytes per second in one direction")
    parser.add_argument("--json", metavar="FILE", help="also write rows and hardware there, in bytes and seconds")
    parser.add_argument("--plot", metavar="FILE.png", help="also plot time per token against the context (needs matplotlib)")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part.strip())


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


_ints.__name__, _names.__name__ = "list of whole numbers", "list of names"  # argparse names them in its errors
