"""tiny_shape: a model's config.json without weights, small enough for whole-engine benchmarks in tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distributed_sparse.tools.bench.models import ATTENTION_HEAVY, CONFIGS

SIZES: dict[str, Any] = {
    "vocab_size": 331,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


def tiny_shape(folder: Path, **overrides: Any) -> Path:
    """A folder that engines load with dummy weights: `CONFIGS[ATTENTION_HEAVY]` in small."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIGS[ATTENTION_HEAVY], **SIZES, **overrides}))
    return folder
