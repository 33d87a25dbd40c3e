"""A results directory keeps every finished unit, whatever ends the process, and takes no other configuration's."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest

from distributed_sparse.tools.common.results import Results, plain

CONFIGURATION = {"suite": "recall", "engine": {"model": "a", "page_size": 16}}


def test_units_are_there_again_when_the_directory_is_opened_again(tmp_path: Path) -> None:
    with Results(tmp_path / "new" / "dir", CONFIGURATION) as results:
        results.append({"key": "a", "value": 1})
        assert (tmp_path / "new/dir/results.jsonl").read_text().count("\n") == 1  # at once, not when it is closed
        results.append({"key": "b", "value": [1.5, math.nan, math.inf]})
    with Results(tmp_path / "new" / "dir", CONFIGURATION) as again:
        assert "a" in again and "c" not in again
        assert list(again.records.values()) == [{"key": "a", "value": 1}, {"key": "b", "value": [1.5, None, None]}]


def test_half_a_line_at_the_end_is_dropped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Results(tmp_path, CONFIGURATION) as results:
        results.append({"key": "a"})
    path = tmp_path / "results.jsonl"
    path.write_text(path.read_text() + '{"key": "b", "val')
    with caplog.at_level(logging.WARNING), Results(tmp_path, CONFIGURATION) as results:
        assert list(results.records) == ["a"]
        results.append({"key": "c"})
    assert "ends in half a line" in caplog.text
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "c"]


def test_a_broken_line_within_the_file_is_an_error(tmp_path: Path) -> None:
    with Results(tmp_path, CONFIGURATION) as results:
        results.append({"key": "a"})
    path = tmp_path / "results.jsonl"
    path.write_text("{broken\n" + path.read_text())
    with pytest.raises(ValueError, match=r"results.jsonl, line 1 is not JSON"):
        Results(tmp_path, CONFIGURATION)


def test_another_configuration_is_refused_by_name(tmp_path: Path) -> None:
    Results(tmp_path, CONFIGURATION).close()
    other = {"suite": "recall", "engine": {"model": "a", "page_size": 32}}
    with pytest.raises(ValueError, match=r"holds results of engine.page_size=16, and this run has engine.page_size=32"):
        Results(tmp_path, other)


def test_results_of_an_unknown_origin_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"has a results.jsonl but no configuration.json"):
        Results(tmp_path, CONFIGURATION)


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with Results(tmp_path, CONFIGURATION), pytest.raises(ValueError, match="is in use by another run"):
        Results(tmp_path, CONFIGURATION)
    Results(tmp_path, CONFIGURATION).close()


def test_references_are_kept_bit_for_bit(tmp_path: Path) -> None:
    array = np.array([[0.1, -np.inf]], dtype=np.float32)
    with Results(tmp_path, CONFIGURATION) as results:
        assert results.reference("a") is None
        results.save_reference("a", array)
    with Results(tmp_path, CONFIGURATION) as results:
        kept = results.reference("a")
        assert kept is not None and kept.dtype == np.float32 and np.array_equal(kept, array)


def test_plain_values_are_json() -> None:
    given = {"a": np.array([1.0, np.nan]), "b": (np.int64(3), np.float32(0.1)), 4: True, "c": 1 / 3}
    assert plain(given) == {"a": [1.0, None], "b": [3, 0.1], "4": True, "c": 0.333333}
