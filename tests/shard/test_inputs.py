"""All that a step uploads goes in one copy, and comes out as it was: typed, aligned, and at addresses that stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from distributed_sparse.shard.inputs import ALIGNMENT, StepInputs
from tests.support.aten_ops import recorded_ops

CPU = torch.device("cpu")


def arrays(rows: int, seed: int = 0) -> dict[str, NDArray[Any]]:
    """One of every dtype, of odd sizes, some of no element, one of them a column of another."""
    rng = np.random.default_rng(seed)
    wide = rng.integers(-(2**62), 2**62, (rows, 3))
    return {
        "flags": rng.random(rows) < 0.5,
        "column": wide[:, 1],
        "nothing": np.zeros((4, 0, 1), dtype=np.int64),
        "small": rng.integers(-(2**31), 2**31, (2, rows), dtype=np.int32),
        "shares": rng.random((rows, 1)).astype(np.float32),
        "keys": rng.integers(0, 2**62, (4, rows, 1)),
    }


def assert_same(given: dict[str, NDArray[Any]], found: Mapping[str, torch.Tensor]) -> None:
    assert list(found) == list(given) and len(found) == len(given) and "other" not in found
    for name, array in given.items():
        assert found[name].numpy().dtype == array.dtype and np.array_equal(found[name].numpy(), array), name
        assert found[name].data_ptr() % ALIGNMENT == 0 or array.size == 0, name


@pytest.mark.parametrize("rows", [1, 2, 3, 17])
@pytest.mark.parametrize("capacity", [0, 1, 40, 333, 1 << 16])
def test_every_array_arrives_whole_whether_the_buffer_holds_it_or_not(rows: int, capacity: int) -> None:
    inputs = StepInputs(capacity, CPU)
    for seed in range(3):
        given = arrays(rows, seed)
        assert_same(given, inputs.upload(given))


def test_one_upload_is_one_copy() -> None:
    inputs, given = StepInputs(1 << 16, CPU), arrays(5)
    with recorded_ops() as ops:
        inputs.upload(given)
    assert ops.count("aten.copy_.default") == 1
    assert not any("view" in name for name in ops), "views that nobody has asked for yet"


def test_what_comes_first_stays_at_its_address_whatever_comes_behind() -> None:
    """A captured step reads its inputs there: behind them a step may have anything, more than the buffer holds included."""
    inputs, first = StepInputs(4096, CPU), arrays(7)
    expected = {name: view.data_ptr() for name, view in inputs.upload(first).items()}
    for number, more in enumerate([0, 3, 100, 5000, 1]):
        given = {**arrays(7, seed=number), "more": np.arange(more), "last": np.ones((2, more), dtype=np.float32)}
        found = inputs.upload(given)
        assert_same(given, found)
        assert {name: found[name].data_ptr() for name in expected} == expected


def test_a_dtype_that_no_kernel_takes_is_refused() -> None:
    with pytest.raises(KeyError):
        StepInputs(64, CPU).upload({"wide": np.zeros(3)})
