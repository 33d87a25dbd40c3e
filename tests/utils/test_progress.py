"""Progress: a bar on a terminal, lines elsewhere, and nothing where the work is short."""

from __future__ import annotations

import io
import sys

import pytest

from distributed_sparse.utils.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, updates: int = 3, **options) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(total=4, unit="row", desc="Rows", **options) as bar:
        for number in range(updates):
            bar.set_postfix_str(f"number {number}", refresh=False)
            bar.update()
    return stream.getvalue()


def test_each_update_is_a_line_of_its_own_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, io.StringIO(), line_interval_s=0.0)
    assert "\r" not in text and text.endswith("\n")
    lines = text.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["Rows: 1/4 row", "Rows: 2/4 row", "Rows: 3/4 row"]
    assert [line.rpartition(", ")[2] for line in lines] == ["number 0", "number 1", "number 2"]


def test_lines_keep_their_distance_and_the_last_one_tells_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 1000, 4))  # every look at the clock is 4 s later
    monkeypatch.setattr("tqdm.std.time", lambda: float(next(now)))
    lines = shown(monkeypatch, io.StringIO(), updates=4, line_interval_s=10.0).splitlines()
    assert 1 <= len(lines) < 4 and lines[-1].startswith("Rows: 4/4 row, ")


def test_short_work_prints_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, io.StringIO()) == ""
    assert shown(monkeypatch, io.StringIO(), line_interval_s=0.0, disable=True) == ""


def test_a_terminal_gets_tqdms_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, Terminal(), mininterval=0.0)
    assert "\rRows:  75%|" in text and "3/4" in text
