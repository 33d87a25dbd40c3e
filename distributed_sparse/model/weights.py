"""weights: loads one rank's part of a checkpoint from safetensors, slice by slice, or draws dummy weights."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from distributed_sparse.kernels.huge_pages import zeros
from distributed_sparse.model.checkpoint import LOAD_FORMATS, TensorFiles
from distributed_sparse.model.config import CHECKPOINT_DTYPES, ModelConfig
from distributed_sparse.model.sharding import ShardSpec, TensorSlice, slice_tensor, tensor_slices
from distributed_sparse.utils.progress import Progress

logger = logging.getLogger(__name__)

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
_IN_A_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_DUMMY_STD = 0.02

BAR_DELAY_S = 1.0
"""Seconds before a load shows its progress bar."""


@dataclass(frozen=True)
class LayerWeights:
    """One layer's weights on one rank. Matrices are [out, in], as in ``torch.nn.functional.linear``; H counts local heads."""

    input_norm: Tensor
    """[hidden]"""
    qkv: Tensor
    """[(H_q + 2 H_kv) * d, hidden]: queries, keys, values."""
    qkv_bias: Tensor | None
    """[(H_q + 2 H_kv) * d]"""
    q_norm: Tensor | None
    """[d]"""
    k_norm: Tensor | None
    """[d]"""
    o: Tensor
    """[hidden, H_q * d]"""
    o_bias: Tensor | None
    """[hidden], whole on every rank: added once, after the sum over ranks."""
    post_attention_norm: Tensor
    """[hidden]"""
    gate_up: Tensor
    """[2 * intermediate, hidden]: gate, up."""
    gate_up_bias: Tensor | None
    """[2 * intermediate]"""
    down: Tensor
    """[hidden, intermediate]"""
    down_bias: Tensor | None
    """[hidden], whole on every rank: added once, after the sum over ranks."""


