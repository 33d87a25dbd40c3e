"""rank: cost model of one rank: the bytes that it holds, and those that a decode step reads, writes and sends, exactly.

It uses the engine's own slices, policies and pages, so its counts equal the engine's counters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch

from distributed_sparse.cache import PagedCache
from distributed_sparse.model.config import ModelConfig
from distributed_sparse.model.sharding import LocalSizes, ShardSpec, tensor_slices
from distributed_sparse.model.weights import EMBEDDING
from distributed_sparse.selection import build_policies, resolve_sparse_config
from distributed_sparse.selection.base import Policy
from distributed_sparse.shard.graphs import why_eager
from distributed_sparse.tools.evaluation.meter import pages_held
from distributed_sparse.tools.planner.launches import dense_launches, layer_launches, step_launches

TOKEN_BYTES = 8
"""Bytes of a sampled token's id in rank 0's broadcast."""


@dataclass(frozen=True)
class AttentionBytes:
    """Bytes of a decode step's attention on one rank. The first three add up to the engine's `bytes_read`."""

    dense_kv: int
    """K and V of the layers and rows that attend to their whole context."""
    sparse_kv: int
    """K and V of the tokens that the others attend to, and of tokens that a policy reads in addition."""
    scored: int
    """Metadata, and keys without values, that a policy reads to select."""
    written: int
    """K, V and metadata of the step's own tokens."""

    @property
    def read(self) -> int:
        return self.dense_kv + self.sparse_kv + self.scored


class RankCostModel:
    """One rank's share of a model with a sparse method. All ranks hold, read and send the same number of bytes.

    Args:
        model: the whole model's shape.
        tensor_parallel_size: ranks.
        sparse: a `sparse:` section; None is dense.
        page_size: tokens per page.
        dtype: of weights and cache.

    Raises:
        ValueError: the ranks do not divide the heads, or the section is invalid for this model.
    """

    def __init__(
        self, model: ModelConfig, tensor_parallel_size: int, sparse: dict[str, Any] | None, page_size: int, dtype: torch.dtype
    ) -> None:
        self.model = model
        self.sparse = sparse
        self.shard = ShardSpec(0, tensor_parallel_size)
        sizes = LocalSizes(model, self.shard)
        self.sizes = sizes
        self.geometry = sizes.geometry(page_size, dtype, torch.device("cpu"))
        config = resolve_sparse_config(sparse)
        self.method: str = sparse["method"] if sparse else config.method
        self.evict_window = config.evict_window(page_size)
        self.policies: list[Policy] = build_policies(self.method, config, model.num_hidden_layers, self.geometry)
        self.page_bytes = PagedCache.page_bytes(self.geometry, [policy.metadata for policy in self.policies])
        """Bytes of one page over all layers: (K and V, metadata)."""
        self._slices = {name: prod(part.local_shape) for name, part in tensor_slices(model, self.shard).items()}

    # ---- held

    @property
    def weight_bytes(self) -> int:
        """Weights in memory with padding; tied embeddings count once."""
        return sum(self._slices.values()) * self.geometry.dtype.itemsize

    @cached_property
    def constant_bytes(self) -> int:
        """Data that methods keep per layer, such as hash networks and key offsets. Reads their files."""
        return sum(
            tensor.nbytes
            for layer, policy in enumerate(self.policies)
            for kind in policy.metadata
            for tensor in kind.constants(layer, self.geometry).values()
        )

    def pages(self, context_len: int) -> int:
        """Pages of a sequence of this context in decode. If a method evicts, prefill holds more for a while."""
        return pages_held(context_len, self.geometry.page_size, self.evict_window)

    # ---- read and written by a decode step

    @property
    def matrix_elements(self) -> int:
        """Weights that every step reads: all but the embedding, of which a step reads one row per sequence.

        A tied embedding counts, as it is also lm_head.
        """
        total = sum(self._slices.values())
        return total if self.model.tie_word_embeddings else total - self._slices[EMBEDDING]

    def weight_bytes_read(self, batch: int) -> int:
        """Weights that a step of `batch` sequences reads, with an embedding row each (any row if another rank has it)."""
        return (self.matrix_elements + batch * self.model.hidden_size) * self.geometry.dtype.itemsize

    def attention(self, context_lens: Sequence[int], density: float | None = None) -> AttentionBytes:
        """Attention of a step over sequences of these contexts, the step's own tokens included.

        Args:
            density: tokens attended / tokens in context, for rows where it depends on the data.

        Raises:
            ValueError: the density depends on the data and is not given.
        """
        contexts, geometry = list(context_lens), self.geometry
        dense_tokens, sparse_tokens, scored = 0, 0.0, 0
        for policy in self.policies:
            config, page_size = policy.config, geometry.page_size
            attended = [config.attended_tokens(n, page_size) for n in contexts]
            if None in attended and density is None:
                raise ValueError(
                    f"with sparse.method={self.method!r} the attended tokens depend on the data; give the density "
                    "(tokens attended / tokens in context), as `stats()` or an evaluation measured it: --density 0.05"
                )
            if attended == contexts:
                dense_tokens += sum(contexts)
                continue
            scored += policy.bytes_scored(contexts)
            for n, tokens in zip(contexts, attended):
                if tokens == n:
                    dense_tokens += n
                else:
                    chosen = tokens if tokens is not None else (density or 0.0) * n
                    sparse_tokens += chosen + config.extra_tokens(n, page_size)
        of_head = 2 * geometry.head_dim * geometry.dtype.itemsize
        of_token = geometry.num_kv_heads * of_head
        metadata = sum(kind.bytes_per_token(geometry) for policy in self.policies for kind in policy.metadata)
        return AttentionBytes(
            dense_kv=dense_tokens * of_token,
            sparse_kv=round(sparse_tokens * of_token),
            scored=scored,
            written=len(contexts) * (len(self.policies) * of_token + metadata),
        )

    @property
    def dense_launches(self) -> int:
        """Kernels of a step on a GPU whose layers are all dense."""
        return dense_launches(self.model.num_hidden_layers, self.model.qk_norm)

    def sparse_launches(self, context_len: int) -> int:
        """Additional kernels of a step on a GPU: selection, separate attention, and counting."""
        page_size = self.geometry.page_size
        sparse = [own for own in self.policies if own.config.attended_tokens(context_len, page_size) != context_len]
        of_settings = {repr(own.config): step_launches(own) for own in sparse}
        return sum(layer_launches(own).total() for own in sparse) + sum(own.total() for own in of_settings.values())

    def why_eager(self, enforce_eager: bool) -> str | None:
        """Why decode steps on a GPU are not captured as CUDA graphs, or None if they are."""
        return why_eager(enforce_eager, self.policies, self.method)

    # ---- sent by a decode step

    @property
    def all_reduce_calls(self) -> int:
        """One for the embedding and two per layer; none with one rank."""
        return 2 * self.model.num_hidden_layers + 1 if self.shard.world_size > 1 else 0

    def all_reduce_bytes_each(self, batch: int) -> int:
        """Payload of one all-reduce."""
        return batch * self.model.hidden_size * self.geometry.dtype.itemsize

    def gather_bytes(self, batch: int) -> int:
        """Logits that a rank sends to the gather."""
        return batch * self.sizes.vocab_size * self.geometry.dtype.itemsize
