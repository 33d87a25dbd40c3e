"""Compare sparse methods with dense attention and with controls of equal density on a task suite.

    python -m launch.evaluate recall --config configs/demo.yaml --methods quest,twilight --budgets 64,128 --output DIR

Writes results.jsonl, report.md and PNG plots. Repeat an interrupted command to continue it; runs of other methods and budgets
are added to the directory's results.
"""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from distributed_sparse.commands.lifetime import FAILED, INTERRUPTED, USAGE, ends_on_sigterm, one_ray
from distributed_sparse.commands.parser import command_parser
from distributed_sparse.config import load_run_config
from distributed_sparse.tools.evaluation.suites import SUITES

if TYPE_CHECKING:  # modules that import torch are imported when needed, so that --help is fast
    from distributed_sparse.tools.common.results import Results
    from distributed_sparse.tools.evaluation.run_suite import Evaluation


def main(argv: Sequence[str] | None = None, prog: str = "python -m launch.evaluate") -> int:
    """Run the command line; return 0 (done), 1 (an engine failed), 2 (bad usage) or 130 (interrupted; repeat to continue)."""
    args = _parser(prog, sys.argv[1:] if argv is None else argv).parse_args(argv)
    from distributed_sparse.tools.common.results import Results

    try:
        evaluation = _prepare(args)
        results = Results(args.output, evaluation.configuration())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    with results:
        try:
            with one_ray(evaluation.config), ends_on_sigterm():  # in this order: starting Ray replaces the SIGTERM handler
                evaluation.run(results)
        except KeyboardInterrupt:
            print(f"interrupted; repeat the command to continue from {args.output}", file=sys.stderr)
            return INTERRUPTED
        except (ValueError, RuntimeError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return FAILED
        _write(args, evaluation, results)
    return 0


def _prepare(args: argparse.Namespace) -> Evaluation:
    """Make the evaluation; check all arguments before any engine is made."""
    from distributed_sparse.tools.common.figures import check_plots
    from distributed_sparse.tools.evaluation.methods import parse_methods
    from distributed_sparse.tools.evaluation.run_suite import Evaluation, RunOptions

    if not args.no_plots:
        check_plots()
    config, _ = load_run_config(args.config, args.set)
    kind = SUITES[args.suite]
    suite = kind(**_given(args, kind))
    own = [config.sparse["method"]] if config.sparse and "method" in config.sparse else []
    texts = args.methods or list(suite.default_methods) or own
    if not texts:
        raise ValueError("--methods is missing, and the configuration has no sparse method; write --methods quest,twilight")
    methods = parse_methods(texts, args.budgets, args.sweep, (config.sparse or {}) | suite.forced)
    return Evaluation(config, suite, methods, RunOptions(**_given(args, RunOptions)))


def _write(args: argparse.Namespace, evaluation: Evaluation, results: Results) -> None:
    """Write the report, plots and `layers:` overrides; print the report."""
    from distributed_sparse.selection.base import SparseConfig
    from distributed_sparse.tools.evaluation.evaluation_plots import write_plots
    from distributed_sparse.tools.evaluation.evaluation_report import report
    from distributed_sparse.tools.evaluation.profile_report import layer_budgets, tokens_needed, write_layers

    records, suite = list(results.records.values()), evaluation.suite
    text = report(evaluation.configuration(), suite, evaluation.methods, records)
    written = [results.directory / "report.md"]
    written[0].write_text(text, encoding="utf-8")
    if not args.no_plots:
        written += write_plots(results.directory, suite, evaluation.methods, records, evaluation.config.page_size)
    layers_file = getattr(args, "write_layers", None)
    if layers_file:
        group = list(evaluation.groups)[-1]  # the last length given
        needed = tokens_needed(records, group)
        assert needed is not None, "a profile always traces the dense run"
        sparse = evaluation.config.sparse or {}
        dense_layers, sinks, recent = (
            sparse.get(key, getattr(SparseConfig, key)) for key in ("dense_layers", "sink_pages", "recent_pages")
        )
        overrides = layer_budgets(needed, evaluation.config.page_size, dense_layers, sinks + recent)
        write_layers(layers_file, overrides, group)
        written.append(Path(layers_file))
    print(text)
    print("Written: " + ", ".join(map(str, written)))


# ---- the command line


def _parser(prog: str, argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = command_parser(__doc__, "evaluate", prog)
    suites = parser.add_subparsers(dest="suite", required=True, metavar="SUITE")
    for name, suite in SUITES.items():
        own = suites.add_parser(name, help=(suite.__doc__ or "").partition("\n")[0])
        own.add_argument("--config", required=True, metavar="YAML", help="the engine, as for launch.generate")
        own.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of --config")
        own.add_argument(
            "--methods", nargs="+", default=[], metavar="METHOD",
            help="names (quest,twilight) or YAML objects ('{method: vattention, epsilon: 0.05}'); "
            f"default: {' '.join(suite.default_methods) or 'that of the configuration'}",
        )  # fmt: skip
        own.add_argument(
            "--budgets", type=_listed(int), default=(), metavar="N,N", help="a run for each, of methods with a token_budget"
        )
        own.add_argument(
            "--sweep", action="append", default=[], metavar="METHOD.KEY=V,V", help="a run for each value: twilight.p=0.85,0.95"
        )
        own.add_argument("--output", required=True, metavar="DIR", help="results of one configuration")
        own.add_argument("--no-plots", action="store_true", help="do not write plots, which need matplotlib")
        if suite.traces_only:
            own.add_argument(
                "--write-layers", metavar="FILE", help="write `layers:` overrides: tokens for .95 of each layer's mass"
            )
        _add_fields(own.add_argument_group("suite"), suite)
        if name in argv[:1]:
            from distributed_sparse.tools.evaluation.run_suite import RunOptions  # imports torch

            _add_fields(own.add_argument_group("run"), RunOptions)
    return parser


def _add_fields(group: Any, kind: type) -> None:
    """Add one option for each field of a dataclass, with its type, default and help (see `Suite`)."""
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        hint, text, *nargs = get_args(hints[field.name])
        name, default = f"--{field.name.replace('_', '-')}", field.default
        if get_origin(hint) in (Union, types.UnionType):  # `int` of `int | None`
            hint = next(part for part in get_args(hint) if part is not type(None))
        if hint is bool:
            group.add_argument(name, action=argparse.BooleanOptionalAction, default=None, help=text)
            continue
        text = (text if default in (None, "", ()) else f"{text} (default: {_shown(default)})").replace("%", "%%")
        if nargs:
            group.add_argument(name, nargs=nargs[0], default=None, metavar="FILE", help=text)
        elif get_origin(hint) is tuple:
            group.add_argument(name, type=_listed(get_args(hint)[0]), default=None, metavar="A,B", help=text)
        else:
            group.add_argument(name, type=hint, default=None, metavar=hint.__name__.upper(), help=text)


def _shown(default: Any) -> str:
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _listed(of: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    def parse(text: str) -> tuple[Any, ...]:
        return tuple(of(part.strip()) for part in text.split(",") if part.strip())

    parse.__name__ = f"list of {getattr(of, '__name__', 'values')}"  # shown in argparse's errors
    return parse


def _given(args: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The fields of `kind` given on the command line."""
    found = {field.name: getattr(args, field.name) for field in fields(kind)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items() if value is not None}
