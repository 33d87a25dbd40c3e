"""tiny_checkpoint: small random checkpoints of every family, made by transformers: weights and config, no tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
"""Every family of models that is supported."""

_SIZES: dict[str, Any] = {
    "vocab_size": 331,  # a prime: no world size divides it
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}

LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.7 * i for i in range(8)],
}
ROPE_PARAMETERS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 5000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64},
    "longrope": LONGROPE,
    "llama3": LLAMA3_ROPE,
}
"""Every rope type, for a head_dim of 16; ``dynamic`` stretches past max_position_embeddings, ``longrope`` past 32 tokens."""


def tiny_checkpoint(
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | int = "1GB",
    generation: dict[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """Write a random checkpoint of a family into ``folder`` and return it: config.json, generation_config.json, safetensors.

    Weights are larger than at a usual initialisation, and norms and biases are random too, so that attention is far from
    uniform and no tensor can be dropped unnoticed.

    Args:
        folder: is made if it does not exist.
        family: ``llama``, ``mistral``, ``qwen2`` or ``qwen3``.
        max_shard_size: in bytes or such as ``"20KB"``; a small one gives several files and an index.
        generation: what generation_config.json says, e.g. ``{"eos_token_id": [2, 5]}``.
        overrides: fields of the family's transformers config, e.g. ``num_key_value_heads=8, tie_word_embeddings=True``.
            By default: 3 layers, 8 query and 4 KV heads of 16 channels, hidden 64, vocabulary 331, no sliding window.
    """
    config = tiny_config(family, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        randomise(model)
    model = model.to(dtype)
    model.generation_config = GenerationConfig(
        **{"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id, **(generation or {})}
    )
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return Path(folder)


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """The transformers config of `tiny_checkpoint`."""
    if family == "mistral":
        overrides.setdefault("sliding_window", None)
    return CONFIGS[family](**{**_SIZES, **overrides})


@torch.no_grad()
def randomise(model: PreTrainedModel) -> None:
    """Draw all parameters anew: matrices with a spread that keeps activations near 1, norms around 1, biases around 0."""
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.normal_(1.0, 0.2)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.3)
        elif "embed_tokens" in name:
            parameter.normal_(0.0, 1.0)
        else:
            parameter.normal_(0.0, 1.5 / parameter.shape[1] ** 0.5)


def transformers_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same checkpoint in transformers, with eager attention: what the engine's logits and tokens are compared with."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def decisive_checkpoint(folder: Path, family: str = "qwen3", **overrides: Any) -> Path:
    """A `tiny_checkpoint` with spread logits: a larger embedding, read again by lm_head, mostly decides the next token.

    A plain random model has two best logits within bfloat16's rounding at one position of a hundred; this one has not.
    """
    path = tiny_checkpoint(folder, family, **overrides)
    weights = load_file(path / "model.safetensors")
    embedding = 3.0 * weights["model.embed_tokens.weight"]
    order = torch.randperm(len(embedding), generator=torch.Generator().manual_seed(1))
    weights["model.embed_tokens.weight"] = embedding
    weights["lm_head.weight"] = 3.0 * torch.nn.functional.normalize(embedding[order], dim=1)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path
