"""Soak test: random requests under random faults, on a temporary cluster on this machine; prints a table.

    python -m launch.chaos --minutes 2
    python -m launch.chaos --minutes 30 --faults kill,stop --set sparse='{method: vattention, epsilon: 0.3}' --output FILE

Requests are first answered without faults. Then clients repeat them while shards are killed and stopped and nodes are removed;
every answer must be the same. Exit code 1 if a request is lost or differs, or if pages or processes leak.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import secrets
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distributed_sparse.commands.demo import CONFIG, ROOT
from distributed_sparse.commands.lifetime import FAILED, TERMINATED, USAGE
from distributed_sparse.commands.parser import command_parser
from distributed_sparse.config import EngineConfig
from distributed_sparse.tools.chaos.faults import KINDS, parse_kinds
from distributed_sparse.tools.chaos.processes import DRIVER, MARK, SHARD, left_after
from distributed_sparse.tools.chaos.soak import Soak, SoakOptions
from distributed_sparse.tools.chaos.soak_report import SoakReport, as_dict, as_text, verdict
from distributed_sparse.tools.common.results import plain
from distributed_sparse.tools.evaluation.recall_model import ensure_recall_checkpoint

SIGNALS = (signal.SIGINT, signal.SIGTERM)
UNLIMITED_REBUILDS = 1_000_000
STORE_BYTES = 80 << 20
"""Object store of each node."""
SPARE_NODES = 1
"""Nodes in addition to one per rank; the rank of a lost node moves there before another node is added."""
LEAVE_TIMEOUT_S = 20.0
"""Time for processes to end after a shutdown."""
KILL_TIMEOUT_S = 10.0
HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 250,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}
"""Ray's settings with which it detects a lost node in about one second instead of ten."""


def main(argv: Sequence[str] | None = None, prog: str = "python -m launch.chaos") -> int:
    """Run the command line; return 0 (passed), 1 (failed), 2 (bad usage), 130 or 143 (interrupted)."""
    args = _parser(prog).parse_args(argv)
    try:
        config = EngineConfig.from_yaml(args.config, args.set)
        kinds = parse_kinds(args.faults)
        options = SoakOptions(args.minutes, args.seed, kinds, args.clients, args.requests)
        if config.tensor_parallel_size < 2:
            raise ValueError(f"tensor_parallel_size={config.tensor_parallel_size} has no shard actors; give 2 or more")
        config.resolve_sparse()
        config = dataclasses.replace(
            config,
            model=str(ROOT / config.model),
            distributed_executor_backend="ray",
            max_rebuilds=UNLIMITED_REBUILDS,
        )
        ensure_recall_checkpoint(config.model)
        if args.output:
            Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    report = SoakReport(settings=dataclasses.asdict(options) | {"sparse": config.sparse}, kinds=kinds)
    status = _run(config, options, report)
    print(as_text(report))
    if args.output:
        text = json.dumps(plain(as_dict(report), digits=None), indent=2, allow_nan=False)
        Path(args.output).write_text(text + "\n", encoding="utf-8")
    return status or (FAILED if verdict(report) else 0)


def _run(config: EngineConfig, options: SoakOptions, report: SoakReport) -> int:
    """Run the soak and fill the report; return 0, or 130 or 143 if interrupted. Kills all of its processes in any case."""
    received: list[int] = []
    with _own_ray() as mark:
        try:
            with _interruptible(received):
                _soak(config, options, report, mark)
        except (KeyboardInterrupt, SystemExit):
            assert received
        except Exception as error:  # also raised by the shutdown of an interrupted soak; the table is printed in any case
            traceback.print_exc()
            report.engine_error = f"{type(error).__name__}: {error}"
        left = left_after(mark, LEAVE_TIMEOUT_S)
        report.leaked_processes = [*(report.leaked_processes or ()), *left.values()]
    report.interrupted = bool(received)
    return 128 + received[0] if received else 0


def _soak(config: EngineConfig, options: SoakOptions, report: SoakReport, mark: str) -> None:
    """Run on a temporary cluster. Leaked processes are counted before the cluster shuts down, which would end them too."""
    import ray
    from ray.util.placement_group import placement_group_table

    from distributed_sparse import LLM

    out = sys.stdout
    # Ray prints many lines for each lost node and process; keep them out of stdout
    with contextlib.redirect_stdout(sys.stderr), LocalCluster(config.tensor_parallel_size + SPARE_NODES) as cluster:
        try:
            with LLM.from_config(config) as llm:
                Soak(llm, cluster, mark, options, report, lambda line: print(line, file=out, flush=True)).run()
        finally:
            left = [*left_after(mark, LEAVE_TIMEOUT_S, (SHARD, DRIVER)).values()]
            if ray.is_initialized():
                left += [f"placement group {p['name']}" for p in placement_group_table().values() if p["state"] != "REMOVED"]
            report.leaked_processes = left


