"""lifetime: how a launcher ends: its exit codes, SIGTERM as an orderly end, and one Ray for several engines."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from distributed_sparse.config import EngineConfig

FAILED, USAGE, INTERRUPTED, TERMINATED = 1, 2, 128 + signal.SIGINT, 128 + signal.SIGTERM


@contextmanager
def ends_on_sigterm() -> Iterator[None]:
    """SIGTERM unwinds through the engine, so that no shard is left behind (`ray job stop`)."""

    def end(signum: int, frame: Any) -> None:
        raise SystemExit(TERMINATED)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def show_log() -> None:
    """The engine's log on stderr, from INFO on: what it asks a cluster for, its ranks, its recoveries."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("distributed_sparse").setLevel(logging.INFO)


@contextmanager
def one_ray(*configs: EngineConfig) -> Iterator[None]:
    """One Ray for the engines that are made inside; nothing where each has one rank, which needs none."""
    if not any(_uses_ray(config) for config in configs):
        yield
        return
    from distributed_sparse.ray_backend.session import ensure_ray

    session = ensure_ray(max(config.tensor_parallel_size for config in configs))
    try:
        yield
    finally:
        session.release()


def _uses_ray(config: EngineConfig) -> bool:
    backend = config.distributed_executor_backend
    return backend == "ray" or (backend == "auto" and config.tensor_parallel_size > 1)
