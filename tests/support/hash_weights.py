"""random_hash_weights: a file in the layout of docs/methods/hash.md for a model that nobody trained a hash for."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def random_hash_weights(
    path: Path, layers: range, num_heads: int, head_dim: int, *, hidden: int = 24, bits: int = 32, seed: int = 0
) -> str:
    """Write random networks head_dim -> hidden -> hidden -> bits, for queries and keys of every layer and query head.

    Both sides of a head share their matrices, so that scores follow the products of queries and keys; their biases differ, so
    that taking one side for the other shows.

    Returns:
        The path, as `hash_weights` takes it.
    """
    generator = torch.Generator().manual_seed(seed)
    widths = (head_dim, hidden, hidden, bits)
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        for number in range(3):
            weight = torch.randn(num_heads, widths[number + 1], widths[number], generator=generator) / widths[number] ** 0.5
            bias = 0.1 * torch.randn(num_heads, widths[number + 1], generator=generator)
            for side, extra in (("q", 0.0), ("k", 0.05)):
                name = f"model.layers.{layer}.hash.{side}.{number}"
                tensors[f"{name}.weight"] = weight.clone()
                tensors[f"{name}.bias"] = bias + extra * torch.randn(bias.shape, generator=generator)
    save_file(tensors, path)
    return str(path)
