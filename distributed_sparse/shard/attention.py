"""SparseAttention: per layer, append to the cache, select, attend. The one place where model, cache and method meet."""

from __future__ import annotations

import torch
from torch import Tensor

from distributed_sparse.cache import Geometry, LayerCache, PagedCache
from distributed_sparse.kernels.attend.count_attended import count_attended
from distributed_sparse.kernels.attend.prefill_attend import prefill_attend
from distributed_sparse.selection.base import DecodeBatch, Policy, Selection, attend_selection
from distributed_sparse.shard.batch import StepBatch
from distributed_sparse.shard.tracer import Tracer
from distributed_sparse.utils.timer import Timer


class SparseAttention:
    """Runs every layer's attention of a step on this rank's heads, and counts what it reads."""

    def __init__(self, geometry: Geometry, policies: list[Policy], cache: PagedCache) -> None:
        self.geometry = geometry
        self.policies = policies
        self.cache = cache
        self.dense_layers: list[int] = []
        """Layers of this step of which the host knows that every row is dense: they are not counted on the device."""
        heads = geometry.num_kv_heads
        self._tokens_attended = torch.zeros((len(policies), heads), dtype=torch.int64, device=geometry.device)
        self._sparse_rows, self._extra_tokens_read = torch.zeros((2, heads), dtype=torch.int64, device=geometry.device).unbind(
            0
        )
        self.reset()

    def reset(self) -> None:
        """Count and time from zero. The counters on the device stay where graphs have been told that they are."""
        self.forget()
        self.timer = Timer(self.geometry.device)
        for policy in self.policies:
            policy.timer = self.timer
        for counter in (self._tokens_attended, self._sparse_rows, self._extra_tokens_read):
            counter.zero_()
        self._dense_tokens = [0] * len(self.policies)
        self._rows = 0
        self._context_tokens = 0
        self._scored_bytes = 0

    def begin(self, batch: StepBatch, tracer: Tracer | None = None) -> None:
        """Set the batch that the next calls are about, and who watches its decode rows."""
        self.batch = batch
        self.tracer = tracer
        self.dense_layers = []

    def forget(self) -> None:
        """Let go of the last batch, whose tensors would otherwise live on until the next one comes."""
        self.__dict__.pop("batch", None)
        self.tracer = None

    def account(self, context_lens: list[int], max_context_len: int, dense_layers: list[int]) -> None:
        """Count a step as far as the host knows it, once per step: a replayed graph runs the rest, and no line of this.

        Args:
            context_lens: of the step's decode rows, without padding.
            max_context_len: what the policies were told of them: in a captured step the longest context of its shape.
            dense_layers: as the layers' calls left them (in the step itself, or when its graph was captured).
        """
        if not context_lens:
            return
        tokens = sum(context_lens)
        self._rows += len(context_lens) * self.geometry.num_kv_heads * len(self.policies)
        self._context_tokens += tokens
        for layer, policy in enumerate(self.policies):
            if layer in dense_layers:
                self._dense_tokens[layer] += tokens
            else:
                self._scored_bytes += policy.bytes_scored(context_lens, max_context_len)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attention of one layer over the batch. Work for the device alone: what the host counts, `account` does.

        Args:
            layer: its index.
            q: [N, H_q, d]; k, v: [N, H_kv, d]: this rank's heads before the rotary embedding, decode rows first.
            cos, sin: float32 [N, d/2] of each token's angles.

        Returns:
            [N, H_q, d].
        """
        batch, cache = self.batch, self.cache.layers[layer]
        with self.timer("append"):
            q = cache.rotary_append(q, k, v, cos, sin, batch.runs)
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
        """Add to the counters on the device, where the host does not know."""
        batch = self.batch.decode
        assert batch is not None
        if selection.is_dense:
            self.dense_layers.append(layer)
            return
        partial = selection.partial_selection
        count_attended(
            self._tokens_attended[layer],
            self._sparse_rows,
            self._extra_tokens_read,
            selection.num_pages,
            batch.last_page_len,
            batch.context_lens,
            batch.page_size,
            num_tokens=selection.num_tokens,
            partial_num_pages=None if partial is None else partial.num_pages,
            partial_num_tokens=None if partial is None else _listed_tokens(partial, batch),
            extra_tokens_read=selection.extra_tokens_read,
        )

    # ---- what a ShardReport says

    @property
    def tokens_attended(self) -> list[list[int]]:
        counted = self._tokens_attended.tolist()
        return [[tokens + dense for tokens in heads] for heads, dense in zip(counted, self._dense_tokens)]

    @property
    def tokens_in_context(self) -> int:
        return self._context_tokens

    @property
    def rows(self) -> tuple[int, int]:
        """(dense, sparse): a row is one (sequence, KV head, layer, step)."""
        sparse = int(self._sparse_rows.sum())
        return self._rows - sparse, sparse

    @property
    def bytes_read(self) -> int:
        """K and V of the attended tokens and of those read apart, and what the methods scored."""
        token_bytes = 2 * self.geometry.head_dim * self.geometry.dtype.itemsize
        return token_bytes * (sum(map(sum, self.tokens_attended)) + int(self._extra_tokens_read.sum())) + self._scored_bytes


def _listed_tokens(partial: Selection, batch: DecodeBatch) -> Tensor | None:
    """Tokens that a partial result's selection lists, and those of a partial result of its own."""
    if partial.partial_selection is None:
        return partial.num_tokens
    deeper = partial.partial_selection.attended(batch.last_page_len, batch.page_size)
    return deeper if partial.num_tokens is None else deeper + partial.num_tokens
