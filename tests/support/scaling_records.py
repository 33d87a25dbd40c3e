"""scaling_record: what a point of a scaling run leaves behind, small and in order, for tests to spoil."""

from __future__ import annotations

from typing import Any


def scaling_record(num_ranks: int = 2, **changes: Any) -> dict[str, Any]:
    """A float32 point of two layers (the second one selects) and two KV heads, in which every check holds."""
    record: dict[str, Any] = {
        "key": f"tp{num_ranks}",
        "dtype": "float32",
        "ttft_ms": {"mean": 20.0, "median": 20.0, "p99": 21.0},
        "tpot_ms": {"mean": 4.0 / num_ranks, "median": 4.0 / num_ranks, "p99": 5.0},
        "itl_ms": {"mean": 4.0, "median": 4.0, "p99": 6.0},
        "requests_per_s": 1.5,
        "output_tokens_per_s": 100.0,
        "total_tokens_per_s": 900.0,
        "time_ms": {
            **{"step_p50": 3.9, "shard_p50": 3.5, "overhead_p50": 0.3},
            **{"shard": 4.0, "select": 0.5, "attend": 1.0, "all_reduce": 0.25},
        },
        "ranks": [
            {
                "rank": rank,
                "weight_bytes": 600 // num_ranks,
                "cache_bytes": 10 * 64 // num_ranks,
                "metadata_bytes": 10 * 4 // num_ranks,
            }
            for rank in range(num_ranks)
        ],
        "pages": 9,
        "steps": 7,
        "all_reduce": {"calls": 35, "bytes": 4000},
        "density": {"layers": [[1.0, 1.0], [0.25, 0.25]], "ranks": [0.25] * num_ranks, "skew": 1.0},
        "cache_bytes_read_per_step": [5e5 * (rank + 1) for rank in range(num_ranks)],
        "expected": {
            "weight_bytes": 600 // num_ranks,
            "weight_bytes_of_all_ranks": 600,
            "weight_bytes_read_per_step": 250,
            "page_bytes_of_all_ranks": {"cache_bytes": 64, "metadata_bytes": 4},
            "all_reduce": {"calls_per_step": 5, "bytes": 4000},
            "density": [1.0, 0.25],
            "density_at_most": [1.0, 0.25],
        },
        "token_ids": [[5, 6, 7], [8, 9, 10]],
        "pages_used_at_end": 0,
        "left_behind": [],
    }
    return record | changes


def reference_record(margins: list[list[float]], **changes: Any) -> dict[str, Any]:
    """The point of one rank that others are compared with; the margins of its tokens, [request][step]."""
    given = {"token_ids": [[5, 6, 7], [8, 9, 10]], "margins": margins}
    record = scaling_record(1, reference=given, all_reduce={"calls": 0, "bytes": 0}, **changes)
    record["expected"]["all_reduce"] = {"calls_per_step": 0, "bytes": 0}
    return record
