"""Times of one run, what they are held against, and what is too large to be tried."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distributed_sparse.tools.bench import timing as measure
from distributed_sparse.tools.bench.accuracy import WrongResult, check_close, check_equal
from distributed_sparse.tools.bench.failures import caught
from distributed_sparse.tools.bench.timing import (
    Times,
    Unavailable,
    check_memory,
    copy_bandwidth,
    one_line,
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


class Device:
    """What a clock asks of a GPU, on a CPU: every call takes 1 ms there; a capture runs its calls, and may refuse to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, captures: bool) -> None:
        device = self

        class Graph:
            def replay(self) -> None:
                device.replayed.append(self.number)

        @contextmanager
        def capture(graph: Any, **_: Any) -> Iterator[None]:
            device.capturing = True
            yield
            device.capturing = False
            if not captures:
                raise RuntimeError("operation not permitted when stream is capturing")
            graph.number = device.calls[-1]

        class Event:
            def __init__(self, enable_timing: bool) -> None: ...

            def record(self) -> None: ...

            def elapsed_time(self, end: Any) -> float:
                return 1.0

        self.calls: list[int] = []
        self.replayed: list[int] = []
        nothing = SimpleNamespace(wait_stream=lambda other: None)
        fakes = {"Event": Event, "CUDAGraph": Graph, "graph": capture, "stream": nullcontext, "graph_pool_handle": object}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        for name in ("Stream", "current_stream", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, lambda device: nothing)

    def seconds(self, host_s: float, rotation: int | None, rounds: int = 4) -> tuple[list[float], str | None]:
        def function(number: int) -> None:
            self.calls.append(number)
            time.sleep(host_s)

        clock = measure._DeviceClock(function, torch.zeros(1), rotation)
        del self.calls[:]
        return [clock.seconds(number) for number in range(rounds)], clock.launched(1)


def test_on_a_gpu_the_calls_of_a_rotation_are_replayed_from_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, captures=True)
    assert device.seconds(0.01, rotation=3) == ([1e-3] * 4, "graph")
    assert device.replayed == [0, 1, 2, 0] and not device.calls, "no launch of the host is in the time"


def test_what_cannot_be_captured_is_called_and_says_when_the_host_may_be_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, captures=False)
    assert device.seconds(0.0, rotation=2) == ([1e-3] * 4, "eager") and device.calls == [0, 1, 2, 3]
    assert device.seconds(0.002, rotation=2)[1] == "eager, host-bound?"
    assert not device.replayed


def test_without_a_rotation_nothing_is_captured_as_inputs_would_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, captures=True)
    assert device.seconds(0.0, rotation=None)[1] == "eager" and device.calls == [0, 1, 2, 3]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_many_small_launches_are_timed_without_the_host() -> None:
    """Also after a function that no graph can hold, and each graph on its own inputs."""
    device = torch.device("cuda")
    inputs = [torch.zeros(64, device=device) for _ in range(3)]

    def small(number: int) -> None:
        for _ in range(500):
            inputs[number % 3] += 1

    def waits(number: int) -> float:
        return float(inputs[number % 3].sum())

    stream = torch.cuda.current_stream()
    functions = {"waits": waits, "small": small, "large": lambda number: torch.zeros(1 << 24, device=device)}
    times = time_in_turn(functions, 5, device, warm_up=1, rotation=3)
    assert torch.cuda.current_stream() == stream, "a capture that fails leaves its stream"
    assert {name: taken.launched for name, taken in times.items() if name != "waits"} == {"small": "graph", "large": "graph"}
    assert times["waits"].launched is not None and times["waits"].launched.startswith("eager")
    # one call each before the capture, and six replays in turn
    assert [tensor[0].item() for tensor in inputs] == [500.0 * (1 + 2)] * 3
    eager = time_in_turn({"small": small}, 5, device)["small"]
    assert eager.launched == "eager, host-bound?" and times["small"].median < eager.median


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


def test_an_allocation_that_fails_is_unavailable_and_other_errors_are_not() -> None:
    with caught("it") as failed:
        torch.empty(1 << 60)
    assert failed["unavailable"].startswith("out of memory: ")
    with caught("it") as failed:
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert failed == {"unavailable": "out of memory: CUDA out of memory"}
    with caught("it") as failed:
        raise RuntimeError("something else")
    assert failed == {"wrong": "it failed: RuntimeError: something else"}


def test_one_line_names_an_error_and_the_first_thing_it_says() -> None:
    assert one_line(RuntimeError("\nfirst\nsecond")) == "RuntimeError: first"
    assert one_line(KeyError()) == "KeyError"


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
