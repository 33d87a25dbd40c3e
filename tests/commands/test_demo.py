"""The demo runs as a newcomer runs it, from any folder, and shows what Quest finds and the window misses."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distributed_sparse.commands import demo
from distributed_sparse.tools.evaluation.recall_model import ensure_recall_checkpoint
from tests.support.patience import WAIT_S

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.ray
def test_the_table_has_dense_and_quest_right_and_the_window_wrong(ray_environment, tmp_path):
    command = [sys.executable, "-m", "launch.demo", "--context", "2048", "--facts", "128", "--questions", "8", "--no-real"]
    command += ["--set", "tensor_parallel_size=1"]  # the ranks have tests of their own
    checkpoint = tmp_path / "made" / "demo"
    done = subprocess.run(
        [*command, "--set", f"model={checkpoint}"], cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (checkpoint / "model.safetensors").is_file()
    rows = {
        line.split()[0]: line.split()[1:]
        for line in done.stdout.splitlines()
        if line.startswith(("dense ", "quest ", "window "))
    }
    assert rows["dense"][:3] == ["all", "8/8", "1.000"]
    assert rows["quest"][0] == rows["window"][0] == "128"
    assert int(rows["quest"][1].split("/")[0]) >= 7
    assert int(rows["window"][1].split("/")[0]) <= 4
    for method in ("quest", "window"):
        assert 0.05 < float(rows[method][2]) < 0.07  # 128 of 2048 tokens
        assert float(rows[method][3]) > 0.0
    assert re.search(r"quest: (<\w+>){4}  right", done.stdout)
    assert re.search(r"window: .*  wrong", done.stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", "500"], "context_length=500 has no room for 256 facts"),
        (["--questions", "300"], "num_queries=300"),
        (["--context", "9000"], "max_model_len=8192"),
        (["--set", "sparse.budget=3"], "budget"),
        (["--set", "model=other"], "other is not a recall checkpoint"),
    ],
)
def test_what_cannot_work_is_refused_before_an_engine_starts(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "run_method", lambda *_: pytest.fail("an engine was started"))
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    assert demo.main(["--config", str(ROOT / "configs" / "demo.yaml"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_is_made_once_and_again_when_it_is_out_of_date(tmp_path):
    assert ensure_recall_checkpoint(tmp_path)
    assert not ensure_recall_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "recall_version": 0}))
    (tmp_path / "model.safetensors").unlink()
    assert ensure_recall_checkpoint(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
