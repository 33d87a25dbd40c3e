"""Fixtures of all tests."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.support.interpreter import INTERPRETED, sum_dots_in_order

if INTERPRETED:
    sum_dots_in_order()

ROOT = Path(__file__).resolve().parents[1]

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@functools.cache
def starts_ray(file: str) -> bool:
    """Whether a test file, a path below the repository's root, holds tests that are marked `ray`."""
    return "mark.ray" in (ROOT / file).read_text(encoding="utf-8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several processes share the tests, the files that start Ray go first."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: not starts_ray(item.location[0]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests stay in one process, so that its fixtures are made once, and so do all files that start Ray."""
    from xdist.scheduler import LoadFileScheduling

    class OneRay(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "ray" if starts_ray(file) else file

    return OneRay(config, log)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch with one thread, as equal bits are promised on CPU: `pytestmark = pytest.mark.usefixtures("one_thread")`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def ray_environment() -> Iterator[Path]:
    """A private folder for Ray, and a private token, so that no test touches the user's own Ray or `~/.ray`.

    Not below pytest's folder: Ray's sockets live in it, and a socket's path has at most 107 bytes.
    """
    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        token = Path(folder) / "token"
        token.write_text("token-of-the-tests-0123456789abcdef")
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TMPDIR", folder)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield Path(folder)


@pytest.fixture(scope="session")
def local_ray(ray_environment: Path) -> Iterator[None]:
    """A local Ray with 6 logical CPUs, for the tests marked `ray`."""
    import ray

    ray.init(
        address="local",
        num_cpus=6,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=100 * 1024 * 1024,
        _temp_dir=str(ray_environment),
        log_to_driver=True,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}},
    )
    yield
    ray.shutdown()