class LocalCluster:
    """A Ray cluster on this machine: a head without CPUs for the Driver, and nodes of one CPU for a rank each.

    Each node and its processes are pinned to one of the machine's cores, as if on a machine of their own.
    """

    def __init__(self, num_nodes: int) -> None:
        import ray
        from ray.cluster_utils import Cluster

        self._cores = sorted(os.sched_getaffinity(0))
        self._core_of: dict[str, int] = {}
        with _own_handlers():
            self._cluster = Cluster(
                initialize_head=True,
                head_node_args={
                    "num_cpus": 0,
                    "include_dashboard": False,
                    "object_store_memory": STORE_BYTES,
                    "_system_config": HEALTH_CHECKS,
                },
            )
        try:
            # before other nodes exist: this process must connect to the head, which is never removed
            with _own_handlers():
                ray.init(address=self._cluster.address, log_to_driver=False, logging_level=logging.ERROR)
            for _ in range(num_nodes):
                self.add()
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        ray.shutdown()
        self._cluster.shutdown()

    def add(self) -> None:
        """Add a node of one CPU on the core with the fewest nodes."""
        used = list(self._core_of.values())
        core = min(self._cores, key=used.count)
        os.sched_setaffinity(0, [core])
        try:
            with _own_handlers():
                node = self._cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        finally:
            os.sched_setaffinity(0, self._cores)
        self._core_of[node.node_id] = core

    def remove(self, node_id: str) -> None:
        """Kill a node without notice."""
        (node,) = [node for node in self._cluster.worker_nodes if node.node_id == node_id]
        del self._core_of[node_id]
        self._cluster.remove_node(node, allow_graceful=False)


@contextlib.contextmanager
def _own_ray() -> Iterator[str]:
    """Set environment variables that isolate Ray from the user's Ray and `~/.ray`; yield the mark of its processes."""
    before, mark = dict(os.environ), secrets.token_hex(8)
    # not below TMPDIR, which may be long: paths of its sockets have at most 107 bytes
    with tempfile.TemporaryDirectory(prefix="soak-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        token = Path(folder) / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        os.environ.pop("RAY_ADDRESS", None)
        os.environ |= {
            MARK: mark,
            "RAY_TMPDIR": folder,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        try:
            yield mark
        finally:
            left_after(mark, KILL_TIMEOUT_S, kill=True)
            os.environ.clear()
            os.environ.update(before)


@contextlib.contextmanager
def _interruptible(received: list[int]) -> Iterator[None]:
    """The first SIGINT or SIGTERM raises an exception in the block; later ones are ignored, so that cleanup completes.

    Args:
        received: the signal's number is appended.
    """

    def end(signum: int, frame: Any) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        received.append(signum)
        print("ending", file=sys.stderr, flush=True)
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(TERMINATED)

    with _own_handlers():
        for number in SIGNALS:
            signal.signal(number, end)
        yield


@contextlib.contextmanager
def _own_handlers() -> Iterator[None]:
    """Restore the signal handlers after the block. Ray replaces them; its SIGTERM handler would exit before the table."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parser(prog: str) -> argparse.ArgumentParser:
    faults = "\nfaults:\n" + "\n".join(f"  {kind:<10}{text}" for kind, text in KINDS.items())
    parser = command_parser(__doc__, "chaos", prog, faults)
    default = SoakOptions()
    parser.add_argument("--config", type=Path, default=CONFIG, metavar="YAML")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of --config")
    parser.add_argument("--minutes", type=float, default=default.minutes, help="duration of the load (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=default.seed, help="chooses requests, faults and their times")
    parser.add_argument("--faults", default=",".join(KINDS), metavar="KIND,KIND", help="default: %(default)s")
    parser.add_argument("--clients", type=int, default=default.clients, help="concurrent clients (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=default.requests, help="different requests (default: %(default)s)")
    parser.add_argument("--output", metavar="FILE", help="also write the report as JSON")
    return parser
