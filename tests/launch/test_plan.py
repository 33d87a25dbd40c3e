"""`python -m launch.plan`: a table per point, where sparse does not pay, files on request, and errors with a remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distributed_sparse.planner import measure
from launch import plan

MODELS = Path(__file__).resolve().parents[2] / "configs" / "models"
LLAMA = str(MODELS / "llama-3.1-8b")


def run(*arguments: str, model: str = LLAMA, gpu: str = "h100") -> int:
    return plan.main(["--model", model, "--gpu", gpu, *arguments])


def lines(output: str) -> dict[tuple[str, ...], list[str]]:
    """(method, TP, context, batch) -> the cells of a table's line."""
    cells = [line.split() for line in output.splitlines()[2:] if not line.startswith((" ", "Every", "Where"))]
    return {tuple(line[:4]): line[4:] for line in cells} | {
        tuple(line.split()[:4]): line.split()[4:]
        for line in output.splitlines()[2:]
        if line.startswith(" ") and " at " not in line
    }


def test_every_point_has_a_line_beside_dense_and_the_table_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--tensor-parallel-size", "1,8", "--context", "32768", "--batch", "1,64", "--method", "quest,window") == 0
    output = capsys.readouterr().out
    assert "computed, not measured" in output.splitlines()[0]
    table = lines(output)
    assert set(table) == {(m, tp, "32768", b) for m in ("dense", "quest", "window") for tp in "18" for b in ("1", "64")}
    names = [*plan.COLUMNS][4:]
    dense = dict(zip(names, table["dense", "1", "32768", "64"]))
    assert (dense["weights_GB"], dense["KV_GB"], dense["fits"], dense["max_batch"]) == ("15.01", "274.88", "NO", "12")
    assert dict(zip(names, table["dense", "8", "32768", "64"]))["fits"] == "yes"
    assert dict(zip(names, table["dense", "1", "32768", "1"]))["limit"] == "1.00x"


def test_points_where_sparse_does_not_pay_are_marked_and_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--tensor-parallel-size", "8", "--context", "8192,131072", "--batch", "1,8") == 0
    output = capsys.readouterr().out
    marked = [line.split()[:4] for line in output.splitlines() if line.endswith("does not pay")]
    assert ["quest", "8", "8192", "1"] in marked and ["quest", "8", "131072", "8"] not in marked
    listed = output.split("Where it does not pay")[1].splitlines()[1:]
    assert len(listed) == len(marked) and "context 8192, batch 1:" in listed[0]
    assert run("--context", "131072", "--batch", "8") == 0
    assert "expected to pay at every point" in capsys.readouterr().out


