"""sharding: the axis along which each tensor of a checkpoint is split, and the part of it that a rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from distributed_sparse.cache import Geometry
from distributed_sparse.model.config import ModelConfig


@dataclass(frozen=True)
class ShardSpec:
    """A tensor-parallel rank and the number of ranks."""

    rank: int
    world_size: int

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise ValueError(f"tensor_parallel_size={self.world_size} must be at least 1")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank={self.rank} must lie in [0, {self.world_size})")


def check_divisibility(config: ModelConfig, tensor_parallel_size: int) -> None:
    """Check that the number of ranks divides the heads. Vocabulary and intermediate size are padded instead.

    Raises:
        ValueError: it does not; names both numbers and the sizes that work.
    """
    for name in ("num_key_value_heads", "num_attention_heads"):
        heads = getattr(config, name)
        if heads % tensor_parallel_size:
            sizes = [str(size) for size in range(1, heads + 1) if heads % size == 0 and config.num_key_value_heads % size == 0]
            choice = " or ".join(filter(None, [", ".join(sizes[:-1]), sizes[-1]]))
            raise ValueError(f"tensor_parallel_size={tensor_parallel_size} does not divide {name}={heads}; use {choice}")


@dataclass(frozen=True)
class LocalSizes:
    """Sizes of one rank's part of the model. Heads divide evenly; other sizes are padded to equal parts on all ranks.

    Raises:
        ValueError: the world size does not divide the heads.
    """

    config: ModelConfig
    shard: ShardSpec

    def __post_init__(self) -> None:
        check_divisibility(self.config, self.shard.world_size)

    @property
    def num_attention_heads(self) -> int:
        return self.config.num_attention_heads // self.shard.world_size

    @property
    def num_key_value_heads(self) -> int:
        return self.config.num_key_value_heads // self.shard.world_size

    @property
    def first_key_value_head(self) -> int:
        """Global index of this rank's first KV head."""
        return self.num_key_value_heads * self.shard.rank

    @property
    def q_size(self) -> int:
        """Rows of the query projection: heads x head_dim."""
        return self.num_attention_heads * self.config.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key projection and of the value projection: KV heads x head_dim."""
        return self.num_key_value_heads * self.config.head_dim

    @property
    def intermediate_size(self) -> int:
        """Padding included."""
        return _part(self.config.intermediate_size, self.shard.world_size)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding and of lm_head, padding included."""
        return _part(self.config.vocab_size, self.shard.world_size)

    def geometry(self, page_size: int, dtype: torch.dtype, device: torch.device) -> Geometry:
        """The shape of this rank's attention and cache."""
        return Geometry(
            num_kv_heads=self.num_key_value_heads,
            group_size=self.config.num_attention_heads // self.config.num_key_value_heads,
            head_dim=self.config.head_dim,
            page_size=page_size,
            dtype=dtype,
            device=device,
            first_kv_head=self.first_key_value_head,
            model_kv_heads=self.config.num_key_value_heads,
        )

    @property
    def first_token_id(self) -> int:
        """Token id of this rank's first vocabulary row."""
        return self.vocab_size * self.shard.rank


@dataclass(frozen=True)
class TensorSlice:
    """One tensor of a checkpoint, and the part of it that one rank holds."""

    name: str
    shape: tuple[int, ...]
    """Shape of the whole tensor in the file."""
    axis: int | None
    """Axis along which it is split; None if it is replicated."""
    start: int
    stop: int
    """The rank reads [start, stop) along the axis (all of axis 0 if replicated); empty if its part is all padding."""
    local_shape: tuple[int, ...]
    """Shape in memory: the part read, padded with zeros if the world size does not divide the axis."""

    @property
    def index(self) -> tuple[slice, ...]:
        """Index of the rank's part in the whole tensor."""
        return (slice(None),) * (self.axis or 0) + (slice(self.start, self.stop),)

    @property
    def num_read(self) -> int:
        """Elements that the rank reads."""
        axis = self.axis or 0
        return prod(self.shape) // self.shape[axis] * (self.stop - self.start)


def tensor_slices(config: ModelConfig, shard: ShardSpec) -> dict[str, TensorSlice]:
    """Every tensor that the model needs, by its name in the checkpoint, with this rank's part.

    q, k, v are split by heads and o along its input; gate and up by output and down along its input; embedding and
    lm_head by vocabulary. Norms are replicated, as are the biases of o and down, which are added after the sum over ranks.

    Raises:
        ValueError: the world size does not divide the heads.
    """
    check_divisibility(config, shard.world_size)
    hidden, d = config.hidden_size, config.head_dim
    q_size, kv_size = config.num_attention_heads * d, config.num_key_value_heads * d
    inner, vocabulary = config.intermediate_size, (config.vocab_size, hidden)
    rows, columns, replicated = 0, 1, None

    plan: dict[str, tuple[tuple[int, ...], int | None]] = {"model.embed_tokens.weight": (vocabulary, rows)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        plan[f"{prefix}.input_layernorm.weight"] = ((hidden,), replicated)
        for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
            plan[f"{attention}.{name}_proj.weight"] = ((size, hidden), rows)
            if config.qkv_bias:
                plan[f"{attention}.{name}_proj.bias"] = ((size,), rows)
        if config.qk_norm:
            plan[f"{attention}.q_norm.weight"] = ((d,), replicated)
            plan[f"{attention}.k_norm.weight"] = ((d,), replicated)
        plan[f"{attention}.o_proj.weight"] = ((hidden, q_size), columns)
        if config.o_bias:
            plan[f"{attention}.o_proj.bias"] = ((hidden,), replicated)
        plan[f"{prefix}.post_attention_layernorm.weight"] = ((hidden,), replicated)
        for name in ("gate", "up"):
            plan[f"{mlp}.{name}_proj.weight"] = ((inner, hidden), rows)
            if config.mlp_bias:
                plan[f"{mlp}.{name}_proj.bias"] = ((inner,), rows)
        plan[f"{mlp}.down_proj.weight"] = ((hidden, inner), columns)
        if config.mlp_bias:
            plan[f"{mlp}.down_proj.bias"] = ((hidden,), replicated)
    plan["model.norm.weight"] = ((hidden,), replicated)
    if not config.tie_word_embeddings:
        plan["lm_head.weight"] = (vocabulary, rows)
    return {name: slice_tensor(name, shape, axis, shard) for name, (shape, axis) in plan.items()}


def slice_tensor(name: str, shape: tuple[int, ...], axis: int | None, shard: ShardSpec) -> TensorSlice:
    """This rank's part of a tensor that is split into equal parts along ``axis``; the last parts are padded."""
    if axis is None:
        return TensorSlice(name, shape, None, 0, shape[0], shape)
    part = _part(shape[axis], shard.world_size)
    start = min(part * shard.rank, shape[axis])
    stop = min(start + part, shape[axis])
    return TensorSlice(name, shape, axis, start, stop, (*shape[:axis], part, *shape[axis + 1 :]))


def _part(size: int, world_size: int) -> int:
    return -(-size // world_size)
