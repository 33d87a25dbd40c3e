"""models: the models of the whole-engine benchmarks: a shape with dummy weights, or a checkpoint."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distributed_sparse.model.checkpoint import resolve_checkpoint
from distributed_sparse.model.config import ModelConfig
from distributed_sparse.model.limits import resolve_device, resolve_dtype

ATTENTION_HEAVY, NEGLIGIBLE = "attention-heavy", "negligible"

CONFIGS: dict[str, dict[str, Any]] = {
    ATTENTION_HEAVY: {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 1 << 20,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
}
CONFIGS[NEGLIGIBLE] = CONFIGS[ATTENTION_HEAVY] | {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "head_dim": 64,
}
"""Shapes by name. Attention dominates `ATTENTION_HEAVY` at moderate contexts; GPU kernels support both head_dims."""

SHAPES = Path(__file__).resolve().parents[3] / "configs" / "models"
"""The repository's shapes of public models."""


@dataclass(frozen=True)
class BenchModel:
    """A folder that an engine can load with `load_format`, and the dtype and device to run it."""

    path: Path
    load_format: str
    config: ModelConfig
    dtype: torch.dtype
    device: torch.device

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@contextmanager
def bench_model(name: str, dtype: str = "auto", device: str = "cpu") -> Iterator[BenchModel]:
    """A model by its name in `CONFIGS` or in configs/models, a folder, or a hub id. Missing weights are dummies.

    Raises:
        ValueError: there is no such model.
    """
    with tempfile.TemporaryDirectory() as folder:
        if name in CONFIGS:
            path, load_format = Path(folder), "dummy"
            (path / "config.json").write_text(json.dumps(CONFIGS[name]))
        else:
            given = SHAPES / name if not Path(name).expanduser().exists() and (SHAPES / name).is_dir() else Path(name)
            local = given.expanduser().is_dir()
            load_format = "dummy" if local and not any(given.expanduser().glob("*.safetensors")) else "auto"
            path = resolve_checkpoint(str(given), load_format)
        config = ModelConfig.from_pretrained(path)
        yield BenchModel(path, load_format, config, resolve_dtype(dtype, config.dtype), resolve_device(device))