@dataclass(frozen=True)
class Weights:
    """One rank's part of the model."""

    embedding: Tensor
    """[V_local, hidden]"""
    layers: list[LayerWeights]
    norm: Tensor
    """[hidden], the norm before lm_head."""
    lm_head: Tensor
    """[V_local, hidden]; the same tensor object as ``embedding`` if the two are tied."""
    bytes_read: int
    """Bytes of weights read from files, in the files' dtype; 0 for dummy weights."""

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor, each once."""
        yield self.embedding
        for layer in self.layers:
            yield from (tensor for field in fields(layer) if (tensor := getattr(layer, field.name)) is not None)
        yield self.norm
        if self.lm_head is not self.embedding:
            yield self.lm_head

    @property
    def nbytes(self) -> int:
        """Bytes held in memory; tied embeddings count once."""
        return sum(tensor.nbytes for tensor in self.tensors())


def load_weights(
    path: Path,
    config: ModelConfig,
    shard: ShardSpec,
    dtype: torch.dtype,
    device: torch.device | str,
    load_format: str = "auto",
    progress: bool = False,
) -> Weights:
    """Load this rank's part of a checkpoint; reads nothing else from the files.

    Args:
        path: a local checkpoint (`resolve_checkpoint`); unused with ``load_format="dummy"``.
        dtype: of the weights in memory.
        load_format: ``auto`` reads safetensors; ``dummy`` draws every tensor at random on the device, seeded by its name, so
            that the model is the same at any world size (on the same kind of device).
        progress: show a progress bar in bytes on standard error.

    Raises:
        ValueError: a tensor is missing, or has an unexpected shape or dtype (names it and its file); the files hold tensors
            of the model's layers that the config does not use; the world size does not divide the heads.
    """
    if load_format not in LOAD_FORMATS:
        raise ValueError(f"load_format={load_format!r} is unknown; use one of {', '.join(LOAD_FORMATS)}")
    parts = tensor_slices(config, shard)
    with Progress(
        desc=f"Loading weights (rank {shard.rank})",
        total=sum(part.num_read for part in parts.values()) * dtype.itemsize,
        unit="B",
        unit_scale=True,
        disable=not progress,
        delay=BAR_DELAY_S,
    ) as bar:
        if load_format == "dummy":
            return _Assembler(config, parts, _Dummy(), dtype, device, bar).weights(shard)
        with TensorFiles(path) as files:
            if files.unread is not None and shard.rank == 0:
                logger.warning("%s is not read: the index beside it names other files (transformers reads it)", files.unread)
            return _Assembler(config, parts, _Checkpoint(path, files, config, parts), dtype, device, bar).weights(shard)


class _Checkpoint:
    """Slices from safetensors files. Names, shapes and dtypes are checked before the first byte is read."""

    def __init__(self, path: Path, files: TensorFiles, config: ModelConfig, parts: dict[str, TensorSlice]) -> None:
        self.files = files
        self.bytes_read = 0
        # transformers 5 also accepts a tied model whose files hold only lm_head.
        stands_in = {EMBEDDING: LM_HEAD} if config.tie_word_embeddings and EMBEDDING not in files.file_of else {}
        self.stored_as = {name: stands_in.get(name, name) for name in parts}
        for name, part in parts.items():
            self._check(path, self.stored_as[name], part.shape)
        if config.tie_word_embeddings and LM_HEAD in files.file_of:
            self._check(path, LM_HEAD, parts[EMBEDDING].shape)
        unused = sorted(name for name in files.file_of if name not in parts and _would_change_the_model(name, config))
        if unused:
            file = files.file_of[unused[0]]
            more = f" and {len(unused) - 1} more" if unused[1:] else ""
            raise ValueError(
                f"{file} holds {unused[0]}{more}, for which {path / 'config.json'} "
                f"(model_type={config.model_type}) has no use; the weights and the config belong to different models"
            )

    def _check(self, path: Path, name: str, shape: tuple[int, ...]) -> None:
        file = self.files.file_of.get(name)
        if file is None:
            raise ValueError(f"tensor {name} of shape {list(shape)} is missing from the safetensors files in {path}")
        found = self.files.tensor(name)
        if tuple(found.get_shape()) != shape:
            raise ValueError(f"tensor {name} in {file} has shape {found.get_shape()}; config.json asks for {list(shape)}")
        if found.get_dtype() not in CHECKPOINT_DTYPES:
            raise ValueError(
                f"tensor {name} of shape {list(shape)} in {file} has dtype {found.get_dtype()}; "
                f"supported are {', '.join(CHECKPOINT_DTYPES)} (quantised weights are not)"
            )

    def fill(self, out: Tensor, part: TensorSlice) -> None:
        """Write the rows (or columns) of a tensor that the rank reads into ``out``, which has their shape."""
        read = self.files.tensor(self.stored_as.get(part.name, part.name))[part.index]
        self.bytes_read += read.nbytes
        out.copy_(read)

    def has(self, name: str) -> bool:
        """Whether the files hold a tensor of that name."""
        return name in self.files.file_of


class _Dummy:
    """Random slices, with the interface of `_Checkpoint`: matrices and biases normal around 0, norms 1, seeded by name."""

    bytes_read = 0

    def fill(self, out: Tensor, part: TensorSlice) -> None:
        if part.name.endswith("norm.weight"):
            out.fill_(1.0)
            return
        seed = int.from_bytes(hashlib.sha256(part.name.encode()).digest()[:8], "little") >> 1
        generator = torch.Generator(out.device).manual_seed(seed)
        # Every rank draws the whole tensor: a separately drawn slice would depend on the world size.
        whole = torch.empty(part.shape, dtype=out.dtype, device=out.device).normal_(0.0, _DUMMY_STD, generator=generator)
        out.copy_(whole[part.index])

    def has(self, name: str) -> bool:
        return False


class _Assembler:
    """Builds `Weights` from slices; projections with the same input are stacked into one matrix (qkv, gate_up)."""

    def __init__(
        self,
        config: ModelConfig,
        parts: dict[str, TensorSlice],
        source: _Checkpoint | _Dummy,
        dtype: torch.dtype,
        device: torch.device | str,
        bar: Progress,
    ) -> None:
        self.config, self.parts, self.source = config, parts, source
        self.dtype, self.device, self.bar = dtype, device, bar

    def weights(self, shard: ShardSpec) -> Weights:
        embedding = self.load(EMBEDDING)
        layers = [self.layer(f"model.layers.{i}") for i in range(self.config.num_hidden_layers)]
        norm = self.load("model.norm.weight")
        lm_head = self.tied_lm_head(embedding, shard) if self.config.tie_word_embeddings else self.load(LM_HEAD)
        return Weights(embedding, layers, norm, lm_head, self.source.bytes_read)

    def layer(self, prefix: str) -> LayerWeights:
        config, attention, mlp = self.config, f"{prefix}.self_attn", f"{prefix}.mlp"
        qkv = [f"{attention}.{name}_proj" for name in "qkv"]
        gate_up = [f"{mlp}.gate_proj", f"{mlp}.up_proj"]
        return LayerWeights(
            input_norm=self.load(f"{prefix}.input_layernorm.weight"),
            qkv=self.load(*(f"{name}.weight" for name in qkv)),
            qkv_bias=self.load(*(f"{name}.bias" for name in qkv)) if config.qkv_bias else None,
            q_norm=self.load(f"{attention}.q_norm.weight") if config.qk_norm else None,
            k_norm=self.load(f"{attention}.k_norm.weight") if config.qk_norm else None,
            o=self.load(f"{attention}.o_proj.weight"),
            o_bias=self.load(f"{attention}.o_proj.bias") if config.o_bias else None,
            post_attention_norm=self.load(f"{prefix}.post_attention_layernorm.weight"),
            gate_up=self.load(*(f"{name}.weight" for name in gate_up)),
            gate_up_bias=self.load(*(f"{name}.bias" for name in gate_up)) if config.mlp_bias else None,
            down=self.load(f"{mlp}.down_proj.weight"),
            down_bias=self.load(f"{mlp}.down_proj.bias") if config.mlp_bias else None,
        )

    def load(self, *names: str) -> Tensor:
        """The named tensors, stacked along axis 0; padding is zero."""
        return self._stack([self.parts[name] for name in names])

    def _stack(self, parts: list[TensorSlice]) -> Tensor:
        heights = [part.local_shape[0] for part in parts]
        stacked = zeros((sum(heights), *parts[0].local_shape[1:]), self.dtype, self.device)
        for part, rows in zip(parts, stacked.split(heights), strict=True):
            if part.num_read:
                self.source.fill(rows.narrow(part.axis or 0, 0, part.stop - part.start), part)
            self.bar.update(part.num_read * self.dtype.itemsize)
        return stacked

    def tied_lm_head(self, embedding: Tensor, shard: ShardSpec) -> Tensor:
        """``embedding`` itself; if the files hold a different lm_head, that one, as in transformers."""
        if not (self.source.has(EMBEDDING) and self.source.has(LM_HEAD)):
            return embedding
        lm_head = self._stack([slice_tensor(LM_HEAD, self.parts[EMBEDDING].shape, 0, shard)])
        if torch.equal(lm_head, embedding):
            return embedding
        logger.warning("config.json ties lm_head to the embedding, but the files hold two different tensors; both are used")
        return lm_head


def _would_change_the_model(name: str, config: ModelConfig) -> bool:
    """Whether an unused tensor belongs to a layer of the model, so that ignoring it would compute a different function."""
    match = _IN_A_LAYER.fullmatch(name)
    # Old Llama checkpoints store the inverse frequencies, which are computed from config.json here.
    return match is not None and int(match[1]) < config.num_hidden_layers and not match[2].endswith("rotary_emb.inv_freq")
