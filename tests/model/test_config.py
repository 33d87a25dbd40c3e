"""A checkpoint's config is read as transformers reads it, and what cannot be run is refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from distributed_sparse.model.config import ModelConfig
from distributed_sparse.model.rope import Rope
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
    ("generation", "fields", "eos", "bos"),
    [
        (None, {}, (2,), 1),
        (None, {"eos_token_id": None, "bos_token_id": None}, (), None),
        (None, {"eos_token_id": []}, (), 1),
        (None, {"eos_token_id": [330, 0, 330]}, (330, 0), 1),
        ({"eos_token_id": 7}, {}, (7,), 1),
        ({"eos_token_id": [7, 9], "bos_token_id": 5}, {}, (7, 9), 5),
        ({"eos_token_id": 7, "bos_token_id": None}, {"eos_token_id": -1}, (7,), 1),  # what does not count is not looked at
        ({"temperature": 0.6}, {}, (2,), 1),
        ({"eos_token_id": None}, {}, (), 1),
    ],
)
def test_every_eos_of_the_generation_config_counts_else_the_configs(
    tmp_path: Path, generation: dict[str, Any] | None, fields: dict[str, Any], eos: tuple[int, ...], bos: int | None
) -> None:
    config = ModelConfig.from_pretrained(write_config(tmp_path, generation=generation, **fields))
    assert (config.eos_token_ids, config.bos_token_id) == (eos, bos)


WRONG_TOKENS = ["2", [[2]], 2.0, True, -1, 331, 10**12, [2, 331], ["2"], [None], {"id": 2}]


@pytest.mark.parametrize("value", WRONG_TOKENS, ids=str)
def test_a_special_token_that_is_no_id_of_the_vocabulary_is_refused_with_its_file(tmp_path: Path, value: Any) -> None:
    shown = re.escape(repr(value[-1] if isinstance(value, list) else value))
    for name, write in (
        ("config.json", lambda key: write_config(tmp_path, **{key: value})),
        ("generation_config.json", lambda key: write_config(tmp_path, generation={key: value})),
    ):
        with pytest.raises(ValueError, match=rf"{tmp_path}/{name}: eos_token_id={shown} must be .*vocab_size=331.*null"):
            ModelConfig.from_pretrained(write("eos_token_id"))
        with pytest.raises(ValueError, match=rf"{tmp_path}/{name}: bos_token_id="):
            ModelConfig.from_pretrained(write("bos_token_id"))


def test_a_bos_is_one_token(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bos_token_id=\[1\] must be an integer, not list"):
        ModelConfig.from_pretrained(write_config(tmp_path, bos_token_id=[1]))


def of_dtype(folder: Path, **fields: Any) -> torch.dtype:
    """The dtype of a bfloat16 checkpoint whose config.json has these fields."""
    path = tiny_checkpoint(folder, dtype=torch.bfloat16, num_hidden_layers=1)
    content = json.loads((path / "config.json").read_text())
    del content["dtype"]
    (path / "config.json").write_text(json.dumps(content | fields))
    return ModelConfig.from_pretrained(path).dtype


def test_a_dtype_may_have_any_of_its_names_and_auto_is_that_of_the_weights(tmp_path: Path) -> None:
    names = {torch.float32: ("float32", "float", "fp32", "torch.float32"), torch.float16: ("float16", "half", "fp16", "FP16")}
    for dtype, spellings in names.items():
        for spelling in spellings:
            assert of_dtype(tmp_path, dtype=spelling) == of_dtype(tmp_path, torch_dtype=spelling) == dtype
    for absent in ({}, {"dtype": None}, {"dtype": "auto"}, {"torch_dtype": "auto"}, {"dtype": None, "torch_dtype": "bf16"}):
        assert of_dtype(tmp_path, **absent) == torch.bfloat16
    assert of_dtype(tmp_path, dtype="float16", torch_dtype="float32") == torch.float16  # as in transformers


@pytest.mark.parametrize("value", ["int8", "float8_e4m3fn", "float64", "torch", "", 16, True, ["float32"], {"": "float32"}])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_dtype_that_is_not_computed_in_is_refused_by_name(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"config.json: {key}={re.escape(repr(value))} is not known; use .*'bfloat16'"):
        ModelConfig.from_pretrained(write_config(tmp_path, **{"dtype": "delete", key: value}))


def test_a_gguf_that_was_converted_to_float_weights_is_no_quantised_checkpoint(tmp_path: Path) -> None:
    entry = {"quant_method": "gguf", "gguf_file": "model.Q4_1.gguf", "dequantize": False}
    assert ModelConfig.from_pretrained(write_config(tmp_path, quantization_config=entry)).hidden_size == 64
    for other in ({"quant_method": "fp8"}, {"bits": 4}, "gptq", ["gguf"], True):
        with pytest.raises(ValueError, match=r"config.json: quantization_config: quantised checkpoints"):
            ModelConfig.from_pretrained(write_config(tmp_path, quantization_config=other))


READ = [
    "model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "hidden_act",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "sliding_window", "max_window_layers",
    "layer_types", "dtype", "torch_dtype", "eos_token_id", "bos_token_id", "rope_theta", "rope_scaling", "rope_parameters",
    "partial_rotary_factor", "original_max_position_embeddings", "quantization_config", "compression_config", "is_causal",
    "per_layer_config", "transformers_weights",
]  # fmt: skip
"""Every key of config.json that is read."""

WRONG = [
    None, True, False, 0, 1, 3, -1, 5, 65, 2.5, 8.0, 1e999, 10**9, 2**63, 10**30, "", "8.0", "8", "x", "null",
    [], [8], ["8"], [[8]], [None], {}, {"": 8}, {"x": None}, {"rope_type": 5}, {"type": "yarn", "factor": "8.0"},
]  # fmt: skip


WINDOW = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")


@pytest.mark.parametrize(
    ("key", "family"),
    [
        pytest.param(key, family, marks=() if family == ("qwen3" if key in WINDOW else "llama") else pytest.mark.slow)
        for key in READ
        for family in CONFIGS
    ],
)
def test_any_value_of_any_key_is_read_as_in_transformers_or_refused_by_its_name(tmp_path: Path, key: str, family: str) -> None:
    """With every other key right, `ModelConfig` agrees with transformers or raises a ValueError that names file and key."""
    rope = {"rope_parameters": "delete", "rope_scaling": {"type": "yarn", "factor": 2.0, "rope_theta": 1e4}}
    window = {"use_sliding_window": True, "sliding_window": 64, "layer_types": "delete"} if key in WINDOW else {}
    for value in WRONG:
        path = write_config(tmp_path, family, **{**({} if key == "rope_parameters" else rope), **window, key: value})
        try:
            config = ModelConfig.from_pretrained(path)
        except ValueError as error:
            assert str(error).startswith(f"{tmp_path / 'config.json'}") and key in str(error), (value, str(error))
            continue
        try:
            hf: Any = AutoConfig.from_pretrained(path)
        except Exception:
            # transformers refuses these too, but their meaning is plain
            assert key == "rms_norm_eps" and type(value) is int, value
            continue
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps"):
            assert getattr(config, name) == getattr(hf, name), (value, name)
        if key == "head_dim" and value is None and family == "qwen2":
            hf.head_dim = 8  # transformers keeps the null, and fails in the model
        assert config.head_dim == (getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads)
        assert config.tie_word_embeddings == hf.tie_word_embeddings
        reference, ours = LlamaRotaryEmbedding(hf), Rope(config.rope)
        torch.testing.assert_close(ours.inv_freq, reference.inv_freq, msg=f"{key}={value!r}")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"), ("", "is not valid JSON"), ("[" * 100_000, "is not valid JSON"), ("[1]", "holds a list"),
        ('"x"', "holds a str"), ("null", "holds a NoneType"), (b"\xff", "is not valid JSON"), ('{"a": 1} {}', "is not"),
    ],
    ids=range(8),
)  # fmt: skip
def test_a_malformed_file_is_named(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    write_config(tmp_path)
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"{tmp_path}/{name} {message}"):
        ModelConfig.from_pretrained(tmp_path)


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
            "quantization_config: quantised checkpoints .'gptq'. are not supported",
        ),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads=8 is not a multiple of num_key_value_heads=3"),
        ("llama", {"num_attention_heads": "eight"}, "config.json: num_attention_heads='eight' must be an integer"),
        ("qwen3", {"layer_types": ["linear_attention"] * 3}, "linear_attention"),
        ("llama", {"layer_types": True}, "layer_types=True must be a list"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "sliding_window=None must be an integer"),
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
