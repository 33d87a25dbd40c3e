"""`ray job submit` of launch.generate, as the README has it: what is uploaded, that it runs there, and what it gives."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distributed_sparse import LLM, SamplingParams
from distributed_sparse.tools.evaluation.recall import make_prompts
from distributed_sparse.tools.evaluation.recall_model import ensure_recall_checkpoint
from distributed_sparse.tools.evaluation.recall_vocabulary import detokenize
from tests.support.patience import WAIT_S
from tests.support.ray_processes import assert_no_processes, own_ray, ray_processes
from tests.support.text_checkpoint import text_checkpoint

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "max_model_len": 256,
    "max_num_seqs": 4,
    "sparse": {"method": "quest", "token_budget": 48, "recent_pages": 1, "dense_layers": 1},
}
SAMPLING: dict[str, Any] = {"temperature": 0.0, "max_tokens": 20, "ignore_eos": True}
SEEDED: dict[str, Any] = {"temperature": 0.9, "seed": 5}
PROMPT = "the quick brown fox"
UPLOAD_LIMIT = 10 << 20
"""Bytes; the repository's own files are about one MiB."""


@pytest.fixture(scope="module")
def head(ray_environment: Path) -> Iterator[dict[str, str]]:
    """A head whose Python is that of the tests."""
    with started_head(ray_environment, Path(sys.executable).parent) as environment:
        yield environment


@contextlib.contextmanager
def started_head(ray_environment: Path, binaries: Path) -> Iterator[dict[str, str]]:
    """A head with a dashboard, as `ray start` leaves it; the environment of those who talk to it, RAY_API_SERVER_ADDRESS in it.

    `ray start` must not be undone by `ray stop`, which would end every Ray of this machine.

    Args:
        binaries: the folder of the head's `python` and `ray`.
    """
    port, dashboard_port = free_ports(2)
    address = f"http://127.0.0.1:{dashboard_port}"
    with own_ray(ray_environment) as environment:
        # a job's `python` is the first on the PATH that the head was started with
        environment["PATH"] = f"{binaries}:{environment['PATH']}"
        environment["RAY_API_SERVER_ADDRESS"] = address
        for name in ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX"):
            environment.pop(name, None)
        command = [str(binaries / "ray"), "start", "--head", f"--port={port}", "--num-cpus=2", "--num-gpus=0"]
        command += ["--include-dashboard=true", f"--dashboard-port={dashboard_port}", "--dashboard-agent-listen-port=0"]
        command += ["--object-store-memory=100000000", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S)
        assert done.returncode == 0, done.stdout + done.stderr
        wait_for(f"{address}/api/version")
        yield environment
    assert_no_processes(environment["RAY_TMPDIR"])


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, none of those (10002 to 19999) that Ray gives to its workers."""
    found: list[int] = []
    with_sockets: list[socket.socket] = []
    try:
        while len(found) < count:
            with_sockets.append(socket.create_server(("127.0.0.1", 0)))
            port = with_sockets[-1].getsockname()[1]
            if not 10002 <= port <= 19999:
                found.append(port)
    finally:
        for opened in with_sockets:
            opened.close()
    return found


def wait_for(url: str, timeout: float = WAIT_S) -> None:
    """Until something answers there; a refusal for want of a token is an answer."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            urllib.request.urlopen(url, timeout=WAIT_S).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            assert time.monotonic() < deadline, f"nobody answers at {url}"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_checkpoint(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def config(path: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run's YAML; JSON is YAML too."""
    file = tmp_path_factory.mktemp("config") / "run.yaml"
    run = {"model": str(path), "tensor_parallel_size": 2, **SETTINGS, "sampling": SAMPLING}
    file.write_text(json.dumps(run), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def expected(path: Path) -> list[Any]:
    """What the Python API gives for PROMPT: greedy, and seeded."""
    with LLM(str(path), **SETTINGS) as llm:
        params = [SamplingParams(**SAMPLING), SamplingParams(**{**SAMPLING, **SEEDED})]
        return [output.outputs[0] for output in llm.generate([PROMPT] * 2, params, use_tqdm=False)]


def submit(
    environment: dict[str, str], *arguments: str, options: tuple[str, ...] = (), timeout: float = WAIT_S
) -> subprocess.CompletedProcess[str]:
    """The README's command: from the repository's root, its files uploaded. `options`: of `ray job submit`."""
    command = [RAY, "job", "submit", "--address", environment["RAY_API_SERVER_ADDRESS"], "--working-dir", ".", *options]
    command += ["--", "python", "-m", "launch.generate", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.mark.slow
def test_a_submitted_job_gives_the_tokens_of_the_python_api(
    head: dict[str, str], config: str, expected: list[Any], tmp_path: Path
) -> None:
    rows, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given = [{"prompt": PROMPT}, {"prompt": PROMPT, "sampling_params": SEEDED}]
    rows.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    done = submit(head, "--config", config, "--prompts-file", str(rows), "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    written = [json.loads(line)["outputs"][0] for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["token_ids"] for row in written] == [completion.token_ids for completion in expected]
    assert [row["text"] for row in written] == [completion.text for completion in expected]

    (copy,) = Path(head["RAY_TMPDIR"]).glob("ray/session_2*/runtime_resources/working_dir_files/_ray_pkg_*/")
    # modules are compiled beside the file that they are imported from: the client's, the driver's and the shards' alike
    for module in ("llm", "driver/service", "shard/shard", "kernels/attend/attend"):
        compiled = copy.glob(f"distributed_sparse/{Path(module).parent}/__pycache__/{Path(module).name}.*.pyc")
        assert list(compiled), f"{module} was not imported from the upload"
    files = [file for file in copy.rglob("*") if file.is_file()]
    assert not {file.relative_to(copy).parts[0] for file in files} & {".venv", ".git", "checkpoints", ".mypy_cache"}
    assert sum(file.stat().st_size for file in files) < UPLOAD_LIMIT


@pytest.mark.slow
def test_a_job_of_the_demos_configuration_answers_in_its_log(head: dict[str, str], tmp_path: Path) -> None:
    """The demo's checkpoint is not uploaded: the job is given its absolute path, as launch/cluster.md has it."""
    checkpoint = tmp_path / "checkpoints" / "demo"
    assert ensure_recall_checkpoint(checkpoint)
    (prompt,) = make_prompts(16, 512, 1, seed=0, answer_length=4)
    asked = ("--set", f"model={checkpoint}", "--prompt", detokenize(prompt.token_ids[1:]))  # the tokenizer adds BOS itself
    done = submit(head, "--config", "configs/demo.yaml", *asked)
    assert done.returncode == 0, done.stdout + done.stderr
    assert detokenize(prompt.answer_ids) in done.stdout.splitlines()


@pytest.mark.slow  # minutes: the job's own environment gets torch and all the rest
def test_a_cluster_that_has_ray_alone_installs_the_package_from_the_upload(
    ray_environment: Path, config: str, expected: list[Any], tmp_path: Path
) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "bare")], check=True)
    pip = [str(tmp_path / "bare" / "bin" / "pip"), "install", "--quiet", "-c", str(ROOT / "constraints.txt"), "ray[default]"]
    subprocess.run(pip, check=True, timeout=600)
    with started_head(ray_environment, tmp_path / "bare" / "bin") as environment:
        options = ("--runtime-env", "launch/runtime-env.yaml")
        done = submit(environment, "--config", config, "--prompt", PROMPT, options=options, timeout=1200.0)
        assert done.returncode == 0, done.stdout + done.stderr
        assert expected[0].text in done.stdout


