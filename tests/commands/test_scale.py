"""launch.scale: the repository's CPU grid, cut to seconds, through the real command line; and its exit codes."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from distributed_sparse.commands.lifetime import FAILED, USAGE
from distributed_sparse.commands.scale import main

ROOT = Path(__file__).resolve().parents[2]
CUT = [
    "workload.output_len=5",
    "grid.context=[96]",
    "grid.sparse=[{method: quest, token_budget: 48}]",
    "base.kv_cache_memory_bytes=33554432",
]


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # the configuration's paths start there


def scale(output: Path, *overrides: str) -> int:
    given = [argument for override in (*CUT, *overrides) for argument in ("--set", override)]
    return main(["--config", "configs/scaling/cpu.yaml", "--output", str(output), *given])


@pytest.mark.ray
@pytest.mark.slow
def test_the_cpu_grid_runs_over_one_and_two_ranks_and_all_its_checks_hold(tmp_path: Path, local_ray: None) -> None:
    pytest.importorskip("matplotlib")
    assert scale(tmp_path) == 0
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [record["point"]["tensor_parallel_size"] for record in records] == ["1", "2"]
    text = (tmp_path / "summary.md").read_text()
    for check in ("weight_bytes", "cache_bytes", "all_reduce", "density", "leaks", "tokens"):
        assert f"- {check}: holds for 2 of 2 points" in text
    assert (tmp_path / "speed-up.png").stat().st_size > 1000
    before = (tmp_path / "results.jsonl").read_bytes()
    assert scale(tmp_path) == 0
    assert (tmp_path / "results.jsonl").read_bytes() == before  # finished points are not run again


def test_a_failed_point_is_exit_code_1_and_the_rest_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = ["grid.tensor_parallel_size=[1]", "grid.sparse=[dense]", "grid.nodes=[1, 2]", "workload.output_len=2"]
    logger = logging.getLogger("distributed_sparse")
    before = logger.level
    try:
        assert scale(tmp_path, *cut) == FAILED
        assert logger.level == logging.INFO  # what an engine asks a cluster for, and its ranks, are told while it runs
    finally:
        logger.setLevel(before)
    out = capsys.readouterr().out
    assert "nodes=2: RuntimeError: the ranks are on 1 nodes" in out and "- leaks: holds for 2 of 2 points" in out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grid.contxt=[1]", "unknown key 'contxt'; did you mean 'context'"),
        ("base.dtype=int8", "dtype='int8' is not known"),
        ("grid.tensor_parallel_size=[3]", "does not divide num_key_value_heads=8"),
    ],
)
def test_bad_usage_is_exit_code_2_before_anything_is_run(
    override: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scale(tmp_path / "out", override) == USAGE
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_directory_of_another_kind_or_commit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "configuration.json").write_text('{"kind": "scaling", "commit": "0000"}')
    assert scale(tmp_path) == USAGE
    assert "holds results of commit='0000'" in capsys.readouterr().err
