"""A checkpoint's config is read as transformers reads it, and what cannot be run is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_sparse.model.config import ModelConfig
from tests.support.checkpoints import CONFIGS, tiny_checkpoint, tiny_config


def write_config(folder: Path, family: str = "llama", generation: dict[str, Any] | None = None, **fields: Any) -> Path:
    """A config.json with these fields set (removed where ``"delete"`` is given), no weights."""
    content = json.loads(tiny_config(family).to_json_string(use_diff=False)) | fields
    (folder / "config.json").write_text(json.dumps({name: value for name, value in content.items() if value != "delete"}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.mark.parametrize("family", CONFIGS)
def test_sizes_are_read_for_every_family(tmp_path: Path, family: str) -> None:
    config = ModelConfig.from_pretrained(tiny_checkpoint(tmp_path, family, head_dim=32, dtype=torch.bfloat16))
    assert config.model_type == family
    assert (config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (331, 64, 96, 3)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 4, 32)
    assert config.dtype == torch.bfloat16
    assert config.qk_norm == (family == "qwen3")
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (family == "qwen2", False, False)


def test_head_dim_follows_from_the_hidden_size_where_the_config_has_none(tmp_path: Path) -> None:
    assert ModelConfig.from_pretrained(write_config(tmp_path, "qwen2", head_dim="delete")).head_dim == 8


@pytest.mark.parametrize(
    ("generation", "eos", "bos"),
    [
        (None, (2,), 1),
        ({"eos_token_id": 7}, (7,), 1),
        ({"eos_token_id": [7, 9], "bos_token_id": 5}, (7, 9), 5),
        ({"temperature": 0.6}, (2,), 1),
    ],
)
def test_every_eos_of_the_generation_config_counts_else_the_configs(
    tmp_path: Path, generation: dict[str, Any] | None, eos: tuple[int, ...], bos: int
) -> None:
    config = ModelConfig.from_pretrained(write_config(tmp_path, generation=generation))
    assert (config.eos_token_ids, config.bos_token_id) == (eos, bos)


def test_a_config_without_dtype_takes_that_of_the_weights(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, dtype=torch.float16)
    content = json.loads((path / "config.json").read_text())
    del content["dtype"]
    (path / "config.json").write_text(json.dumps(content))
    assert ModelConfig.from_pretrained(path).dtype == torch.float16


@pytest.mark.parametrize(
    ("family", "fields", "window"),
    [
        ("mistral", {"sliding_window": 64}, 64),
        ("mistral", {"sliding_window": None}, None),
        ("llama", {"sliding_window": 64}, None),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": False, "layer_types": "delete"}, None),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 3, "layer_types": "delete"}, None),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2, "layer_types": "delete"}, 64),
        ("qwen3", {"sliding_window": 64, "use_sliding_window": True, "layer_types": ["full_attention"] * 3}, None),
        (
            "qwen3",
            {"sliding_window": 64, "use_sliding_window": True, "layer_types": ["full_attention"] * 2 + ["sliding_attention"]},
            64,
        ),
    ],
)
def test_a_sliding_window_counts_only_where_a_layer_uses_it(
    tmp_path: Path, family: str, fields: dict[str, Any], window: int | None
) -> None:
    config = ModelConfig.from_pretrained(write_config(tmp_path, family, **fields))
    assert config.sliding_window == window
    config.check_context(64)  # every token sees its 64 tokens
    if window is None:
        config.check_context(10_000)
    else:
        with pytest.raises(ValueError, match=r"sliding_window=64 .* shorter than max_model_len=65"):
            config.check_context(65)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("llama", {"model_type": "mixtral"}, "model_type='mixtral' is not supported; supported are Llama .*Qwen3"),
        ("qwen3", {"model_type": "qwen3_moe"}, "model_type='qwen3_moe' is not supported"),
        ("llama", {"model_type": "delete"}, "model_type=None is not supported"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "only LlamaForCausalLM is for llama"),
        (
            "llama",
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "quantised checkpoints .gptq. are not supported",
        ),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads=8 is no multiple of num_key_value_heads=3"),
        ("llama", {"num_attention_heads": "eight"}, "config.json is refused by transformers.*num_attention_heads"),
        ("qwen3", {"layer_types": ["linear_attention"] * 3}, "linear_attention"),
        ("llama", {"rope_parameters": {"rope_type": "su", "rope_theta": 1e4}}, "rope_type='su' is not supported"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ("qwen3", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}, "per layer type"),
    ],
)
def test_a_model_that_cannot_be_run_is_refused_by_name(
    tmp_path: Path, family: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_pretrained(write_config(tmp_path, family, **fields))


@pytest.mark.parametrize(("text", "message"), [("{", "is not valid JSON"), ("[1]", "holds a list")])
def test_a_malformed_config_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config.json {message}"):
        ModelConfig.from_pretrained(tmp_path)


def test_old_and_new_rotary_parameters_mean_the_same(tmp_path: Path) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    variants: dict[str, dict[str, Any]] = {
        "new": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}},
        "old": {"rope_parameters": "delete", "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **scaling}},
        "older": {"rope_parameters": "delete", "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **scaling}},
    }
    for name, fields in variants.items():
        (tmp_path / name).mkdir()
        write_config(tmp_path / name, **fields)
    new, old, older = (ModelConfig.from_pretrained(tmp_path / name) for name in ("new", "old", "older"))
    assert new == old == older
    assert new.rope.rope_theta == 5e5 and new.rope.factor == 8.0 and new.rope.original_max_position_embeddings == 64
