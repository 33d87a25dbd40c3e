"""lifetime: exit codes, SIGTERM handling and a shared Ray session for commands."""

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
    """Turn SIGTERM (`ray job stop`) into SystemExit, so that the engine shuts down its shards."""

    def end(signum: int, frame: Any) -> None:
        raise SystemExit(TERMINATED)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def show_log() -> None:
    """Log the engine to stderr from INFO on: requested cluster resources, ranks and recoveries."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("distributed_sparse").setLevel(logging.INFO)


@contextmanager
def one_ray(*configs: EngineConfig) -> Iterator[None]:
    """Share one Ray session among the engines made inside. Does nothing if none of them uses Ray."""
    if not any(config.uses_ray for config in configs):
        yield
        return
    from distributed_sparse.ray_backend.session import ensure_ray

    session = ensure_ray(max(config.tensor_parallel_size for config in configs))
    try:
        yield
    finally:
        session.release()
