"""transformer: one decoder for Llama, Mistral, Qwen2 and Qwen3, on one tensor-parallel rank.

Shapes: N tokens of the step, L rows whose logits are computed, D hidden size, d head dim, H_q and H_kv heads of this rank,
V_local vocabulary rows of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from distributed_sparse.kernels.layer.linear import linear
from distributed_sparse.kernels.layer.rms_norm import add_rms_norm, rms_norm
from distributed_sparse.model.config import ModelConfig
from distributed_sparse.model.rope import Rope
from distributed_sparse.model.sharding import LocalSizes, ShardSpec
from distributed_sparse.model.weights import LayerWeights, Weights

Attention = Callable[[int, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""attention(layer, q [N, H_q, d], k [N, H_kv, d], v [N, H_kv, d], cos [N, d/2], sin [N, d/2]) -> [N, H_q, d]: applies the
rotary embedding to q and k, appends k and v to the cache, and attends.

q, k and v may be strided views. They and the result have the model's dtype; cos and sin are float32 (`Rope.cos_sin`).
"""


class Collectives(Protocol):
    """The collectives that the model needs."""

    rank: int
    world_size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks; may be in place."""

    def all_gather(self, x: Tensor) -> Tensor:
        """[L, V_local] -> [L, V_local * world_size], ranks in order along the last dimension."""


class Transformer:
    """The decoder of one rank: weights and rotary frequencies. ``attention`` holds the cache.

    Collectives: two all-reduces per layer (after o and after down), one for the embedding; one all-gather for the logits.
    """

    def __init__(self, config: ModelConfig, shard: ShardSpec, weights: Weights, collectives: Collectives) -> None:
        assert (collectives.rank, collectives.world_size) == (shard.rank, shard.world_size)
        self.config = config
        self.sizes = LocalSizes(config, shard)
        self.weights = weights
        self.collectives = collectives
        self.rope = Rope(config.rope, weights.embedding.device)

    def forward(self, token_ids: Tensor, positions: Tensor, rope_lengths: Tensor, attention: Attention) -> Tensor:
        """Run a step's tokens, from any mix of sequences, through all layers.

        Args:
            token_ids: int64 [N], each in [0, vocab_size).
            positions: int64 [N], each token's position in its sequence.
            rope_lengths: int64 [N], see `Rope.cos_sin`.
            attention: called once per layer, in order; see `Attention`.

        Returns:
            [N, D] in the model's dtype, after the final norm; the input of `logits`.
        """
        eps, layers = self.config.rms_norm_eps, self.weights.layers
        cos, sin = self.rope.cos_sin(positions, rope_lengths)
        residual = self._embed(token_ids)
        x = rms_norm(residual, layers[0].input_norm, eps)
        # Norms are fused with the preceding residual addition, so a layer ends with the next layer's input norm.
        next_norms = [layer.input_norm for layer in layers[1:]] + [self.weights.norm]
        for index, (layer, next_norm) in enumerate(zip(layers, next_norms, strict=True)):
            x = self._attention(index, layer, x, cos, sin, attention)
            x, residual = add_rms_norm(x, residual, layer.post_attention_norm, eps)
            x = self._mlp(layer, x)
            x, residual = add_rms_norm(x, residual, next_norm, eps)
        return x

    def logits(self, hidden_rows: Tensor) -> Tensor:
        """[L, D] rows of `forward`'s result -> float32 [L, vocab_size], the same on every rank."""
        gathered = self.collectives.all_gather(linear(hidden_rows, self.weights.lm_head))  # [L, V_local * world_size]
        # Vocabulary padding lies behind the last token id: cut it off, so that it cannot be sampled or enter a softmax.
        return gathered[:, : self.config.vocab_size].float()

    def _embed(self, token_ids: Tensor) -> Tensor:
        """[N] -> [N, D]: the rank that holds a token's row contributes it, the others zeros."""
        rows = token_ids - self.sizes.first_token_id
        elsewhere = (rows < 0) | (rows >= self.sizes.vocab_size)
        x = F.embedding(rows.masked_fill(elsewhere, 0), self.weights.embedding)
        return self.collectives.all_reduce(x.masked_fill(elsewhere[:, None], 0.0))

    def _attention(self, index: int, layer: LayerWeights, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
        d, sizes, eps = self.config.head_dim, self.sizes, self.config.rms_norm_eps
        qkv = linear(x, layer.qkv, layer.qkv_bias)
        q, k, v = (
            part.unflatten(-1, (-1, d)) for part in qkv.split([sizes.q_size, sizes.kv_size, sizes.kv_size], dim=-1)
        )  # [N, H, d]
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = rms_norm(q, layer.q_norm, eps), rms_norm(k, layer.k_norm, eps)
        heads = attention(index, q, k, v, cos, sin)  # [N, H_q, d]
        return self._add_once(self.collectives.all_reduce(linear(heads.flatten(1), layer.o)), layer.o_bias)

    def _mlp(self, layer: LayerWeights, x: Tensor) -> Tensor:
        gate, up = linear(x, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
        return self._add_once(self.collectives.all_reduce(linear(F.silu(gate) * up, layer.down)), layer.down_bias)

    @staticmethod
    def _add_once(total: Tensor, bias: Tensor | None) -> Tensor:
        """Add a replicated bias after the sum over ranks, so that it counts once and not once per rank."""
        return total if bias is None else total + bias
