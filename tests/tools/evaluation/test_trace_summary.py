"""A record of a trace: which steps are taken, and how much of one step's tokens the next one reads again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from distributed_sparse.tools.evaluation.trace_summary import chosen_steps, summarise
from distributed_sparse.trace import LayerTrace, TraceStep


@pytest.mark.parametrize(
    ("num_steps", "wanted", "steps"), [(3, 5, [0, 1, 2]), (8, 4, [1, 3, 5, 7]), (9, 2, [3, 8]), (10, 1, [9]), (1, 1, [0])]
)
def test_steps_are_spread_to_the_last_one(num_steps: int, wanted: int, steps: list[int]) -> None:
    assert chosen_steps(num_steps, wanted) == steps


def step(position: int, *heads: Sequence[int]) -> TraceStep:
    """One layer, one query head per KV head."""
    count = len(heads)
    indices = [np.array(head, dtype=np.int32) for head in heads]
    ones = np.ones(count, dtype=np.float32)
    return TraceStep(position, [LayerTrace(ones, 0.5 * ones, 2 * ones, np.ones((count, 4), dtype=np.int32), indices)])


def test_overlap_of_tokens_and_of_pages() -> None:
    found = summarise([step(99, [0, 1, 20, 40], [0, 5]), step(100, [0, 2, 20, 50], [0, 5])], page_size=16)
    tokens, pages = found["overlap"]["tokens"], found["overlap"]["pages"]
    assert tokens["jaccard"] == pytest.approx(np.array([[2 / 6, 1.0]]))
    assert tokens["kept"] == pytest.approx(np.array([[0.5, 1.0]]))
    assert pages["jaccard"] == pytest.approx(np.array([[2 / 4, 1.0]]))  # pages 0 1 2 and 0 1 3
    assert pages["kept"] == pytest.approx(np.array([[2 / 3, 1.0]]))


def test_steps_that_do_not_follow_each_other_have_no_overlap() -> None:
    assert summarise([step(90, [0]), step(99, [0])], 16)["overlap"]["tokens"]["jaccard"] == []


def test_arrays_are_by_step_layer_and_head() -> None:
    found = summarise([step(5, [0, 1], [2]), step(6, [0], [2, 3])], 16)
    assert found["positions"] == [5, 6]
    assert found["attended"].tolist() == [[[2, 1]], [[1, 2]]]
    assert found["captured_mass"].shape == (2, 1, 2) and found["tokens_for_mass"].shape == (2, 1, 2, 4)
