"""config: what a checkpoint's config.json says about the model, typed, and refused early where it cannot be run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from distributed_sparse.model.checkpoint import TensorFiles
from distributed_sparse.model.rope import RopeConfig

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""model_type -> the one architecture of that family that is decoded here."""

CHECKPOINT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes that weights may have in a file, by their safetensors names."""

_SUPPORTED = "supported are Llama 2/3/3.1+ (llama), Mistral (mistral), Qwen2/2.5 (qwen2) and Qwen3 (qwen3)"


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape and conventions, the same for all families. Sizes are those of the whole model, never of a rank."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    hidden_act: str
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    """Whether q and k pass an RMSNorm over head_dim before the rotary embedding (Qwen3)."""
    sliding_window: int | None
    """Tokens that the narrowest layer sees, its own included; None if no layer would use a window."""
    dtype: torch.dtype
    """Of the checkpoint."""
    eos_token_ids: tuple[int, ...]
    """Each of them ends a sequence; empty if the checkpoint names none."""
    bos_token_id: int | None

    @classmethod
    def from_pretrained(cls, path: Path) -> ModelConfig:
        """Read config.json and generation_config.json of a local checkpoint, as transformers reads them.

        Both ways of writing rotary parameters are read: ``rope_parameters``, and the older ``rope_theta`` and
        ``rope_scaling``.

        Raises:
            ValueError: config.json is malformed, or describes a model that is not supported (named, with the list of what is).
        """
        file = path / "config.json"
        raw = _read_json(file)
        family = _supported_family(raw, file)
        try:
            hf = AutoConfig.from_pretrained(path, trust_remote_code=False)
        except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
            raise ValueError(f"{file} is refused by transformers: {error}") from error

        generation_file = path / "generation_config.json"
        generation = _read_json(generation_file) if generation_file.is_file() else {}
        heads, kv_heads = hf.num_attention_heads, hf.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(f"{file}: num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}")
        if hf.hidden_act != "silu":
            raise ValueError(f"{file}: hidden_act={hf.hidden_act!r} is not supported; only 'silu' is")
        head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // heads
        # As in transformers' modules: Qwen2 always has the bias on q, k, v alone, Mistral never, the others by a flag.
        attention_bias = family in ("llama", "qwen3") and bool(hf.attention_bias)
        bos = generation.get("bos_token_id")
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
            hidden_act=hf.hidden_act,
            rope=RopeConfig.from_parameters(hf.rope_parameters, head_dim, hf.max_position_embeddings),
            max_position_embeddings=hf.max_position_embeddings,
            tie_word_embeddings=bool(hf.tie_word_embeddings),
            qkv_bias=attention_bias or family == "qwen2",
            o_bias=attention_bias,
            mlp_bias=family == "llama" and bool(hf.mlp_bias),
            qk_norm=family == "qwen3",
            sliding_window=_effective_sliding_window(hf, family, file),
            dtype=_checkpoint_dtype(hf, path),
            eos_token_ids=_token_ids(generation.get("eos_token_id", hf.eos_token_id)),
            bos_token_id=bos if bos is not None else hf.bos_token_id,
        )

    def check_context(self, max_model_len: int) -> None:
        """Refuse a context in which a layer's sliding window would hide tokens: attention here sees the whole context.

        Raises:
            ValueError: the window is shorter than ``max_model_len``; names both.
        """
        if self.sliding_window is not None and self.sliding_window < max_model_len:
            raise ValueError(
                f"sliding_window={self.sliding_window} of this {self.model_type} checkpoint is shorter than "
                f"max_model_len={max_model_len}, and sliding windows are not supported; "
                f"use max_model_len={self.sliding_window} or less"
            )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not an object")
    return content


def _supported_family(raw: dict[str, Any], file: Path) -> str:
    """The model_type, once it is one that runs here. Decided before transformers sees the file, so that the error is ours."""
    family = raw.get("model_type")
    architectures = raw.get("architectures") or []
    if family not in ARCHITECTURES:
        raise ValueError(f"{file}: model_type={family!r} is not supported; {_SUPPORTED}")
    if architectures and ARCHITECTURES[family] not in architectures:
        raise ValueError(
            f"{file}: architectures={architectures} is not supported; only {ARCHITECTURES[family]} is for {family}"
        )
    if quantization := raw.get("quantization_config") or raw.get("compression_config"):
        method = quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else quantization
        raise ValueError(f"{file}: quantised checkpoints ({method}) are not supported; use one in float32, float16 or bfloat16")
    return family


def _effective_sliding_window(hf: Any, family: str, file: Path) -> int | None:
    """The window if any layer would use it: Mistral's is on all layers, Qwen's on those whose layer type says so."""
    if family == "mistral":
        return hf.sliding_window
    if family not in ("qwen2", "qwen3"):
        return None
    # transformers derives layer_types from use_sliding_window and max_window_layers where the file has none.
    used = set(hf.layer_types[: hf.num_hidden_layers])
    if unknown := used - {"full_attention", "sliding_attention"}:
        raise ValueError(f"{file}: layer_types {sorted(unknown)} are not supported; only full_attention is")
    return hf.sliding_window if "sliding_attention" in used else None


def _checkpoint_dtype(hf: Any, path: Path) -> torch.dtype:
    """As config.json says, else as the first weight in the files has it, else (no files: dummy weights) float32."""
    if isinstance(hf.dtype, torch.dtype):
        return hf.dtype
    if not any(path.glob("*.safetensors")):
        return torch.float32
    with TensorFiles(path) as tensors:
        names = (dtype for _, dtype, _, _ in tensors.headers())
        return next((CHECKPOINT_DTYPES[name] for name in names if name in CHECKPOINT_DTYPES), torch.float32)


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
