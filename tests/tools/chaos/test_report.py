"""A soak's table and verdict: anything lost, different, or left behind fails it, and so does what was not tried."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from distributed_sparse.tools.chaos.faults import Fault
from distributed_sparse.tools.chaos.outcome import ABORTED, COMPLETED, LOST, Outcome
from distributed_sparse.tools.chaos.soak_report import SoakReport, as_dict, as_text, fault_times, verdict

KINDS = ("kill", "stop")
FAULTS = [
    Fault("kill", 100.0, False, "pid 1"),
    Fault("kill", 101.0, True, "pid 2"),
    Fault("stop", 200.0, False, "pid 3"),
    Fault("kill", 300.0, False, "pid 4"),
    Fault("kill", 306.0, True, "pid 5"),
]


def recovery(noticed: float, rebuild_s: float | None, replay_s: float | None, tokens: int = 10) -> dict[str, Any]:
    return {"noticed": noticed, "rebuild_s": rebuild_s, "replay_s": replay_s, "replayed_tokens": tokens, "cause": "?"}


RECOVERIES = [recovery(100.5, 4.0, 1.0), recovery(205.0, 6.0, 2.0), recovery(300.25, 5.0, None), recovery(306.5, 5.0, 0.5)]
GOOD = SoakReport(
    settings={"seed": 3},
    kinds=KINDS,
    undisturbed=4,
    seconds=90.0,
    outcomes=[Outcome(COMPLETED, tokens=20), Outcome(ABORTED, tokens=3)],
    faults=FAULTS,
    recoveries=RECOVERIES,
    leaked_pages=0,
    leaked_processes=[],
)


def test_detection_is_from_the_fault_and_recovery_from_the_notice_to_the_end_of_the_replay() -> None:
    kill, stop, every = fault_times(FAULTS, RECOVERIES, KINDS)
    assert (kill.kind, kill.injected, kill.during_recovery) == ("kill", 4, 2)
    assert kill.detect == [0.5, 0.25]
    # the second one's replay was cut off by a failure whose recovery ended at 312
    assert kill.recover == [5.0, 11.75]
    assert (stop.injected, stop.detect, stop.recover) == (1, [5.0], [8.0])
    assert (every.kind, every.injected, every.detect) == ("all", 5, [0.5, 5.0, 0.25])


def test_a_fault_that_was_not_noticed_and_a_recovery_that_did_not_end_have_no_times() -> None:
    (kill, _) = fault_times([Fault("kill", 400.0, False, "")], RECOVERIES, ("kill",))
    assert (kill.injected, kill.detect, kill.recover) == (1, [], [])
    (kill, _) = fault_times([Fault("kill", 300.0, False, "")], RECOVERIES[:3], ("kill",))
    assert (kill.detect, kill.recover) == ([0.25], [])


def test_a_soak_that_lost_nothing_passes() -> None:
    assert verdict(GOOD) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"outcomes": [*GOOD.outcomes, Outcome(LOST)]}, "1 requests lost"),
        ({"outcomes": [*GOOD.outcomes, Outcome(COMPLETED, True), Outcome(ABORTED, True)]}, "2 requests differ"),
        ({"leaked_pages": 3}, "3 pages leaked"),
        ({"leaked_processes": ["ray::ShardActor"]}, "1 processes leaked"),
        ({"engine_error": "no recovery"}, "did not recover: no recovery"),
        ({"faults": FAULTS[:2]}, "no fault of the kind stop"),
        ({"outcomes": [Outcome(ABORTED)]}, "no request was completed"),
        ({"leaked_pages": None}, "pages were not counted"),
        ({"leaked_processes": None}, "processes were not counted"),
    ],
)
def test_anything_wrong_fails_it_and_is_named(change: dict[str, Any], reason: str) -> None:
    (found,) = verdict(replace(GOOD, **change))
    assert reason in found
    assert f"FAILED: {found}" in as_text(replace(GOOD, **change))


def test_an_interrupted_soak_is_judged_by_what_it_has_seen() -> None:
    so_far = replace(GOOD, interrupted=True, faults=[], outcomes=[], leaked_pages=None)
    assert verdict(so_far) == []
    assert "interrupted; nothing lost" in as_text(so_far)
    assert verdict(replace(so_far, outcomes=[Outcome(LOST)]))
    assert verdict(replace(so_far, leaked_processes=["raylet"]))


def test_the_tables_show_counts_times_and_what_was_wrong() -> None:
    wrong = [Outcome(COMPLETED, True, detail=f"token {i} is 5, not 6") for i in range(7)]
    text = as_text(replace(GOOD, outcomes=[*GOOD.outcomes, *wrong], leaked_processes=["raylet --x"]))
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.splitlines()
        if "|" in line
    }
    assert rows["kill"] == ["4", "2", "0.38", "0.50", "8.38", "11.75"]
    assert rows["stop"] == ["1", "0", "5.00", "5.00", "8.00", "8.00"]
    assert rows["requests"] == ["9"] and rows["tokens"] == ["23"] and rows["recoveries"] == ["4"]
    assert rows["tokens replayed"] == ["40"]
    assert rows["differing"] == ["7"] and rows["leaked pages"] == ["0"] and rows["leaked processes"] == ["1"]
    assert "- differs: token 4 is 5, not 6" in text and "token 5 is" not in text and "- and 3 more" in text


def test_what_was_not_looked_at_is_a_dash() -> None:
    text = as_text(SoakReport(kinds=KINDS))
    assert "| leaked pages | - |" in text and "| stop | 0 | 0 | - | - | - | - |" in text


def test_the_record_is_json_with_every_fault_and_recovery() -> None:
    found = json.loads(json.dumps(as_dict(GOOD)))
    assert found["verdict"] == [] and found["counts"]["lost"] == "0" and found["settings"] == {"seed": 3}
    assert [fault["kind"] for fault in found["faults"]] == [fault.kind for fault in FAULTS]
    assert found["recoveries"] == RECOVERIES
    assert as_dict(replace(GOOD, leaked_pages=1))["verdict"] == ["1 pages leaked"]
