"""SparseAttention: per layer, append to the cache, select, attend. The one place where model, cache and method meet."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from distributed_sparse.kernels.append import append
from distributed_sparse.kernels.attend import attend
from distributed_sparse.kernels.prefill_attend import prefill_attend
from distributed_sparse.selection.base import Geometry, LayerCache, Policy, Selection
from distributed_sparse.shard.batch import StepBatch
from distributed_sparse.shard.cache import PagedCache


class SparseAttention:
    """Runs every layer's attention of a step on this rank's heads, and counts what it reads."""

    def __init__(self, geometry: Geometry, policies: list[Policy], cache: PagedCache) -> None:
        self.geometry = geometry
        self.policies = policies
        self.cache = cache
        self.timer = Timer(geometry.device)
        self._counters = torch.zeros((len(policies), geometry.num_kv_heads), dtype=torch.int64, device=geometry.device)
        self._sparse_rows = torch.zeros((), dtype=torch.int64, device=geometry.device)
        self._dense_tokens = [0] * len(policies)
        self._rows = 0
        self._context_tokens = 0
        self._scored_bytes = 0

    def begin(self, batch: StepBatch, profile: bool) -> None:
        """Set the batch that the next calls are about."""
        self.batch = batch
        self.timer.enabled = profile
        self._rows += batch.num_decode * self.geometry.num_kv_heads * len(self.policies)
        self._context_tokens += batch.context_tokens

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one layer over the batch.

        Args:
            layer: its index.
            q: [N, H_q, d]; k, v: [N, H_kv, d]: post-RoPE, this rank's heads, decode rows first.

        Returns:
            [N, H_q, d].
        """
        batch, cache = self.batch, self.cache.layers[layer]
        runs = batch.runs
        with self.timer("append"):
            append(k, v, runs.pages, runs.starts, runs.offsets, runs.counts, cache.k_pages, cache.v_pages, cache.page_min_max)
        if batch.prefill is None:
            return self._decode(layer, q, cache)
        num_decode, prefill = batch.num_decode, batch.prefill
        out = torch.empty_like(q)
        if num_decode:
            out[:num_decode] = self._decode(layer, q[:num_decode], cache)
        out[num_decode:] = prefill_attend(
            q[num_decode:],
            cache.k_pages,
            cache.v_pages,
            prefill.page_table,
            prefill.query_start,
            prefill.context_lens,
            self.geometry.scale,
            prefill.max_query_len,
        )
        return out

    def _decode(self, layer: int, q: Tensor, cache: LayerCache) -> Tensor:
        batch = self.batch.decode
        assert batch is not None
        with self.timer("select"):
            selection = self.policies[layer].select(q, cache, batch)
        self._count(layer, selection)
        with self.timer("attend"):
            return attend(
                q,
                cache.k_pages,
                cache.v_pages,
                selection.pages,
                selection.num_pages,
                batch.last_page_len,
                self.geometry.scale,
                tokens=selection.tokens,
                num_tokens=selection.num_tokens,
                log_weight=selection.log_weight,
                partial=selection.partial,
            )

    def _count(self, layer: int, selection: Selection) -> None:
        """Add to the counters, on the device where the host does not know."""
        batch = self.batch.decode
        assert batch is not None
        if selection.is_dense:
            self._dense_tokens[layer] += self.batch.context_tokens
            return
        attended = selection.attended(batch.last_page_len, batch.page_size)
        self._counters[layer] += attended.sum(0)
        self._sparse_rows += (attended < batch.context_lens[:, None]).sum()
        self._scored_bytes += self.policies[layer].bytes_scored(self.batch.context_pages)

    # ---- what a ShardReport says

    @property
    def tokens_attended(self) -> list[list[int]]:
        counted = self._counters.tolist()
        return [[tokens + dense for tokens in heads] for heads, dense in zip(counted, self._dense_tokens)]

    @property
    def tokens_in_context(self) -> int:
        return self._context_tokens

    @property
    def rows(self) -> tuple[int, int]:
        """(dense, sparse): a row is one (sequence, KV head, layer, step)."""
        sparse = int(self._sparse_rows)
        return self._rows - sparse, sparse

    @property
    def bytes_read(self) -> int:
        """K and V of the attended tokens, and the metadata that was scored."""
        token_bytes = 2 * self.geometry.head_dim * self.geometry.dtype.itemsize
        return token_bytes * sum(map(sum, self.tokens_attended)) + self._scored_bytes


class Timer:
    """Times of the parts of a step, in profile steps only: it waits for the device before and after each part."""

    def __init__(self, device: torch.device) -> None:
        self.enabled = False
        self._device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self.steps = 0

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        if not self.enabled:
            yield
            return
        started = self._now()
        yield
        self._seconds[part] += self._now() - started

    @property
    def ms_per_step(self) -> dict[str, float]:
        return {part: seconds * 1e3 / max(self.steps, 1) for part, seconds in self._seconds.items()}

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
