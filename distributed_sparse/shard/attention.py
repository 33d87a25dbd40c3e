"""SparseAttention: per layer, append to the cache, select, attend. The one place where model, cache and method meet."""

from __future__ import annotations

import torch
from torch import Tensor

from distributed_sparse.kernels.prefill_attend import prefill_attend
from distributed_sparse.selection.base import Policy, Selection, attend_selection
from distributed_sparse.selection.metadata import Geometry, LayerCache
from distributed_sparse.shard.batch import StepBatch
from distributed_sparse.shard.cache import PagedCache
from distributed_sparse.shard.tracer import Tracer
from distributed_sparse.timer import Timer


class SparseAttention:
    """Runs every layer's attention of a step on this rank's heads, and counts what it reads."""

    def __init__(self, geometry: Geometry, policies: list[Policy], cache: PagedCache) -> None:
        self.geometry = geometry
        self.policies = policies
        self.cache = cache
        self.timer = Timer(geometry.device)
        for policy in policies:
            policy.timer = self.timer
        self._counters = torch.zeros((len(policies), geometry.num_kv_heads), dtype=torch.int64, device=geometry.device)
        self._sparse_rows = torch.zeros((), dtype=torch.int64, device=geometry.device)
        self._read_apart = torch.zeros((), dtype=torch.int64, device=geometry.device)
        self._dense_tokens = [0] * len(policies)
        self._rows = 0
        self._context_tokens = 0
        self._scored_bytes = 0

    def begin(self, batch: StepBatch, profile: bool, tracer: Tracer | None = None) -> None:
        """Set the batch that the next calls are about, and who watches its decode rows."""
        self.batch = batch
        self.tracer = tracer
        self.timer.enabled = profile
        self._rows += batch.num_decode * self.geometry.num_kv_heads * len(self.policies)
        self._context_tokens += sum(batch.context_lens)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one layer over the batch.

        Args:
            layer: its index.
            q: [N, H_q, d]; k, v: [N, H_kv, d]: post-RoPE, this rank's heads, decode rows first.

        Returns:
            [N, H_q, d].
        """
        batch, cache = self.batch, self.cache.layers[layer]
        with self.timer("append"):
            cache.append(k, v, batch.runs)
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
            out = attend_selection(q, cache, batch, selection, self.geometry.scale)
        if self.tracer is not None:
            self.tracer.record(q, cache, batch, selection, out)
        return out

    def _count(self, layer: int, selection: Selection) -> None:
        """Add to the counters, on the device where the host does not know."""
        batch = self.batch.decode
        assert batch is not None
        if selection.is_dense:
            self._dense_tokens[layer] += sum(self.batch.context_lens)
            return
        attended = selection.attended(batch.last_page_len, batch.page_size)
        self._counters[layer] += attended.sum(0)
        self._sparse_rows += (attended < batch.context_lens[:, None]).sum()
        if selection.read_apart is not None:
            self._read_apart += selection.read_apart.sum()
        self._scored_bytes += self.policies[layer].bytes_scored(self.batch.context_lens)

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
        """K and V of the attended tokens and of those read apart, and what the methods scored."""
        token_bytes = 2 * self.geometry.head_dim * self.geometry.dtype.itemsize
        return token_bytes * (sum(map(sum, self.tokens_attended)) + int(self._read_apart)) + self._scored_bytes
