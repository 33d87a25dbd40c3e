"""On a GPU, a method chooses what it chooses on the CPU, and nothing in it waits for the host. Needs one CUDA device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_sparse.cache import LayerCache
from distributed_sparse.selection import policy_class, resolve_sparse_config
from tests.support.decode_rows import DecodeRows, decode_rows
from tests.support.hash_weights import random_hash_weights
from tests.support.kernels import error_ratio

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CONTEXTS = [3000, 1500, 40, 2048]
METHODS: dict[str, dict[str, Any]] = {
    "quest": {"token_budget": 128},
    "twilight": {"min_candidates": 256},
    "vattention": {"sink_tokens": 16, "window_tokens": 16, "epsilon": 0.3, "guarantee": "denominator"},
    "hash": {"token_budget": 128},
    "window": {"token_budget": 128},
    "random": {"token_budget": 128},
}


def on_gpu(rows: DecodeRows) -> DecodeRows:
    """The same rows on the device."""
    cache, batch = rows.cache, rows.batch
    table = batch.page_table.where(batch.page_table < cache.k_pages.shape[0], 0)
    tensors = {name: getattr(batch, name).cuda() for name in ("num_pages", "context_lens", "last_page_len", "random_key")}
    moved = LayerCache(
        cache.layer,
        cache.k_pages.cuda(),
        cache.v_pages.cuda(),
        cache.kinds,
        {name: kept.cuda() for name, kept in cache.metadata.items()},
        {name: kept.cuda() for name, kept in cache.constants.items()},
    )
    moved_batch = replace(batch, page_table=table.cuda(), **tensors)
    return replace(rows, q=rows.q.cuda(), cache=moved, batch=moved_batch)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Any operation that waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", list(METHODS))
def test_a_method_attends_to_the_same_on_the_gpu_and_never_waits_for_the_host(method: str, tmp_path: Path) -> None:
    settings = dict(METHODS[method])
    if method == "hash":
        settings["hash_weights"] = random_hash_weights(tmp_path / "hash.safetensors", range(1), 8, 64)
    config = resolve_sparse_config({"method": method, **settings})
    geometry = decode_rows([16]).geometry
    cpu = decode_rows(CONTEXTS, kinds=policy_class(method)(config, geometry).metadata)
    gpu = on_gpu(cpu)
    expected = cpu.attend(cpu.select(policy_class(method)(config, cpu.geometry)))
    policy = policy_class(method)(config, gpu.geometry)
    gpu.attend(gpu.select(policy))  # compiles
    torch.cuda.synchronize()
    with no_waiting():
        selection = gpu.select(policy)
    assert error_ratio(gpu.attend(selection), expected) < 1e-3
    assert (selection.attended(gpu.batch.last_page_len, 16) < gpu.batch.context_lens[:, None]).any()
