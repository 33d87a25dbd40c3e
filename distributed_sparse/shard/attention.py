"""SparseAttention: one layer's attention: append to the cache, let the method select, attend. vLLM's attention backend."""

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
    """Runs attention over this rank's heads and counts what it reads. `begin` sets the batch; the model then calls each layer.

    Attributes:
        dense_layers: layers of the current step whose rows the host knows to be dense; they are not counted on the device.
        timer: times append, select and attend in profile steps.
    """

    def __init__(self, geometry: Geometry, policies: list[Policy], cache: PagedCache) -> None:
        self.geometry = geometry
        self.policies = policies
        self.cache = cache
        self.dense_layers: list[int] = []
        heads, device = geometry.num_kv_heads, geometry.device
        self._tokens_attended = torch.zeros((len(policies), heads), dtype=torch.int64, device=device)
        self._sparse_rows = torch.zeros(heads, dtype=torch.int64, device=device)
        self._extra_tokens_read = torch.zeros(heads, dtype=torch.int64, device=device)
        self.reset()

    # ---- a step

    def begin(self, batch: StepBatch, tracer: Tracer | None = None) -> None:
        """Set the batch of the following calls, and the tracer of its decode rows."""
        self.batch = batch
        self.tracer = tracer
        self.dense_layers = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attention of one layer over the batch: decode rows by the layer's method, prompt chunks densely.

        Only queues device work, so that it can be captured in a CUDA graph; `account` does the counting on the host.

        Args:
            layer: index of the layer.
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
        """Select, then attend: [B, H_q, d] for the rotated queries q [B, H_q, d] of the decode rows."""
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
        """Add a sparse layer to the counters on the device. The host counts a dense one: see `account`."""
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

    def account(self, context_lens: list[int], max_context_len: int, dense_layers: list[int]) -> None:
        """Count on the host, once per step. Replaying a CUDA graph runs only the device's part of the counting.

        Args:
            context_lens: of the step's decode rows, without padding.
            max_context_len: `DecodeBatch.max_context_len`; in a captured step, the longest context of its shape.
            dense_layers: `self.dense_layers` after the step, or after its graph was captured.
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

    def forget(self) -> None:
        """Release the last batch, whose tensors would otherwise live until the next `begin`."""
        self.__dict__.pop("batch", None)
        self.tracer = None

    def reset(self) -> None:
        """Zero counters and times. Device counters are zeroed in place: captured graphs hold their addresses."""
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

    # ---- counts for the ShardReport

    @property
    def tokens_attended(self) -> list[list[int]]:
        """[layer][local KV head], over all decode rows."""
        counted = self._tokens_attended.tolist()
        return [[tokens + dense for tokens in heads] for heads, dense in zip(counted, self._dense_tokens)]

    @property
    def tokens_in_context(self) -> int:
        return self._context_tokens

    @property
    def rows(self) -> tuple[int, int]:
        """(dense, sparse) rows; a row here is one (sequence, KV head) in one layer of one step."""
        sparse = int(self._sparse_rows.sum())
        return self._rows - sparse, sparse

    @property
    def bytes_read(self) -> int:
        """Bytes of K and V of attended tokens and of `Selection.extra_tokens_read`, and of what the methods scored."""
        token_bytes = 2 * self.geometry.head_dim * self.geometry.dtype.itemsize
        return token_bytes * (sum(map(sum, self.tokens_attended)) + int(self._extra_tokens_read.sum())) + self._scored_bytes


def _listed_tokens(partial: Selection, batch: DecodeBatch) -> Tensor | None:
    """Tokens that the selection of a partial result lists, those of its own partial result included; None: pages only."""
    if partial.partial_selection is None:
        return partial.num_tokens
    deeper = partial.partial_selection.attended(batch.last_page_len, batch.page_size)
    return deeper if partial.num_tokens is None else deeper + partial.num_tokens
