"""What an engine says of itself when it starts: one line per rank."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.support.engine import make_llm
from tests.support.text_checkpoint import text_checkpoint


def test_each_rank_is_told_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "distributed_sparse")
    with make_llm(
        text_checkpoint(tmp_path), 2, max_model_len=64, sparse={"method": "quest", "token_budget": 32, "recent_pages": 1}
    ) as llm:
        ranks = llm.stats()["ranks"]
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("rank ")]
    assert len(lines) == len(ranks) == 2
    for number, (line, rank) in enumerate(zip(lines, ranks)):
        weights, cache, metadata = (rank[name] / 1e9 for name in ("weight_bytes", "cache_bytes", "metadata_bytes"))
        assert line == (
            f"rank {number}: node {rank['node_id']} ({rank['hostname']}), cpu, KV heads {2 * number} to {2 * number + 1}, "
            f"{weights:.2f} GB of weights, {cache:.2f} GB of cache, {metadata:.2f} GB of metadata"
        )
