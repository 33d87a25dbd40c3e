"""Times of one run, what they are held against, and what is too large to be tried."""

from __future__ import annotations

import pytest
import torch

from distributed_sparse.bench import measure
from distributed_sparse.bench.accuracy import WrongResult, check_close, check_equal
from distributed_sparse.bench.measure import (
    Times,
    Unavailable,
    check_memory,
    copy_bandwidth,
    out_of_memory_is_unavailable,
    read_bandwidth,
    time_in_turn,
    torch_threads,
)

CPU = torch.device("cpu")


def test_functions_take_turns_and_the_warm_up_is_left_out() -> None:
    calls: list[tuple[str, int]] = []
    functions = {name: lambda number, name=name: calls.append((name, number)) for name in "ab"}
    times = time_in_turn(functions, repeats=2, device=CPU, warm_up=1)
    assert calls == [(name, number) for number in range(3) for name in "ab"]
    assert [len(times[name].samples) for name in "ab"] == [2, 2]


def test_a_row_holds_the_median_and_its_spread_in_ms() -> None:
    assert Times([1.0, 2.0, 3.0]).ms == {"ms": 2000.0, "p10_ms": pytest.approx(1200.0), "p90_ms": pytest.approx(2800.0)}


def test_bandwidths_count_the_bytes_that_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer is read once; a copy reads one half of the bytes and writes the other."""
    moved: list[int] = []

    def half_a_second(functions, repeats, device):
        [(name, function)] = functions.items()
        result = function(0)
        moved.append(result.nbytes if name == "copy" else 0)
        return {name: Times([0.5])}

    monkeypatch.setattr(measure, "time_in_turn", half_a_second)
    assert read_bandwidth(CPU, num_bytes=1 << 20) == copy_bandwidth(CPU, num_bytes=1 << 20) == 2 << 20
    assert moved[1] == 1 << 19


def test_what_would_not_fit_is_refused_with_both_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "available_bytes", lambda device: 2 * 10**9)
    check_memory("a cache", 10**9, CPU)
    with pytest.raises(Unavailable, match=r"out of memory: a cache needs 3\.0 GB, and 2\.0 GB are free"):
        check_memory("a cache", 3 * 10**9, CPU)


def test_free_memory_is_about_what_linux_says() -> None:
    total = measure.os.sysconf("SC_PHYS_PAGES") * measure.os.sysconf("SC_PAGE_SIZE")
    assert 0 < measure.available_bytes(CPU) <= total


def test_an_allocation_that_fails_is_unavailable_and_other_errors_pass() -> None:
    with pytest.raises(Unavailable, match="out of memory"), out_of_memory_is_unavailable():
        torch.empty(1 << 60)
    with pytest.raises(Unavailable, match="out of memory: CUDA"), out_of_memory_is_unavailable():
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="something else"), out_of_memory_is_unavailable():
        raise RuntimeError("something else")


def test_threads_are_as_before_afterwards() -> None:
    before = torch.get_num_threads()
    with torch_threads(before + 1) as inside:
        assert inside == torch.get_num_threads() == before + 1
    with torch_threads(None) as inside:
        assert inside == before
    assert torch.get_num_threads() == before


def test_results_are_compared_by_their_spread_and_infinities_by_their_place() -> None:
    x = torch.tensor([1.0, 2.0, float("-inf")])
    check_close("x", x, x.double(), 1e-6)
    for wrong in (x * 1.01, x.nan_to_num(neginf=5.0), torch.tensor([1.0, float("nan"), float("-inf")])):
        with pytest.raises(WrongResult, match="x: "):
            check_close("x", wrong, x, 1e-3)
    check_equal("x", [1], [1])
    with pytest.raises(WrongResult):
        check_equal("x", torch.tensor([1]), torch.tensor([2]))
