"""python -m launch.bench: every subcommand prints a table, writes JSON and a picture, and its exit code says what happened."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distributed_sparse.client.client import EngineError
from distributed_sparse.commands import bench
from distributed_sparse.tools.bench import bench_plots as plots
from distributed_sparse.tools.bench import step
from distributed_sparse.tools.bench.contestants import Engine
from distributed_sparse.tools.bench.ops.attention import AttendDense
from tests.support.bench_models import tiny_shape

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS = ["--num-heads=4", "--num-kv-heads=2", "--head-dim=64", "--token-budget=256", "--caches=1", "--repeats=1", "--threads=1"]
KERNELS = ["kernels", *HEADS, "--context=512,1024", "--batch=1", "--prefill-tokens=64"]
SERVE = [
    "serve",
    "--num-prompts=3",
    "--random-input-len=40",
    "--random-output-len=4",
    "--request-rate=100,inf",
    "--method=dense",
]


def decode_command(model: Path) -> list[str]:
    return ["decode", f"--model={model}", "--context=1200", "--output-len=6", "--rounds=1", "--warm-up-s=0", "--threads=1"]


def run(arguments: list[str], folder: Path) -> tuple[int, dict[str, Any]]:
    code = bench.main([*arguments, f"--json={folder / 'out.json'}", f"--plot={folder / 'out.png'}"])
    result = json.loads((folder / "out.json").read_text())
    assert (folder / "out.png").read_bytes()[:4] == b"\x89PNG"
    for name in ("command", "commit", "cpu", "cores", "versions"):
        assert name in result["environment"]
    return code, result


def test_kernels_prints_every_op_and_why_peers_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result = run([*KERNELS, "--ops=attend dense,rms_norm"], tmp_path)
    assert code == 0 and result["benchmark"] == "kernels" and result["settings"]["dtype"] == "float32"
    measured = [(row["op"], row["implementation"], row.get("context")) for row in result["rows"] if "ms" in row]
    assert measured[:3] == [("attend dense", "cpu", 512), ("attend dense", "sdpa", 512), ("rms_norm", "cpu", None)]
    printed = capsys.readouterr().out
    assert "measured copy bandwidth" in printed and "bandwidth_share" in printed
    assert (
        "unavailable: attend dense flashinfer context=1024 batch=1 page_size=16: flashinfer has no kernels for cpu" in printed
    )


def test_a_wrong_kernel_is_named_its_speed_is_not_printed_and_the_exit_code_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(AttendDense, "kernel", staticmethod(lambda q, **_: torch.randn_like(q)))
    assert bench.main([*KERNELS, "--ops=attend dense,rms_norm", "--context=512"]) == 1
    printed = capsys.readouterr().out
    assert "wrong: attend dense cpu context=512 batch=1 page_size=16: attend dense: RMS error" in printed
    assert [line.split()[0] for line in printed.splitlines() if "1.00x" in line] == ["rms_norm"]


@pytest.mark.slow
def test_layer_takes_lists_of_contexts_and_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result = run(["layer", *HEADS, "--context=512,1024", "--batch=1"], tmp_path)
    assert code == 0 and [row["context"] for row in result["rows"] if row["method"] == "dense"] == [512, 1024]
    assert capsys.readouterr().out.count("speedup_over_sdpa") == 2


def test_layer_says_what_does_not_fit_and_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from distributed_sparse.tools.bench import layer

    right = layer.bench_layer

    def bench_layer(settings: layer.LayerSettings) -> Any:
        if settings.context == 1024:
            raise torch.OutOfMemoryError("out of GPU memory")
        return right(settings)

    monkeypatch.setattr(layer, "bench_layer", bench_layer)
    assert bench.main(["layer", *HEADS, "--context=1024,512"]) == 0
    printed = capsys.readouterr().out
    assert "context 1024" in printed and "unavailable: out of memory: out of GPU memory" in printed
    assert "speedup_over_sdpa" in printed


def test_a_wrong_layer_has_no_speed_and_is_written_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from distributed_sparse.tools.bench import layer

    right = layer.attend_selection
    monkeypatch.setattr(layer, "attend_selection", lambda *arguments: right(*arguments) * 1.1)
    code, result = run(["layer", *HEADS, "--context=2048"], tmp_path)
    assert code == 1 and [row["method"] for row in result["rows"] if "ms" in row] == ["sdpa"]
    printed = capsys.readouterr().out
    assert "wrong: dense: DensePolicy: RMS error" in printed and "The parts of a step" not in printed


def test_an_engine_that_fails_is_told_the_others_are_written_and_the_exit_code_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = Engine.open

    def fails(self: Engine) -> None:
        if self.name == "quest":
            raise EngineError("rank 0 ended")
        right(self)

    monkeypatch.setattr(Engine, "open", fails)
    code, result = run([*decode_command(tiny_shape(tmp_path / "model")), "--peer=none"], tmp_path)
    assert code == 1 and [row["contestant"] for row in result["rows"] if "tpot_ms" in row] == ["dense"]
    printed = capsys.readouterr().out
    assert "wrong: quest tensor_parallel_size=1 context=1200 batch=1: quest failed: EngineError: rank 0 ended" in printed


def test_a_peer_that_does_not_start_is_left_out_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def llm(**options: Any) -> None:
        raise RuntimeError("Engine core initialization failed.\nSee the log.")

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=llm, SamplingParams=SimpleNamespace))
    code, result = run([*decode_command(tiny_shape(tmp_path / "model")), "--peer=vllm", "--method=dense"], tmp_path)
    assert code == 0 and [row["contestant"] for row in result["rows"] if "tpot_ms" in row] == ["dense"]
    [line] = [line for line in capsys.readouterr().out.splitlines() if "vllm" in line]
    assert line.endswith("vllm failed: RuntimeError: Engine core initialization failed.")


def test_decode_prints_both_tables_and_what_was_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*decode_command(tiny_shape(tmp_path / "model")), "--set=sparse.token_budget=256", "--ttft=64"]
    code, result = run(command, tmp_path)
    assert code == 0 and (tmp_path / "out-ttft.png").exists()
    assert [row["contestant"] for row in result["rows"] if "tpot_ms" in row] == [
        "dense", "quest", "transformers static", "transformers dynamic",
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert "caches filled with random keys and values, no prompt computed" in printed
    assert "Compared before: log-probabilities of a short sequence with transformers' (dense, quest)" in printed
    assert "over_transformers" in printed and "Time to first token" in printed


def test_decode_without_peers(tmp_path: Path) -> None:
    code, result = run([*decode_command(tiny_shape(tmp_path / "model")), "--peer=none", "--method=dense"], tmp_path)
    assert code == 0 and [row["contestant"] for row in result["rows"]] == ["dense"]
    assert "short sequence" in result["rows"][0]["checked"], "compared with transformers all the same"


def test_step_tells_of_an_engine_that_fails_and_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(settings: step.StepSettings) -> dict[str, Any]:
        raise EngineError("rank 1 has died")

    monkeypatch.setattr(step, "bench_step", fail)
    assert bench.main(["step"]) == 1
    assert "wrong: decode: the engine failed: rank 1 has died" in capsys.readouterr().out


def test_step_prints_its_medians(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result = run(["step", "--tensor-parallel-size=1", "--tokens=12", "--batch=2"], tmp_path)
    assert code == 0 and result["rows"][0]["step_p50"] > 0
    assert "overhead_p50" in capsys.readouterr().out


def test_serve_prints_throughput_and_latencies_by_vllm_s_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result = run([*SERVE, f"--model={tiny_shape(tmp_path / 'model')}"], tmp_path)
    assert code == 0 and [row["request_rate"] for row in result["rows"]] == [100.0, "inf"]
    assert result["settings"]["request_rate"] == ["100.0", "inf"], "JSON knows no infinity"
    printed = capsys.readouterr().out
    for name in (
        "request_throughput",
        "output_throughput",
        "total_token_throughput",
        "median_ttft_ms",
        "p99_itl_ms",
        "mean_e2el_ms",
    ):
        assert name in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["kernels", "--ops=attned"], "--ops='attned' is not known; use one of 'rms_norm'"),
        (["decode", "--peer=tensorrt"], "--peer='tensorrt' is not known"),
        (["decode", "--model=no/such/model/anywhere"], "no/such/model/anywhere"),
        (["decode", "--context=1000", "--model=no/such/model/anywhere"], "--context 1000 is too short for --output-len 16"),
        (["decode", "--method=quset", "--context=1200"], "sparse.method='quset' is not known"),
        (["layer", "--num-heads=6", "--num-kv-heads=4"], "--num-heads 6 is no multiple of --num-kv-heads 4"),
        (["layer", "--token-budget=16"], "sparse.token_budget=16 is below the 3 forced pages"),
        (["serve", "--set=dtype=float16"], "only keys of `sparse` can be set"),
    ],
)
def test_bad_usage_is_said_by_name(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_numbers_below_one_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["kernels", "--context=0"])
    assert "has a number that is not above 0" in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert bench.main([*KERNELS, "--plot=out.png"]) == 2
    assert "--plot needs matplotlib, which is not installed; run pip install -e '.[eval]'" in capsys.readouterr().err


def test_nothing_measured_is_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing was measured, so there is nothing to draw"):
        plots.write_plot(tmp_path / "out.png", "kernels", [{"op": "attend dense", "unavailable": "out of memory"}], "kernels")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_script_that_measures_everything_says_only_what_the_command_line_takes(device: str, tmp_path: Path) -> None:
    """Its commands are recorded instead of run; each is parsed. A part that fails keeps no other from being measured."""
    (recorder := tmp_path / "python").write_text('#!/bin/bash\nprintf "%s\\n" "$*" >> "$RECORDED"\n[ "$3" != layer ]\n')
    recorder.chmod(0o755)
    told = {"BENCH_PYTHON": str(recorder), "RECORDED": str(tmp_path / "recorded"), "NAME": "here", "PATH": os.environ["PATH"]}
    script = Path(__file__).resolve().parents[2] / "launch" / "bench.sh"
    ended = subprocess.run(["bash", str(script), device], env=told, capture_output=True, text=True)
    assert ended.returncode == 1, ended.stderr  # layer's
    lines = [line.split() for line in (tmp_path / "recorded").read_text().splitlines()]
    commands = [line[2:] for line in lines if line[:2] == ["-m", "launch.bench"]]
    assert {command[0] for command in commands} == {
        "kernels",
        "layer",
        "decode",
        "serve",
        *(["step"] if device == "cpu" else []),
    }
    files = []
    for command in commands:
        given = bench.parse(command)
        assert given["device"] == device
        files.append(given["json"])
    assert len(set(files)) == len(files) and all("here" in Path(file).name for file in files)
    assert subprocess.run(["bash", str(script), "tpu"], env=told, capture_output=True).returncode == 2
    assert subprocess.run(["bash", str(script), device, "nothing"], env=told, capture_output=True).returncode == 2
