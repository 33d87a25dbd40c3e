"""TTFT, TPOT and ITL are what `vllm bench serve` means by them: numbers of two engines can stand side by side."""

from __future__ import annotations

import pytest

from distributed_sparse.tools.common.latency import RequestTimes, latencies, spread_ms


def request(sent: float, arrivals: list[float], tokens: int | None = None) -> RequestTimes:
    return RequestTimes(sent, 10, arrivals, list(range(len(arrivals) if tokens is None else tokens)))


def test_ttft_ends_with_the_first_token_tpot_leaves_it_out_and_itl_is_every_gap() -> None:
    one = request(100.0, [100.5, 100.6, 100.9])
    assert one.ttft == pytest.approx(0.5)
    assert one.tpot == pytest.approx(0.2)  # 0.4 s for the two tokens after the first
    assert one.itl == pytest.approx([0.1, 0.3])


def test_tokens_that_arrive_together_are_one_gap_but_each_counts_for_tpot() -> None:
    one = request(0.0, [1.0, 2.0], tokens=5)
    assert one.tpot == pytest.approx(0.25) and one.itl == pytest.approx([1.0])


def test_one_token_has_no_tpot() -> None:
    found = latencies([request(0.0, [1.0])])
    assert found["tpot_ms"] is None and found["itl_ms"] is None and found["ttft_ms"]["mean"] == 1000.0


def test_rates_count_from_the_first_request_to_the_last_token() -> None:
    found = latencies([request(10.0, [11.0, 12.0]), request(10.5, [11.5, 12.5, 15.0])])
    assert found["duration_s"] == 5.0
    assert found["requests_per_s"] == pytest.approx(2 / 5)
    assert found["output_tokens_per_s"] == pytest.approx(5 / 5)
    assert found["total_tokens_per_s"] == pytest.approx(25 / 5)
    assert found["tpot_ms"]["mean"] == pytest.approx((1000 + 1750) / 2)  # a mean of requests, however long each is
    assert found["itl_ms"]["mean"] == pytest.approx((1000 + 1000 + 2500) / 3)  # and here of gaps


def test_the_99th_percentile_lies_between_its_neighbours() -> None:
    found = spread_ms([second / 1e3 for second in range(101)])
    assert found == pytest.approx({"mean": 50.0, "median": 50.0, "p99": 99.0})