@pytest.mark.slow
def test_a_job_that_is_stopped_leaves_no_shard_and_no_placement_group(
    head: dict[str, str], config: str, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    endless = [{"prompt": PROMPT, "sampling_params": {"max_tokens": 200, "ignore_eos": True}}] * 2000
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in endless), encoding="utf-8")
    job = f"stopped-{uuid.uuid4().hex}"
    rows = ("--prompts-file", str(tmp_path / "in.jsonl"), "--output", str(output))
    done = submit(head, "--config", config, *rows, options=("--no-wait", "--submission-id", job))
    assert done.returncode == 0, done.stdout + done.stderr
    deadline = time.monotonic() + WAIT_S
    while not (output.exists() and output.stat().st_size):  # it decodes
        assert time.monotonic() < deadline, "the job has answered nothing"
        time.sleep(0.2)
    stop = [RAY, "job", "stop", "--address", head["RAY_API_SERVER_ADDRESS"], job]
    done = subprocess.run(stop, cwd=ROOT, env=head, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "was stopped" in done.stdout + done.stderr
    deadline = time.monotonic() + WAIT_S
    while left := [
        command for command in ray_processes(head["RAY_TMPDIR"]).values() if "Actor" in command or "launch." in command
    ]:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.2)
    state = subprocess.run(
        [RAY, "list", "placement-groups", "--address", head["RAY_API_SERVER_ADDRESS"], "--format", "json"],
        cwd=ROOT, env=head, capture_output=True, text=True, timeout=WAIT_S,
    )  # fmt: skip
    assert state.returncode == 0, state.stdout + state.stderr
    assert all(group["state"] == "REMOVED" for group in json.loads(state.stdout))