def test_what_is_given_replaces_what_the_data_sheet_says(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def rows(*arguments: str) -> tuple[dict, dict]:
        file = tmp_path / "plan.json"
        assert run("--tensor-parallel-size", "2", "--json", str(file), *arguments) == 0
        dense, quest = json.loads(file.read_text())["rows"]
        return dense, quest

    dense, quest = rows()
    slower, _ = rows("--bandwidth", "1e12", "--all-reduce-latency", "1e-3", "--all-reduce-bandwidth", "1e15")
    assert slower["limit_s"] == pytest.approx(dense["limit_s"] * 3.35)
    assert slower["parts_s"]["all_reduce_s"] == pytest.approx(65e-3, rel=1e-3)
    _, wider = rows("--set", "sparse.token_budget=4096", "--set", "sparse.dense_layers=0", "--page-size", "32")
    assert wider["sparse"] == {"method": "quest", "token_budget": 4096, "dense_layers": 0}
    assert wider["kv_bytes_read"] == 4096 * 131072 // 2 and wider["scored_bytes"] == dense["kv_bytes_read"] // 32
    full, _ = rows("--dtype", "float32")
    assert full["weight_bytes_read"] == 2 * dense["weight_bytes_read"]
    assert quest["tpot_speedup"] == pytest.approx(dense["tpot_s"] / quest["tpot_s"])


def test_a_plot_is_written_and_shows_every_method(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    few, more = tmp_path / "few.png", tmp_path / "sub" / "more.png"
    assert run("--context", "8192,32768", "--plot", str(few)) == 0
    assert run("--context", "8192,32768", "--method", "quest,window", "--batch", "1,8", "--plot", str(more)) == 0
    assert few.read_bytes()[:4] == more.read_bytes()[:4] == b"\x89PNG" and more.stat().st_size > few.stat().st_size


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-3.1-70b", "qwen3-32b"])
def test_the_shapes_that_come_along_are_those_of_their_names(name: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert (
        run("--tensor-parallel-size", "8", "--context", "8192", "--json", str(file), model=f"{MODELS}/{name}/config.json") == 0
    )
    held = json.loads(file.read_text())["rows"][0]["memory"]["weight_bytes"] * 8 / 2  # norms are held by every rank
    parameters = {"llama-3.1-8b": 8.03e9, "llama-3.1-70b": 70.55e9, "qwen3-32b": 32.76e9}[name]
    assert held == pytest.approx(parameters, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tensor-parallel-size", "3"], "tensor_parallel_size=3 does not divide num_key_value_heads=8; use 1, 2, 4 or 8"),
        (["--method", "twilight"], "give the density (tokens attended / tokens in context)"),
        (["--method", "quests"], "sparse.method='quests' is not known"),
        (["--set", "sparse.token_budgets=4"], "did you mean 'token_budget'?"),
        (["--set", "page_size=32"], "only keys of `sparse` can be set here"),
        (["--set", "sparse.method=window"], "give it as --method"),
        (["--context", "200000"], "over the 131072 positions"),
        (["--dtype", "int8"], "dtype='int8' is not known"),
        (["--bandwidth", "0"], "--bandwidth=0.0 must be finite, > 0"),
        (["--measure"], "leave it out, or plan for --gpu cpu"),
    ],
)
def test_bad_usage_ends_with_a_remedy(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_gpu_or_model_is_refused_with_what_there_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(gpu="tpu") == 2
    assert (
        "gpu='tpu' is not known; use one of 'h100', 'h200', 'a100', 'l40s', 'b200', 'rtx4090', 'cpu'" in capsys.readouterr().err
    )
    assert run(gpu="cpu") == 2
    assert "add --measure" in capsys.readouterr().err
    other = tmp_path / "shape.json"
    other.write_text("{}")
    assert run(model=str(other)) == 2
    assert "is no config.json" in capsys.readouterr().err


def test_a_machine_that_was_measured_is_planned_with_what_was_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = measure.Found(1e10, 0.5, 1e12, 0.25, [(0.25, 0.25), (0.2, 0.1)], 1e-5, 1e-3, 5e-3)
    asked = []

    def measured(ranks, context, batch, num_threads):
        asked.append((len(ranks), context, batch, num_threads))
        return measure._as_hardware([found] * ranks[0].shard.world_size, ranks, batch)

    monkeypatch.setattr(measure, "measure_cpu", measured)
    assert run("--measure", "--tensor-parallel-size", "1,2", "--batch", "1,4", "--threads", "2", gpu="cpu") == 0
    assert asked == [(2, 32768, 4, 2)] * 2
    output = capsys.readouterr().out
    assert "measured rates" in output.splitlines()[0]
    cells = dict(zip([*plan.COLUMNS][4:], lines(output)["dense", "1", "32768", "1"]))
    assert float(cells["limit_ms"]) == pytest.approx((15.01 + 4.295) / 10 * 1e3, rel=1e-3)
    with_two = dict(zip([*plan.COLUMNS][4:], lines(output)["dense", "2", "32768", "4"]))
    assert float(with_two["reduce_ms"]) == pytest.approx(65, rel=1e-2), "65 all-reduces of the measured message"
