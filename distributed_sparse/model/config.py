"""config: a checkpoint's config.json as a typed ModelConfig; rejects unsupported models early."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distributed_sparse.model.checkpoint import TensorFiles, read_json
from distributed_sparse.model.rope import RopeConfig
from distributed_sparse.utils.validation import check_bool, check_dtype, check_float, check_int, shown

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""model_type -> the supported architecture of that family."""

CHECKPOINT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Supported dtypes of weights in a file, by their safetensors names."""

_LARGEST = 2**31 - 1
_SIZES = {  # key of config.json -> (smallest, largest, whether null is read as absent)
    "vocab_size": (1, _LARGEST, False),
    "hidden_size": (1, _LARGEST, False),
    "intermediate_size": (1, _LARGEST, False),
    "num_hidden_layers": (1, 10_000, False),
    "num_attention_heads": (1, _LARGEST, False),
    "num_key_value_heads": (1, _LARGEST, True),
    "head_dim": (1, 1 << 16, True),
    "max_position_embeddings": (1, _LARGEST, False),
    "max_window_layers": (0, _LARGEST, False),
}
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
_OTHERS = ("rms_norm_eps", "hidden_act", "sliding_window", "layer_types")
_NEUTRAL: dict[str, Any] = {"is_causal": True, "per_layer_config": None, "transformers_weights": None}
"""Keys that change the computed function or the weight files in transformers, with their supported values."""

_SUPPORTED = "supported are Llama 2/3/3.1+ (llama), Mistral (mistral), Qwen2/2.5 (qwen2) and Qwen3 (qwen3)"


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape and conventions, for all families. Sizes are of the whole model, never of a rank."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    """Whether q and k pass through an RMSNorm over head_dim before the rotary embedding (Qwen3)."""
    sliding_window: int | None
    """Tokens in the window of the layers that have one, the query's own included; None if no layer has one."""
    dtype: torch.dtype
    """Dtype of the checkpoint."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end a sequence; empty if the checkpoint names none."""
    bos_token_id: int | None

    @classmethod
    def from_pretrained(cls, path: Path) -> ModelConfig:
        """Read config.json and generation_config.json of a local checkpoint, as transformers reads them.

        Accepts rotary parameters in both formats: ``rope_parameters``, and the older ``rope_theta`` and ``rope_scaling``.

        Raises:
            ValueError: config.json is malformed, or the model is not supported (names it and the supported ones).
        """
        file = path / "config.json"
        raw = read_json(file)
        family = _supported_family(raw, file)
        hf = _transformers_config(raw, family, file)
        heads, kv_heads = hf.num_attention_heads, hf.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(f"{file}: num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
        if hf.hidden_act != "silu":
            raise ValueError(f"{file}: hidden_act={hf.hidden_act!r} is not supported; only 'silu' is")
        head_dim = check_int(
            f"{file}: head_dim",
            getattr(hf, "head_dim", None) or hf.hidden_size // heads,
            *_SIZES["head_dim"][:2],
            remedy=f"without one it is hidden_size={hf.hidden_size} over num_attention_heads={heads}",
        )
        try:
            rope = RopeConfig.from_config(raw, head_dim, hf.max_position_embeddings)
        except ValueError as error:
            place = next((key for key in ("rope_scaling", "rope_parameters") if raw.get(key)), None)
            raise ValueError(f"{file}: {error}" + (f" ({place}={shown(raw[place], 400)})" if place else "")) from error
        # As in transformers: Qwen2 always has a bias on q, k, v only; Mistral never; the others have a flag.
        attention_bias = family in ("llama", "qwen3") and hf.attention_bias
        special = _special_tokens(path, {"eos_token_id": hf.eos_token_id, "bos_token_id": hf.bos_token_id} | raw, hf.vocab_size)
        return cls(
            model_type=family,
            vocab_size=hf.vocab_size,
            hidden_size=hf.hidden_size,
            intermediate_size=hf.intermediate_size,
            num_hidden_layers=hf.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=hf.rms_norm_eps,
            rope=rope,
            max_position_embeddings=hf.max_position_embeddings,
            tie_word_embeddings=hf.tie_word_embeddings,
            qkv_bias=attention_bias or family == "qwen2",
            o_bias=attention_bias,
            mlp_bias=family == "llama" and hf.mlp_bias,
            qk_norm=family == "qwen3",
            sliding_window=_effective_sliding_window(hf, family, file),
            dtype=_checkpoint_dtype(raw, path),
            eos_token_ids=special["eos_token_id"],
            bos_token_id=next(iter(special["bos_token_id"]), None),
        )

    def check_context(self, max_model_len: int) -> None:
        """Check that no layer's sliding window would hide tokens, as sliding windows are not implemented.

        Raises:
            ValueError: the window is shorter than ``max_model_len``; names both.
        """
        if self.sliding_window is not None and self.sliding_window < max_model_len:
            raise ValueError(
                f"sliding_window={self.sliding_window} of this {self.model_type} checkpoint is shorter than "
                f"max_model_len={max_model_len}, and sliding windows are not supported; "
                f"use max_model_len={self.sliding_window} or less"
            )


def _supported_family(raw: dict[str, Any], file: Path) -> str:
    """Check that the model is supported; return its model_type. Runs before transformers reads the file, for clear errors."""
    family, architectures = raw.get("model_type"), raw.get("architectures")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise ValueError(f"{file}: model_type={shown(family)} is not supported; {_SUPPORTED}")
    if architectures not in (None, []) and not (isinstance(architectures, list) and ARCHITECTURES[family] in architectures):
        raise ValueError(
            f"{file}: architectures={shown(architectures)} is not supported; only {ARCHITECTURES[family]} is for {family}"
        )
    for key in ("quantization_config", "compression_config"):
        method = raw[key].get("quant_method") if isinstance(raw.get(key), dict) else raw.get(key)
        # A GGUF converted to float weights keeps this entry. Weights that are not float are rejected later by their dtype.
        if raw.get(key) not in (None, {}) and method != "gguf":
            raise ValueError(
                f"{file}: {key}: quantised checkpoints ({shown(method)}) are not supported; "
                "use one in float32, float16 or bfloat16"
            )
    for key, neutral in _NEUTRAL.items():
        if raw.get(key, neutral) != neutral:
            raise ValueError(f"{file}: {key}={shown(raw[key])} is not supported; use a checkpoint without it")
    return family


def _transformers_config(raw: Mapping[str, Any], family: str, file: Path) -> Any:
    """transformers' config object of the family, from the keys that describe the model's shape; it fills in defaults."""
    from transformers import CONFIG_MAPPING  # imported here, as it takes seconds

    shape = {key: raw[key] for key in (*_SIZES, *_FLAGS, *_OTHERS) if key in raw}
    for key, value in shape.items():
        name = f"{file}: {key}"
        if key in _FLAGS:
            check_bool(name, value)
        elif key == "rms_norm_eps":
            shape[key] = check_float(name, value, 0.0, remedy="give a number such as 1e-6")
        elif key == "layer_types":
            if value is not None and not (isinstance(value, list) and all(isinstance(layer, str) for layer in value)):
                raise ValueError(f"{name}={shown(value)} must be a list of 'full_attention' or 'sliding_attention' per layer")
        elif key in _SIZES:
            low, high, may_be_null = _SIZES[key]
            if value is not None or not may_be_null:
                check_int(name, value, low, high, remedy="give the value that the model was trained with")
    hidden, heads = shape.get("hidden_size"), shape.get("num_attention_heads")
    if family == "llama" and hidden and heads and hidden % heads:  # transformers rejects it for any head_dim
        raise ValueError(f"{file}: hidden_size={hidden} is not a multiple of num_attention_heads={heads}")
    try:
        return CONFIG_MAPPING[family](**shape)
    except Exception as error:  # one of a dozen classes
        raise ValueError(f"{file}: transformers rejects it: {' '.join(str(error).split())}") from error


def _effective_sliding_window(hf: Any, family: str, file: Path) -> int | None:
    """The sliding window if any layer uses it: all layers in Mistral, layers of type sliding_attention in other families."""
    # Without layer_types, transformers derives Qwen's from use_sliding_window and max_window_layers.
    used = set(getattr(hf, "layer_types", None) or ())
    if unknown := used - {"full_attention", "sliding_attention"}:
        raise ValueError(f"{file}: layer_types {sorted(unknown)} are not supported; only full_attention is")
    window = getattr(hf, "sliding_window", None)
    if "sliding_attention" in used or (family == "mistral" and window is not None):
        return check_int(f"{file}: sliding_window", window, 1, remedy="layers use it: give the tokens that they see")
    return None


def _checkpoint_dtype(raw: Mapping[str, Any], path: Path) -> torch.dtype:
    """The dtype from config.json, else of the first weight in the files, else (no files: dummy weights) float32."""
    for key in ("dtype", "torch_dtype"):  # transformers prefers the first
        if raw.get(key) is not None:
            name = check_dtype(f"{path / 'config.json'}: {key}", raw[key])
            if name != "auto":
                return getattr(torch, name)
            break
    if not any(path.glob("*.safetensors")):
        return torch.float32
    with TensorFiles(path) as tensors:
        names = (dtype for _, dtype, _, _ in tensors.headers())
        return next((CHECKPOINT_DTYPES[name] for name in names if name in CHECKPOINT_DTYPES), torch.float32)


def _special_tokens(path: Path, config: Mapping[str, Any], vocab_size: int) -> dict[str, tuple[int, ...]]:
    """eos_token_id and bos_token_id, each from generation_config.json if it is there, else from config.json."""
    generation_file = path / "generation_config.json"
    generation = read_json(generation_file) if generation_file.is_file() else {}
    tokens: dict[str, tuple[int, ...]] = {}
    for key in ("eos_token_id", "bos_token_id"):
        stated = key in generation and (key == "eos_token_id" or generation[key] is not None)
        value, file = (generation[key], generation_file) if stated else (config[key], path / "config.json")
        ids = [] if value is None else value if isinstance(value, list) and key == "eos_token_id" else [value]
        remedy = f"the model has vocab_size={vocab_size}; correct it, or write null for a model without one"
        tokens[key] = tuple(dict.fromkeys(check_int(f"{file}: {key}", i, 0, vocab_size - 1, remedy=remedy) for i in ids))
    return tokens
