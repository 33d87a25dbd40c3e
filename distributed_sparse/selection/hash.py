"""hash: tokens whose learned signatures agree best with the query's (HashAttention, arXiv 2412.14468)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distributed_sparse.cache import AppendRuns, Geometry, LayerCache, Metadata, read_tensor
from distributed_sparse.kernels.hash.hamming_scores import hamming_scores
from distributed_sparse.kernels.hash.signatures import append_signatures, pack_signs
from distributed_sparse.kernels.huge_pages import zeros
from distributed_sparse.selection.base import DecodeBatch, SparseConfig
from distributed_sparse.selection.top_k import Scorer, TopKConfig, TopKPolicy

LINEARS = 3
"""Linear layers of the hash function, with SiLU between them (section 3; d -> d -> d -> bits in the paper)."""


@dataclass(frozen=True)
class KeySignatures(Metadata):
    """Signatures of every key, one per query head: int32 [num_pages, H_kv, page_size, G, bits / 32].

    The hash is computed in float64, so that a sign does not depend on how many tokens are hashed together.

    weights: safetensors file; for each layer i and x = q, k: `model.layers.{i}.hash.{x}.{0,1,2}.weight` [H_q, out, in] and
        `.bias` [H_q, out], over all query heads of the model; the last layer's `out` is bits.
    bits: a multiple of 32.
    """

    weights: str
    bits: int

    def allocate(self, num_pages: int, geometry: Geometry) -> dict[str, Tensor]:
        shape = (num_pages, geometry.num_kv_heads, geometry.page_size, geometry.group_size, self.bits // 32)
        return {"key_signatures": zeros(shape, torch.int32, geometry.device)}

    def constants(self, layer: int, geometry: Geometry) -> dict[str, Tensor]:
        """hash.{q,k}.{0,1,2}.{weight,bias}: float64 [H_q, out, in] and [H_q, 1, out] of this rank's heads."""
        first = geometry.first_kv_head * geometry.group_size
        heads = slice(first, first + geometry.num_kv_heads * geometry.group_size)
        total = None if geometry.model_kv_heads is None else geometry.model_kv_heads * geometry.group_size
        found = {}
        for side in "qk":
            width = geometry.head_dim
            for number in range(LINEARS):
                name = f"hash.{side}.{number}"
                where = f"model.layers.{layer}.{name}"
                out = None if number < LINEARS - 1 else self.bits
                bias = read_tensor(self.weights, f"{where}.bias", heads, out, num_heads=total)
                out = bias.shape[1]
                weight = read_tensor(self.weights, f"{where}.weight", heads, out, width, num_heads=total)
                found[f"{name}.weight"] = weight.to(geometry.device, torch.float64)
                found[f"{name}.bias"] = bias[:, None].to(geometry.device, torch.float64)
                width = out
        return found

    def append(self, cache: LayerCache, k: Tensor, runs: AppendRuns) -> None:
        signatures = cache.metadata["key_signatures"]
        x = hash_outputs(k.repeat_interleave(signatures.shape[3], dim=1), cache, "k")
        append_signatures(x, runs.pages, runs.starts, runs.offsets, runs.counts, signatures)


def hash_outputs(x: Tensor, cache: LayerCache, side: str) -> Tensor:
    """The hash function before its signs are taken: x [N, H_q, d] -> float64 [N, H_q, bits]; side is "q" or "k"."""
    x = x.double().transpose(0, 1)
    for number in range(LINEARS):
        if number:
            x = F.silu(x)
        x = torch.baddbmm(cache.constants[f"hash.{side}.{number}.bias"], x, cache.constants[f"hash.{side}.{number}.weight"].mT)
    return x.transpose(0, 1)


def check_hash_weights(weights: str | None) -> str:
    """Raise ValueError if no weight file is given. Each shard checks the file's content when it loads."""
    if weights is None:
        raise ValueError(
            "the hash scorer needs learned weights: set sparse.hash_weights to a safetensors file (layout in "
            "docs/methods/hash.md); untrained signatures predict nothing"
        )
    return weights


def signature_bits(weights: str) -> int:
    """Bits of the signatures in a weight file.

    Raises:
        ValueError: the file is not readable, holds no hash, or its signatures are not a multiple of 32 bits.
    """
    try:
        with safe_open(weights, framework="pt") as file:
            last = next((name for name in file.keys() if name.endswith(f".hash.k.{LINEARS - 1}.weight")), None)  # noqa: SIM118
            if last is None:
                raise ValueError(f"sparse.hash_weights={weights!r} holds no hash; docs/methods/hash.md describes its layout")
            bits = int((*file.get_slice(last).get_shape(), 0)[1])
    except (OSError, SafetensorError) as error:
        raise ValueError(f"sparse.hash_weights={weights!r} is not a readable safetensors file: {error}") from error
    if bits % 32 or bits == 0:
        raise ValueError(f"sparse.hash_weights={weights!r} has signatures of {bits} bits; use a multiple of 32")
    return bits


class HashScorer(Scorer):
    """Scores every token by the number of bits in which its signature and the query's agree, summed over the group."""

    selector = "hash"
    per_token = True

    def __init__(self, geometry: Geometry, weights: str | None) -> None:
        super().__init__(geometry)
        weights = check_hash_weights(weights)
        self.bits = signature_bits(weights)
        self.metadata = (KeySignatures(weights, self.bits),)

    @classmethod
    def from_config(cls, config: SparseConfig, geometry: Geometry) -> HashScorer:
        return cls(geometry, getattr(config, "hash_weights", None))

    @classmethod
    def check_config(cls, config: SparseConfig) -> None:
        check_hash_weights(getattr(config, "hash_weights", None))

    def scores(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Tensor:
        q_signatures = pack_signs(hash_outputs(q, cache, "q"))
        return hamming_scores(q_signatures, cache.metadata["key_signatures"], batch.page_table, batch.context_lens)

    def bytes_scored(self, context_lens: list[int]) -> int:
        return sum(context_lens) * self.geometry.num_kv_heads * self.geometry.group_size * self.bits // 8


@dataclass(frozen=True, kw_only=True)
class HashConfig(TopKConfig):
    """`token_budget` tokens per KV head and step, rounded up to whole pages' worth, sink and recent tokens included."""

    method: ClassVar[str] = "hash"
    per_token: ClassVar[bool] = HashScorer.per_token
    hash_weights: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_hash_weights(self.hash_weights)


class HashPolicy(TopKPolicy):
    """Attends to the tokens whose signatures agree best."""

    config_class = HashConfig
    scorer_class = HashScorer
