"""The summary and the plots show what was measured, and what failed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distributed_sparse.tools.scaling.checks import Checks, Outcome, check_points
from distributed_sparse.tools.scaling.grid import ScalingConfig
from distributed_sparse.tools.scaling.scaling_plots import write_plots
from distributed_sparse.tools.scaling.scaling_summary import speed_ups, split_ms, summary
from tests.support.scaling_records import reference_record, scaling_record

IDENTITY = {"commit": None, "sources": "def", "cores": 2, "cpu": "a cpu", "gpu": None, "versions": {"torch": "2.13"}}


def tried(**grid: Any) -> list[Any]:
    given = {"base": {"model": "m"}, "workload": {"input_len": 64, "output_len": 8}, "grid": grid}
    points = ScalingConfig.from_dict(given, "a.yaml").points
    return [(point, scaling_record(point.engine.tensor_parallel_size)) for point in points]


def test_speed_up_is_of_tpot_against_the_fewest_ranks_and_a_lone_point_has_none() -> None:
    found = tried(tensor_parallel_size=[1, 2, 4], batch=[1])
    found[1][1]["tpot_ms"] = {"median": 2.5}
    assert [speed_ups(found)[point.key] for point, _ in found] == [(1.0, 1.0), (1.6, 0.8), (4.0, 1.0)]
    assert speed_ups(tried(batch=[1])) == {}


def test_a_step_is_split_into_parts_that_add_up_and_unknown_ones_stay_unknown() -> None:
    record = scaling_record()
    split = split_ms(record)
    assert split == {"driver": 0.3, "shard": 4.0, "select": 0.5, "attend": 1.0, "all_reduce": 0.25, "other": 2.25}
    del record["time_ms"]["shard"]
    assert split_ms(record)["other"] is None


def test_the_rest_is_that_of_the_steps_that_were_timed_and_not_of_faster_ones_that_were_not() -> None:
    found = tried(batch=[1, 2])
    found[0][1]["time_ms"]["attend"] = 3.2  # with the others more than the median step of 3.9
    del found[1][1]["time_ms"]["shard"]
    text = summary(IDENTITY, found, [])
    assert "| 1 | 3.90 | 0.30 | 4.00 | 0.50 | 3.20 | 0.25 | 0.05 |" in text
    assert "| 2 | 3.90 | 0.30 | - | - | - | - | - |" in text


def test_what_each_rank_read_is_shown_for_each_of_them() -> None:
    text = summary(IDENTITY, tried(tensor_parallel_size=[2]), [])
    assert "read: cache, each rank" in text and "| 0.500 1.000 | 35 |" in text


def test_the_summary_names_the_code_and_a_check_that_had_nothing_to_compare() -> None:
    found = tried(batch=[1])
    text = summary(IDENTITY, found, [Outcome("density", "batch=1", None)])
    assert "commit unknown, sources def; 2 cores" in text and "- density: nothing to compare" in text


def test_the_summary_names_the_points_that_failed_and_every_failure_of_a_check() -> None:
    found = tried(batch=[1, 2])
    found[0] = (found[0][0], {"error": "EngineError: shard 1 died", "left_behind": []})
    found[1][1]["pages_used_at_end"] = 4
    outcomes = check_points([(point.label, point.group, record) for point, record in found], Checks())
    text = summary(IDENTITY, found, outcomes)
    assert "- batch=1: EngineError: shard 1 died" in text
    assert "- leaks: holds for 1 of 2 points\n  - FAILED, batch=2: 4 pages were in use" in text
    assert "| 2 | 20.00 / 20.00 / 21.00 | 4.00 / 4.00 / 5.00 |" in text


def test_plots_are_written_of_what_the_points_allow(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = tried(
        tensor_parallel_size=[1, 2],
        context=[64, 128],
        sparse=["dense", {"method": "quest", "token_budget": 32, "recent_pages": 1}],
    )
    assert [path.name for path in write_plots(tmp_path, found)] == ["speed-up.png", "tpot.png", "split.png"]
    assert all(path.stat().st_size > 1000 for path in tmp_path.iterdir())
    (lone,) = tried(batch=[1])
    del lone[1]["time_ms"]["shard"]
    assert write_plots(tmp_path, [lone]) == []


def test_a_reference_is_shown_like_any_point() -> None:
    found = tried(tensor_parallel_size=[1])
    assert "## Times" in summary(IDENTITY, [(found[0][0], reference_record([[1.0]]))], [])
