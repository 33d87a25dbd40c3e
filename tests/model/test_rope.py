"""Rotary angles equal those of transformers, for every rope type, length and position."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from distributed_sparse.model.rope import ROPE_TYPES, Rope, RopeConfig
from tests.support.checkpoints import LONGROPE, ROPE_PARAMETERS, tiny_config

YARN = ROPE_PARAMETERS["yarn"]
PARAMETERS: list[dict[str, Any]] = [
    *ROPE_PARAMETERS.values(),
    {**YARN, "truncate": False},
    {**YARN, "truncate": None},
    {**YARN, "factor": None},
    {**YARN, "beta_fast": 16, "beta_slow": 2},
    {**YARN, "beta_fast": None, "beta_slow": 0},
    {**YARN, "mscale": 1.0, "mscale_all_dim": 0.6},
    {**YARN, "attention_factor": 1.25},
    {**LONGROPE, "attention_factor": 1.5},
    {name: value for name, value in LONGROPE.items() if name != "factor"},
]


def raw_config(family: str = "llama", **keys: Any) -> dict[str, Any]:
    """A config.json with these keys for its rotary embedding, and no others for it."""
    content = json.loads(tiny_config(family).to_json_string(use_diff=False))
    return {key: value for key, value in content.items() if key != "rope_parameters"} | keys


def rope_of(raw: dict[str, Any]) -> Rope:
    return Rope(RopeConfig.from_config(raw, raw["head_dim"], raw["max_position_embeddings"]))


def transformers_rope(raw: dict[str, Any], folder: Path) -> LlamaRotaryEmbedding | Qwen3RotaryEmbedding:
    """What transformers makes of that file."""
    (folder / "config.json").write_text(json.dumps(raw))
    hf: Any = AutoConfig.from_pretrained(folder)
    return (Qwen3RotaryEmbedding if raw["model_type"] == "qwen3" else LlamaRotaryEmbedding)(hf)


def assert_same_angles(rope: Rope, reference: LlamaRotaryEmbedding | Qwen3RotaryEmbedding, length: int) -> None:
    positions = torch.arange(length)
    expected = [part[0, :, :8] for part in reference(torch.zeros(1), positions[None])]
    found = rope.cos_sin(positions, torch.full((length,), length))
    for ours, theirs in zip(found, expected):
        assert ours.dtype == torch.float32 and ours.shape == (length, 8)
        # A relative error of 1e-7 in a frequency is an error of 2e-4 in an angle of 2000 radians.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 + 2e-7 * length)


def test_every_rope_type_is_among_the_cases() -> None:
    assert {parameters["rope_type"] for parameters in PARAMETERS} == set(ROPE_TYPES)


@pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda parameters: parameters["rope_type"])
@pytest.mark.parametrize("length", [30, 32, 33, 512, 2000])
def test_cosines_and_sines_equal_transformers(tmp_path: Path, parameters: dict[str, Any], length: int) -> None:
    """Lengths below, at and past longrope's 32, and past the 512 of dynamic."""
    raw = raw_config(rope_parameters=parameters)
    assert_same_angles(rope_of(raw), transformers_rope(raw, tmp_path), length)


def split(parameters: dict[str, Any], *moved: str, into: str, rename: dict[str, str] | None = None) -> dict[str, Any]:
    """The same parameters, those `moved` at the top level of config.json, the others in the object `into`."""
    inner = {(rename or {}).get(key, key): value for key, value in parameters.items() if key not in moved}
    return {into: inner} | {key: parameters[key] for key in moved if key in parameters}


ORIGINAL = "original_max_position_embeddings"
PLACES = {
    "rope_parameters": lambda p: {"rope_parameters": p},
    "rope_scaling": lambda p: split(p, "rope_theta", into="rope_scaling"),
    "theta inside rope_scaling": lambda p: {"rope_scaling": p},
    "type": lambda p: split(p, "rope_theta", into="rope_scaling", rename={"rope_type": "type"}),
    "type and rope_type disagree": lambda p: {"rope_scaling": {**p, "type": "linear"}},
    "original at the top, rope_scaling": lambda p: split(p, "rope_theta", ORIGINAL, into="rope_scaling"),
    "original at the top, rope_parameters": lambda p: split(p, ORIGINAL, into="rope_parameters"),
    "original at the top and inside disagree": lambda p: {"rope_parameters": {**p, ORIGINAL: 16}, ORIGINAL: 128},
    "original nowhere": lambda p: {"rope_scaling": {key: value for key, value in p.items() if key != ORIGINAL}},
    "theta at the top and inside disagree": lambda p: {"rope_parameters": p, "rope_theta": 77.0},
    "theta is null at the top": lambda p: {"rope_parameters": p, "rope_theta": None},
    "theta nowhere": lambda p: {"rope_scaling": {key: value for key, value in p.items() if key != "rope_theta"}},
    "rope_scaling and rope_parameters disagree": lambda p: {
        "rope_scaling": p,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 3.0, "factor": 2.0},
    },
    "rope_scaling is empty": lambda p: {"rope_scaling": {}, "rope_parameters": p},
    "rope_scaling is null": lambda p: {"rope_scaling": None, "rope_parameters": p},
    "partial_rotary_factor is 1": lambda p: {"rope_parameters": p, "partial_rotary_factor": 1.0},
    "keys that the type does not use": lambda p: {"rope_parameters": {**p, "mrope_section": [2, 3, 3], "unheard_of": "x"}},
}


