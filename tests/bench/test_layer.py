"""The layer benchmark times every method on data that it has checked, and says what a step is made of."""

from __future__ import annotations

import pytest
import torch

from distributed_sparse.bench.layer import PARTS, LayerSettings, bench_layer
from launch import bench

SMALL = LayerSettings(context=8192, num_heads=8, num_kv_heads=2, head_dim=64, token_budget=512, caches=2, repeats=2)


def test_every_method_is_timed_beside_sdpa_with_its_bytes_and_its_parts() -> None:
    rows = {row["method"]: row for row in bench_layer(SMALL)}
    assert list(rows) == ["sdpa", "dense", "quest", "twilight", "vattention", "window"]
    kv_bytes = 2 * 8192 * 2 * 64 * 4
    for name, row in rows.items():
        assert row["ms"] > 0 and row["bytes_ms"] == pytest.approx(row["MB"] / row["read_bandwidth_GB_per_s"])
        if name != "sdpa":
            assert tuple(row["parts_ms"]) == PARTS and row["parts_ms"]["append"] > 0 and row["parts_ms"]["attend"] > 0
    assert rows["sdpa"]["MB"] == rows["dense"]["MB"] == pytest.approx(kv_bytes / 1e6)
    assert rows["quest"]["density"] == rows["window"]["density"] == 512 / 8192
    assert rows["quest"]["MB"] == pytest.approx(kv_bytes * (1 / 16 + 1 / 16) / 1e6)
    assert rows["twilight"]["parts_ms"]["estimate"] > 0 and rows["twilight"]["parts_ms"]["prune"] > 0
    assert rows["vattention"]["parts_ms"]["sample"] > 0 and 0 < rows["vattention"]["density"] < 1


def test_the_command_prints_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    small = {"context": 2048, "num-heads": 4, "num-kv-heads": 2, "head-dim": 64, "token-budget": 512, "caches": 1, "repeats": 1}
    bench.main(["layer", "--threads", "1", *(f"--{name}={value}" for name, value in small.items())])
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "speedup_over_sdpa" in printed and "bytes_ms" in printed
    assert "append  score  top_k  estimate  prune  sample  attend" in " ".join(printed.split()).replace(" ", "  ")
