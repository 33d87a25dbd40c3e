"""`python -m launch.plan`: a table per point, where sparse does not pay, files on request, and errors with a remedy."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from distributed_sparse.commands import plan
from distributed_sparse.tools.bench import machine_rates as measure
from distributed_sparse.tools.planner.hardware import Hardware, Rate
from distributed_sparse.tools.planner.rank import RankCostModel

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
    assert run("--context", "131072", "--batch", "1") == 0
    assert "expected to pay at every point that fits" in capsys.readouterr().out


def test_nothing_is_said_of_whether_points_pay_that_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--context", "131072", "--batch", "8") == 0  # 137 GB of cache on a GPU of 80
    output = capsys.readouterr().out
    assert [line.endswith("does not fit") for line in output.splitlines() if line.split()[0] in ("dense", "quest")] == [
        True
    ] * 2
    assert "No point with a sparse method fits." in output


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
    assert (dense["captured"], quest["captured"]) == (True, True) and quest["launches"] == dense["launches"] + 30 * 3 + 1
    eager, _ = rows("--enforce-eager", "--kernel-latency", "1e-5")
    assert not eager["captured"] and eager["parts_s"]["kernels_s"] == pytest.approx(1e-5 * dense["launches"])
    tight, _ = rows("--graph-gap-time", "0", "--graph-launch-time", "1e-3", "--kernel-latency", "1e-5")
    assert tight["parts_s"]["kernels_s"] == pytest.approx(1e-3)
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


def rate(name: str, median: float, unit: str = "bytes/s", varied: float = 1.2) -> Rate:
    return Rate(name, unit, median, median / varied**0.5, median * varied**0.5)


def machine(world_size: int, operations_varied: float) -> measure.Found:
    """What a rank found of dense and two more methods; the last one's choosing and attending cannot be told apart."""
    dense, together = rate("dense: attention", 2.5e9), rate("window: attention", 2e9)
    reduces = (rate("all-reduce of 8 bytes", 1e-3, "s"), rate("all-reduce of 9 bytes", 5e-3, "s"))
    return measure.Found(
        reading=rate("reading", 1e10),
        matrices=rate("matrices, reading", 5e9),
        operations=rate("matrices, computing", 1e12, "op/s", operations_varied),
        dense=dense,
        methods=[(dense, dense), (rate("quest: attention", 2e9), rate("quest: scoring", 1e9)), (together, together)],
        kernel=rate("a kernel beside its bytes", 1e-5, "s"),
        all_reduces=reduces if world_size > 1 else None,
    )


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int | None, ...]]:
    """What `measure_cpu` was asked for: (methods, context, batch, threads). Operations of two ranks vary by 1.8."""
    calls: list[tuple[int | None, ...]] = []

    def measured(ranks: list[RankCostModel], context: int, batch: int, num_threads: int | None) -> list[Hardware]:
        calls.append((len(ranks), context, batch, num_threads))
        world_size = ranks[0].shard.world_size
        return measure._as_hardware([machine(world_size, 1.8 if world_size == 2 else 1.2)] * world_size, ranks, batch)

    monkeypatch.setattr(measure, "measure_cpu", measured)
    return calls


MEASURE = ("--measure", "--tensor-parallel-size", "1,2", "--batch", "1,4", "--threads", "2")


def test_a_machine_that_was_measured_is_planned_with_what_was_found(
    capsys: pytest.CaptureFixture[str], asked: list[tuple[int | None, ...]]
) -> None:
    assert run(*MEASURE, gpu="cpu") == 0
    assert asked == [(2, 32768, 4, 2)] * 2
    _, output = capsys.readouterr().out.split("\n\n")  # its rates stand above
    assert "measured rates" in output.splitlines()[0]
    table = lines(output)
    cells = dict(zip([*plan.COLUMNS][4:], table["dense", "1", "32768", "1"]))
    assert float(cells["limit_ms"]) == pytest.approx((15.01 + 4.295) / 10 * 1e3, rel=1e-3)
    with_two = dict(zip([*plan.COLUMNS][4:], table["dense", "2", "32768", "4"]))
    assert float(with_two["reduce_ms"]) == pytest.approx(65, rel=1e-2), "65 all-reduces of the measured message"


def test_every_measured_rate_is_shown_with_its_spread_and_one_that_varied_is_warned_of(
    capsys: pytest.CaptureFixture[str], asked: list[tuple[int | None, ...]]
) -> None:
    assert run(*MEASURE, gpu="cpu") == 0
    captured = capsys.readouterr()
    rates = [line.split() for line in captured.out.split("\n\n")[0].splitlines()[2:]]
    assert [line[0] for line in rates] == ["1"] * 7 + ["2"] * 9, "all-reduces of two ranks alone, and no rate twice"
    assert ["2", "reading", "10", "9.129", "10.95", "GB/s"] in rates
    assert ["1", "matrices,", "computing", "1000", "912.9", "1095", "Gop/s"] in rates
    assert ["2", "all-reduce", "of", "8", "bytes", "1000", "912.9", "1095", "us"] in rates
    (warning,) = captured.err.splitlines()
    assert "at tensor_parallel_size 2, p90 is more than 1.5 times p10 of matrices, computing (1.8x): " in warning


def test_the_file_keeps_what_was_measured_of_each_method(tmp_path: Path, asked: list[tuple[int | None, ...]]) -> None:
    file = tmp_path / "plan.json"
    assert run(*MEASURE, "--method", "quest,window", "--json", str(file), gpu="cpu") == 0
    hardware = json.loads(file.read_text())["settings"]["hardware"]
    assert {size: [*of_size] for size, of_size in hardware.items()} == {size: ["dense", "quest", "window"] for size in "12"}
    shares = [hardware["2"][name]["select_share"] for name in ("dense", "quest", "window")]
    assert shares == pytest.approx([0.25, 0.1, 0.2])
    assert any(
        each["name"] == "quest: scoring" and each["low"] < 1e9 < each["high"] for each in hardware["2"]["quest"]["rates"]
    )


def test_a_plot_without_matplotlib_is_refused_with_an_option_that_there_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run("--plot", "plan.png") == 2
    assert "pip install -e '.[eval]', or leave --plot out" in capsys.readouterr().err
