"""DenseModel: one rank's Transformer with plain dense attention over a growing cache, for one sequence."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from distributed_sparse.kernels.reference import rotary_reference
from distributed_sparse.model.config import ModelConfig
from distributed_sparse.model.sharding import ShardSpec
from distributed_sparse.model.transformer import Collectives, Transformer
from distributed_sparse.model.weights import load_weights


class SingleRank:
    """The collectives of a world of one."""

    rank, world_size = 0, 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x


class DenseCache:
    """Keys and values of one sequence, all layers; attention with an explicit causal mask."""

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """q [N, H_q, d], k and v [N, H_kv, d] of the newest N tokens -> [N, H_q, d]."""
        q, k = (rotary_reference(x, cos, sin).to(x.dtype) for x in (q, k))
        self.keys[layer] = torch.cat([self.keys[layer], k]) if layer in self.keys else k
        self.values[layer] = torch.cat([self.values[layer], v]) if layer in self.values else v
        group = q.shape[1] // k.shape[1]
        keys = self.keys[layer].repeat_interleave(group, dim=1)  # [n, H_q, d]
        values = self.values[layer].repeat_interleave(group, dim=1)
        logits = torch.einsum("qhd,khd->hqk", q, keys).float() / q.shape[-1] ** 0.5
        positions = torch.arange(len(keys))
        future = positions[None, :] > positions[-len(q) :, None]
        weights = logits.masked_fill(future, float("-inf")).softmax(-1).to(q.dtype)
        return torch.einsum("hqk,khd->qhd", weights, values)


class DenseModel:
    """A rank of a checkpoint that reads one sequence, in chunks of any size."""

    def __init__(self, path: Path, collectives: Collectives | None = None, dtype: torch.dtype = torch.float32) -> None:
        collectives = SingleRank() if collectives is None else collectives
        config = ModelConfig.from_pretrained(path)
        shard = ShardSpec(collectives.rank, collectives.world_size)
        weights = load_weights(path, config, shard, dtype, "cpu")
        self.transformer = Transformer(config, shard, weights, collectives)
        self.cache = DenseCache()
        self.num_tokens = 0

    def logits(self, token_ids: list[int], prefill_length: int) -> Tensor:
        """float32 [N, vocab_size] of the next N tokens of a sequence whose prompt is ``prefill_length`` long."""
        positions = torch.arange(self.num_tokens, self.num_tokens + len(token_ids))
        self.num_tokens += len(token_ids)
        rope_lengths = (positions + 1).clamp(min=prefill_length)
        hidden = self.transformer.forward(torch.tensor(token_ids), positions, rope_lengths, self.cache.attend)
        return self.transformer.logits(hidden)


def dense_logits(path: Path, token_ids: list[int], collectives: Collectives | None = None) -> Tensor:
    """float32 [N, vocab_size] of a prompt that is read at once."""
    return DenseModel(path, collectives).logits(token_ids, len(token_ids))
