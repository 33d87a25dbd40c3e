"""RaySession: RAY_ADDRESS in all its forms is understood or refused within seconds, by name, as a ValueError."""

from __future__ import annotations

import logging
import os
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from distributed_sparse.commands.lifetime import one_ray
from distributed_sparse.config import EngineConfig
from tests.support.patience import WAIT_S

ROOT = Path(__file__).resolve().parents[2]
MALFORMED = {
    "host": "is not host:port",
    "host:": "is not host:port",
    ":6379": "is not host:port",
    "127.0.0.1": "is not host:port",
    "127.0.0.1:6379/": "is not host:port",
    "127.0.0.1:6379/path": "is not host:port",
    "127.0.0.1:six": "is not host:port",
    "127.0.0.1:0": "is not host:port",
    "127.0.0.1:-1": "is not host:port",
    "127.0.0.1:65536": "is not host:port .*out of range",
    "127.0.0.1: 6379": "is not host:port",
    "127.0.0.1:6379,127.0.0.1:6380": "is not host:port",
    "user@127.0.0.1:6379": "is not host:port",
    "::1:6379": "is not host:port",
    "[::1]": "is not host:port",
    "[::1:6379": "is not host:port",
    "http://127.0.0.1:8265": "is not host:port",
    "ray://127.0.0.1:10001": "is an address for Ray Client.*ray job submit",
    "AUTO": "is not host:port",
}
UNREACHABLE = ["127.0.0.1:9", " 127.0.0.1:9\n", "localhost:9", "[::1]:9", "no-such-host.invalid:6379"]


@pytest.fixture(autouse=True)
def no_cluster(ray_environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nobody has started a Ray."""
    from ray._private import services  # Ray reads its environment when it is imported: not before `ray_environment`

    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(services, "find_gcs_addresses", frozenset)


def find_cluster() -> str | None:
    from distributed_sparse.ray_backend import session as ray_session

    return ray_session.find_cluster()


@pytest.mark.parametrize("address", [*MALFORMED, *(f"{address} " for address in ("host", "ray://127.0.0.1:10001"))])
def test_a_malformed_address_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    said = MALFORMED[address.strip()]
    with pytest.raises(ValueError, match=f"^RAY_ADDRESS={re.escape(repr(address.strip()))} {said}.*host:port"):
        find_cluster()


@pytest.mark.parametrize("address", UNREACHABLE)
def test_an_address_at_which_nobody_answers_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # the tests' own Ray may run in this process
    said = f"^RAY_ADDRESS={re.escape(repr(address.strip()))} cannot be reached .*start that cluster, or unset RAY_ADDRESS"
    for use in (find_cluster, lambda: one_ray(EngineConfig(model="model", tensor_parallel_size=2)).__enter__()):
        with pytest.raises(ValueError, match=said):
            use()


def test_auto_without_a_cluster_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto\n")
    with pytest.raises(ValueError, match=r"^RAY_ADDRESS='auto' cannot be reached .*start that cluster, or unset RAY_ADDRESS"):
        find_cluster()


def test_auto_that_finds_a_cluster_which_is_gone_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    left_behind(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(ValueError, match=r"^RAY_ADDRESS='auto' cannot be reached"):
        find_cluster()


@pytest.mark.parametrize("address", [None, "", " \n", "local", " local "])
def test_without_a_cluster_a_local_ray_is_started(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert find_cluster() is None
    assert os.environ.get("RAY_ADDRESS", "") == (address or "").strip(), "Ray reads the variable, too"


def left_behind(folder: Path) -> None:
    """What `ray start` writes down, of a cluster that is gone."""
    (folder / "ray").mkdir()
    (folder / "ray" / "ray_current_cluster").write_text("127.0.0.1:9")


def test_a_cluster_that_ray_start_left_behind_is_said_and_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left_behind(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert find_cluster() is None
    assert "does not answer; starting a local one" in caplog.text


def test_a_server_that_says_nothing_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distributed_sparse.ray_backend.session.REACH_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(ValueError, match="cannot be reached"):
            find_cluster()


def test_a_server_of_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The port of the dashboard, for instance."""
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.server_port}")
        with pytest.raises(ValueError, match="cannot be reached"):
            find_cluster()
        server.shutdown()


@pytest.mark.ray
def test_a_cluster_is_found_by_its_address_whatever_blanks_are_around_it(
    local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    port = address.rpartition(":")[2]
    for given in (address, f" {address}\n", f"localhost:{port}"):
        monkeypatch.setenv("RAY_ADDRESS", given)
        assert find_cluster() == address


@pytest.mark.ray
def test_a_process_that_is_connected_already_needs_no_address(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed_sparse.ray_backend.session import ensure_ray

    for address in ("127.0.0.1:9", "nonsense"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        session = ensure_ray(2)
        assert not session.own
        session.release()


def test_a_launch_command_says_it_in_one_line(tmp_path: Path) -> None:
    from tests.support.checkpoints import tiny_checkpoint

    path = tiny_checkpoint(tmp_path / "model")
    (tmp_path / "run.yaml").write_text(f"model: {path}\ntensor_parallel_size: 2\ndevice: cpu\n")
    done = subprocess.run(
        [sys.executable, "-m", "launch.generate", "--config", str(tmp_path / "run.yaml"), "--prompt", "x"],
        cwd=ROOT, env=os.environ | {"RAY_ADDRESS": "head:6379/"}, capture_output=True, text=True, timeout=WAIT_S,
    )  # fmt: skip
    assert done.returncode == 2
    *_, last = done.stderr.splitlines()
    assert last.startswith("error: RAY_ADDRESS='head:6379/' is not host:port")
