"""Fixtures of all tests."""

from __future__ import annotations

import functools
import os
import tempfile
from collections import defaultdict
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


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "each_value: run cases that hold each value of each parameter once; the rest is slow")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the cases that `each_value` leaves out. Where several processes share the tests, files that start Ray go first."""
    grids: defaultdict[tuple[str, str], list[pytest.Item]] = defaultdict(list)
    for item in items:
        is_of_a_grid = item.get_closest_marker("each_value") or item.location[0].startswith("tests/kernels/")
        if is_of_a_grid and hasattr(item, "callspec") and not item.get_closest_marker("slow"):
            grids[item.nodeid.partition("[")[0], str(item.callspec.params.get("implementation"))].append(item)
    for grid in grids.values():
        for item in beyond_each_value(grid):
            item.add_marker("slow")
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: not starts_ray(item.location[0]))


def beyond_each_value(items: list[pytest.Item]) -> list[pytest.Item]:
    """Those of a test's cases that are not needed to run each value of each of its parameters once."""
    values = {item: {(name, repr(value)) for name, value in item.callspec.params.items()} for item in items}  # type: ignore[attr-defined]
    missing = set().union(*values.values())
    left = list(items)
    while missing:
        best = max(left, key=lambda item: len(values[item] & missing))
        missing -= values[best]
        left.remove(best)
    return left


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
