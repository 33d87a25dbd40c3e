"""Measure a grid of settings, each in its own engine: latencies, rates, bytes; and check the results.

    python -m launch.scale --config configs/scaling/cpu.yaml --output results/scaling-cpu

Writes results.jsonl, summary.md and PNG plots. The same command continues after an interruption and retries failed points; a
grid with other points adds to the results.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from distributed_sparse.commands.lifetime import FAILED, INTERRUPTED, USAGE, ends_on_sigterm, one_ray, show_log
from distributed_sparse.commands.parser import command_parser


def main(argv: Sequence[str] | None = None, prog: str = "python -m launch.scale") -> int:
    """Run the command line; returns the exit code: 0 done, 1 failed point or check, 2 bad usage, 130 SIGINT, 143 SIGTERM."""
    args = _parser(prog).parse_args(argv)
    from distributed_sparse.tools.common.figures import check_plots
    from distributed_sparse.tools.common.results import Results
    from distributed_sparse.tools.scaling.grid import ScalingConfig
    from distributed_sparse.tools.scaling.run_grid import Scaling, identity
    from distributed_sparse.tools.scaling.scaling_plots import write_plots
    from distributed_sparse.tools.scaling.scaling_summary import summary

    common = identity()
    try:
        if not args.no_plots:
            check_plots()
        scaling = Scaling(ScalingConfig.from_yaml(args.config, args.set))
        results = Results(args.output, common)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    show_log()
    with results:
        try:
            with one_ray(*scaling.engines), ends_on_sigterm():  # in this order: Ray sets a handler of its own
                scaling.run(results)
        except KeyboardInterrupt:
            print(f"interrupted; the same command continues from {args.output}", file=sys.stderr)
            return INTERRUPTED
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return FAILED
        tried, outcomes = scaling.records(results), scaling.outcomes(results)
        text = summary(common, tried, outcomes)
        written = [results.directory / "summary.md"]
        written[0].write_text(text, encoding="utf-8")
        if not args.no_plots:
            written += write_plots(results.directory, tried)
    print(text)
    print("Written: " + ", ".join(map(str, written)))
    failed = any("error" in record for _, record in tried) or any(outcome.failures for outcome in outcomes)
    return FAILED if failed else 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = command_parser(__doc__, "scale", prog)
    parser.add_argument("--config", required=True, metavar="YAML", help="base, workload, grid, exclude and checks")
    parser.add_argument("--output", required=True, metavar="DIR", help="results of one version of the code on one machine")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key: workload.seed=1")
    parser.add_argument("--no-plots", action="store_true", help="write no plots (without matplotlib)")
    return parser
