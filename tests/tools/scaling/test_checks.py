"""Each check holds for a sound record and fails, by its name, for a wrong one: a broken engine cannot pass a scaling run."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from distributed_sparse.tools.scaling.checks import Checks, check_points
from tests.support.scaling_records import reference_record, scaling_record

CLEAR = [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]


def failed(records: list[dict[str, Any]], checks: Checks | None = None) -> dict[str, list[str]]:
    """Check -> what it says, over all points, which are one group."""
    found: dict[str, list[str]] = {}
    for outcome in check_points([(record["key"], "group", record) for record in records], checks or Checks()):
        if outcome.failures:
            found.setdefault(outcome.check, []).extend(outcome.failures)
    return found


def test_a_sound_record_passes_every_check_and_every_check_was_made() -> None:
    outcomes = check_points([("a", "g", scaling_record())], Checks())
    assert {outcome.check for outcome in outcomes} == {"weight_bytes", "cache_bytes", "all_reduce", "density", "leaks"}
    assert all(outcome.failures == [] for outcome in outcomes)


def spoilt(path: list[Any], value: Any) -> dict[str, Any]:
    record = copy.deepcopy(scaling_record())
    place: Any = record
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return record


@pytest.mark.parametrize(
    ("check", "path", "value", "says"),
    [
        ("weight_bytes", ["ranks", 1, "weight_bytes"], 304, "rank 1 holds 304 bytes of weights, and its share is 300"),
        ("cache_bytes", ["ranks", 0, "cache_bytes"], 640, "rank 0 holds cache_bytes=640 in 10 pages, and its share is 320"),
        ("cache_bytes", ["ranks", 0, "metadata_bytes"], 24, "rank 0 holds metadata_bytes=24 in 10 pages"),
        ("all_reduce", ["all_reduce", "calls"], 34, "34 all-reduce calls, and 7 steps of 5 predict 35"),
        ("all_reduce", ["all_reduce", "calls"], 30, "30 all-reduce calls, and 7 steps of 5 predict 35"),
        ("all_reduce", ["all_reduce", "bytes"], 4004, "4004 bytes went through all-reduce.* predicts 4000"),
        ("density", ["density", "layers", 1, 0], 0.2501, "layer 1, KV head 0: density 0.2501, and the settings say 0.25"),
        ("density", ["density", "layers", 0, 1], 0.9999, "layer 0, KV head 1"),
        ("leaks", ["pages_used_at_end"], 3, "3 pages were in use"),
        ("leaks", ["left_behind"], ["process 7 (ray::ShardActor)"], r"left behind: process 7 \(ray::ShardActor\)"),
    ],
)
def test_a_wrong_record_fails_its_check_and_no_other(check: str, path: list[Any], value: Any, says: str) -> None:
    found = failed([spoilt(path, value)])
    assert list(found) == [check]
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(found[check][0])
    assert not failed([spoilt(path, value)], Checks(**{check: False}))


def test_ranks_that_all_hold_what_should_be_split_fail_even_if_their_share_says_so() -> None:
    record = scaling_record(2)
    record["expected"]["weight_bytes"] = 600  # slices that split nothing
    for rank in record["ranks"]:
        rank["weight_bytes"] = 600
    (failure,) = failed([record])["weight_bytes"]
    assert failure.startswith("2 ranks together hold 1200 bytes of weights") and failure.endswith("is 600")


@pytest.mark.parametrize(
    ("density", "most", "holds"),
    [(0.0, 1.0, False), (1e-3, 1.0, True), (1.0, 1.0, True), (1.001, 1.0, False), (0.26, 0.26, True), (0.27, 0.26, False)],
)
def test_a_density_that_the_data_decides_is_more_than_nothing_and_no_more_than_allowed(
    density: float, most: float, holds: bool
) -> None:
    record = spoilt(["density", "layers", 1, 0], density)
    record["expected"]["density"][1] = None
    record["expected"]["density_at_most"][1] = most
    record["density"]["layers"][1][1] = most
    assert ("density" not in failed([record])) == holds


def test_what_a_failed_point_has_left_behind_is_reported_and_nothing_else_of_it() -> None:
    failure = {"key": "a", "error": "RuntimeError: no", "left_behind": ["thread driver"]}
    assert failed([failure]) == {"leaks": ["left behind: thread driver"]}
    assert failed([failure | {"left_behind": []}]) == {}


def test_float32_tokens_may_differ_first_at_a_tie_only() -> None:
    reference = reference_record([[0.5, 0.5, 0.5], [0.5, 5e-5, 0.5]])
    assert not failed([reference, scaling_record(2)])
    assert not failed([reference, scaling_record(2, token_ids=[[5, 6, 7], [8, 1, 2]])])
    found = failed([reference, scaling_record(2, token_ids=[[5, 1, 7], [8, 1, 2]])])
    assert found == {"tokens": ["request 0: token 1 differs at a margin of 5.0e-01 standard deviations"]}
    assert failed([reference, scaling_record(2, token_ids=[[5, 6], [8, 9, 10]])])  # a token is missing
    assert failed([reference, scaling_record(2, token_ids=[[5, 6, 7, 8], [8, 9, 10]])])  # one is too many


def test_a_reference_that_failed_leaves_the_tokens_of_its_group_unproven() -> None:
    failure = {"key": "tp1", "error": "RuntimeError: no", "left_behind": []}
    assert failed([failure, scaling_record(2)]) == {"tokens": ["its reference failed"]}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fewer_compared_prompts_than_were_kept_compare_the_first_ones(dtype: str) -> None:
    reference = reference_record([[0.5] * 3, [0.5] * 3], dtype=dtype)
    other = scaling_record(2, dtype=dtype, token_ids=[[5, 6, 7], [8, 9, 1]], disagreements=[[1, 2]])
    assert failed([reference, other])["tokens"]
    assert not failed([reference, other], Checks(compared_prompts=1))
    assert not failed([reference, other | {"token_ids": [[5, 6, 7]], "disagreements": []}], Checks(compared_prompts=1))
    spoilt_first = other | {"token_ids": [[5, 6, 1]], "disagreements": [[0, 2]]}
    assert failed([reference, spoilt_first], Checks(compared_prompts=1))["tokens"]


def test_a_reference_in_low_precision_is_compared_with_nothing_and_not_counted() -> None:
    reference = reference_record([[0.5] * 3, [0.5] * 3], dtype="bfloat16")
    other = scaling_record(2, dtype="bfloat16", disagreements=[])
    outcomes = check_points([(record["key"], "group", record) for record in (reference, other)], Checks())
    assert [one.failures for one in outcomes if one.check == "tokens"] == [None, []]


def test_low_precision_counts_agreement_over_the_tokens_that_were_decided() -> None:
    def found(disagreements: list[list[int]], **checks: Any) -> dict[str, list[str]]:
        reference = reference_record([[0.5, 0.01, 0.5], [0.5, 0.5, 0.5]], dtype="bfloat16")
        other = scaling_record(2, dtype="bfloat16", token_ids=[[1, 1, 1], [1, 1, 1]], disagreements=disagreements)
        return failed([reference, other], Checks(**checks))

    assert not found([])
    assert "83.33% of 6 positions" in found([[0, 1]])["tokens"][0]
    assert not found([[0, 1]], agreement=0.8)
    assert not found([[0, 1]], decided_margin=0.05)
    assert "80.00% of 5 positions" in found([[0, 1], [1, 2]], decided_margin=0.05)["tokens"][0]
    assert "lower decided_margin" in found([], decided_margin=2.0)["tokens"][0]