@pytest.mark.parametrize("place", PLACES)
def test_a_key_counts_from_where_transformers_takes_it(tmp_path: Path, place: str) -> None:
    for rope_type, family in itertools.product(ROPE_TYPES, ("llama", "qwen3")):
        raw = raw_config(family, **PLACES[place](ROPE_PARAMETERS[rope_type]))
        rope, reference = rope_of(raw), transformers_rope(raw, tmp_path)
        for length in (30, 120, 600):  # on both sides of every original length above
            assert_same_angles(rope, reference, length)


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_tokens_of_different_sequences_in_one_step_do_not_mix_their_lengths(rope_type: str) -> None:
    rope = rope_of(raw_config(rope_parameters=ROPE_PARAMETERS[rope_type], max_position_embeddings=100))
    positions, lengths = torch.tensor([3, 50, 119, 7]), torch.tensor([20, 90, 120, 700])
    together = rope.cos_sin(positions, lengths)
    for i in range(4):
        alone = rope.cos_sin(positions[i : i + 1], lengths[i : i + 1])
        assert torch.equal(together[0][i], alone[0][0]) and torch.equal(together[1][i], alone[1][0])


@pytest.mark.parametrize(
    ("rope_type", "depends"), [("default", False), ("llama3", False), ("dynamic", True), ("longrope", True)]
)
def test_only_dynamic_and_longrope_look_at_the_length(rope_type: str, depends: bool) -> None:
    rope = rope_of(raw_config(rope_parameters=ROPE_PARAMETERS[rope_type]))
    positions = torch.arange(5)
    short, long = (rope.cos_sin(positions, torch.full((5,), length))[0] for length in (10, 5000))
    assert torch.equal(short, long) is not depends


@pytest.mark.parametrize(
    ("keys", "head_dim", "message"),
    [
        ({"rope_parameters": {"rope_type": "mrope"}}, 16, "rope_type='mrope' is not supported.*longrope"),
        ({"rope_scaling": {"rope_type": None, "type": "yarn"}}, 16, "rope_type=None is not supported"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, 16, r"rope_type=\['yarn'\] is not supported"),
        ({"rope_scaling": "yarn"}, 16, "rope_scaling='yarn' must be an object"),
        ({"rope_parameters": [1]}, 16, r"rope_parameters=\[1\] must be an object"),
        ({"partial_rotary_factor": 0.5}, 16, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"partial_rotary_factor": "1"}}, 16, "partial_rotary_factor='1'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, 16, "per layer type .full_attention."),
        ({}, 15, "head_dim=15 is odd"),
        ({"rope_theta": None}, 16, "rope_theta=None must be a number"),
        ({"rope_theta": "1e4"}, 16, "rope_theta='1e4' must be a number"),
        ({"rope_theta": 0}, 16, "rope_theta=0 must be finite, > 0"),
        ({"rope_parameters": {**ROPE_PARAMETERS["linear"], "factor": "8.0"}}, 16, "factor='8.0' must be a number"),
        ({"rope_parameters": {**ROPE_PARAMETERS["llama3"], "low_freq_factor": None}}, 16, "low_freq_factor=None must be"),
        ({"rope_parameters": {**ROPE_PARAMETERS["llama3"], "high_freq_factor": True}}, 16, "high_freq_factor=True must be"),
        ({"rope_parameters": YARN, "original_max_position_embeddings": None}, 16, "original_max_position_embeddings=None"),
        ({"rope_parameters": YARN, "original_max_position_embeddings": 0}, 16, "original_max_position_embeddings=0 must"),
        ({"rope_parameters": {**YARN, "truncate": "no"}}, 16, "truncate='no' must be true or false"),
        ({"rope_parameters": {"rope_type": "yarn"}}, 16, "cannot be computed: KeyError.'factor'"),
        ({"rope_parameters": {**YARN, "rope_theta": 1.0}}, 16, "'rope_theta': 1.0.* cannot be computed: ZeroDivisionError"),
        ({"rope_parameters": ROPE_PARAMETERS["dynamic"]}, 2, "cannot be computed: ZeroDivisionError"),
        ({"rope_parameters": LONGROPE}, 32, "short_factor has 8 entries; head_dim=32 needs 16"),
        ({"rope_parameters": {**LONGROPE, "long_factor": 2.0}}, 16, "long_factor=2.0 must be a list of 8 numbers"),
        ({"rope_parameters": {**LONGROPE, "long_factor": [1.0] * 7 + ["2"]}}, 16, "long_factor='2' must be a number"),
        ({"rope_parameters": {**LONGROPE, "long_factor": [1.0] * 7 + [1e-50]}}, 16, "long_factor.* is not finite"),
    ],
)
def test_what_cannot_be_rotated_is_refused_by_name(keys: dict[str, Any], head_dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeConfig.from_config(keys, head_dim, 512)


def test_reading_a_config_does_not_change_it() -> None:
    raw = raw_config(rope_scaling={"type": "yarn", "factor": 2.0})
    before = json.dumps(raw)
    rope_of(raw)
    assert json.dumps(raw) == before
