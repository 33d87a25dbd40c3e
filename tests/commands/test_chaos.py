"""python -m launch.chaos: what is wrong is said at once; the exit code is the verdict's; an interrupted one leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distributed_sparse.commands import chaos
from distributed_sparse.tools.chaos.faults import Fault
from distributed_sparse.tools.chaos.outcome import COMPLETED, LOST, Outcome
from distributed_sparse.tools.chaos.processes import MARK, left_after
from distributed_sparse.tools.chaos.soak_report import SoakReport
from tests.support.patience import WAIT_S

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--faults", "kill,quake"], "names quake; choose from kill,kill_all,stop,node"),
        (["--minutes", "0"], "--minutes 0.0 must be above 0"),
        (["--set", "tensor_parallel_size=1"], "tensor_parallel_size=1 has no shard actors"),
        (["--set", "sparse.budget=3"], "budget"),
        (["--config", "absent.yaml"], "absent.yaml: cannot be read"),
    ],
)
def test_what_cannot_work_is_refused_before_a_cluster_starts(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chaos, "_run", lambda *_: pytest.fail("a cluster was started"))
    assert chaos.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({}, 0, 0),
        ({"outcomes": [Outcome(COMPLETED), Outcome(LOST)]}, 0, 1),
        ({"outcomes": [Outcome(COMPLETED, differs=True)]}, 0, 1),
        ({"leaked_pages": 1}, 0, 1),
        ({"leaked_processes": ["ray::ShardActor"]}, 0, 1),
        ({"faults": []}, 0, 1),
        ({"interrupted": True}, 143, 143),
    ],
)
def test_the_exit_code_is_the_verdicts_and_the_json_says_the_same(
    change: dict[str, Any],
    status: int,
    code: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good = {
        "outcomes": [Outcome(COMPLETED)],
        "faults": [Fault("kill", 1.0, False, "pid 1")],
        "leaked_pages": 0,
        "leaked_processes": [],
    }

    def run(config: Any, options: Any, report: SoakReport) -> int:
        assert config.max_rebuilds > 1000 and config.distributed_executor_backend == "ray"
        for name, value in (good | change).items():
            setattr(report, name, value)
        return status

    monkeypatch.setattr(chaos, "_run", run)
    monkeypatch.setattr(chaos, "ROOT", tmp_path)
    file = tmp_path / "made" / "soak.json"
    config = str(ROOT / "configs" / "demo.yaml")
    assert chaos.main(["--config", config, "--faults", "kill", "--output", str(file)]) == code
    found = json.loads(file.read_text())
    assert bool(found["verdict"]) is (code == 1)
    assert ("FAILED" in capsys.readouterr().out) is (code == 1)
    assert (tmp_path / "checkpoints" / "demo" / "model.safetensors").is_file()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_soak_prints_its_table_and_leaves_nothing(number: int, code: int) -> None:
    command = [sys.executable, "-u", "-m", "launch.chaos", "--minutes", "5", "--requests", "3", "--faults", "kill"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as soak:
        assert soak.stdout is not None
        first = next(line for line in soak.stdout if "kill: pid" in line)
        mark = mark_of_child(soak.pid)
        soak.send_signal(number)
        said = soak.stdout.read()
    assert soak.returncode == code, said
    assert "interrupted; nothing lost, nothing different, nothing left behind" in said, first + said
    assert "| kill | 1 |" in said
    assert left_after(mark, timeout=0.0) == {}


def mark_of_child(pid: int) -> str:
    """The mark that the processes of a soak carry, read from one that it has started."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                    variables = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                except OSError:
                    continue
                if parent == str(pid):
                    for variable in variables:
                        if variable.startswith(f"{MARK}="):
                            return variable.partition("=")[2]
        time.sleep(0.1)
    raise AssertionError("the soak has started no process")
