"""Rotary angles equal those of transformers, for every rope type, length and position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from distributed_sparse.model.rope import ROPE_TYPES, Rope, RopeConfig
from tests.support.checkpoints import LONGROPE, ROPE_PARAMETERS, tiny_config

YARN = ROPE_PARAMETERS["yarn"]
PARAMETERS: list[dict[str, Any]] = [
    *ROPE_PARAMETERS.values(),
    {**YARN, "truncate": False},
    {**YARN, "beta_fast": 16, "beta_slow": 2},
    {**YARN, "mscale": 1.0, "mscale_all_dim": 0.6},
    {**YARN, "attention_factor": 1.25},
    {**LONGROPE, "attention_factor": 1.5},
    {name: value for name, value in LONGROPE.items() if name != "factor"},
]


def rope_of(parameters: dict[str, Any], **overrides: Any) -> tuple[Rope, LlamaRotaryEmbedding]:
    hf: Any = tiny_config("llama", rope_parameters=dict(parameters), **overrides)
    config = RopeConfig.from_parameters(hf.rope_parameters, hf.head_dim, hf.max_position_embeddings)
    return Rope(config), LlamaRotaryEmbedding(hf)


def test_every_rope_type_is_among_the_cases() -> None:
    assert {parameters["rope_type"] for parameters in PARAMETERS} == set(ROPE_TYPES)


@pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda parameters: parameters["rope_type"])
@pytest.mark.parametrize("length", [30, 32, 33, 512, 2000])
def test_cosines_and_sines_equal_transformers(parameters: dict[str, Any], length: int) -> None:
    """Lengths below, at and past longrope's 32, and past the 512 of dynamic."""
    rope, reference = rope_of(parameters)
    positions = torch.arange(length)
    expected = [part[0, :, :8] for part in reference(torch.zeros(1), positions[None])]
    found = rope.cos_sin(positions, torch.full((length,), length))
    for ours, theirs in zip(found, expected):
        assert ours.dtype == torch.float32 and ours.shape == (length, 8)
        # A relative error of 1e-7 in a frequency is an error of 2e-4 in an angle of 2000 radians.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 + 2e-7 * length)


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_tokens_of_different_sequences_in_one_step_do_not_mix_their_lengths(rope_type: str) -> None:
    rope, _ = rope_of(ROPE_PARAMETERS[rope_type], max_position_embeddings=100)
    positions, lengths = torch.tensor([3, 50, 119, 7]), torch.tensor([20, 90, 120, 700])
    together = rope.cos_sin(positions, lengths)
    for i in range(4):
        alone = rope.cos_sin(positions[i : i + 1], lengths[i : i + 1])
        assert torch.equal(together[0][i], alone[0][0]) and torch.equal(together[1][i], alone[1][0])


@pytest.mark.parametrize(
    ("rope_type", "depends"), [("default", False), ("llama3", False), ("dynamic", True), ("longrope", True)]
)
def test_only_dynamic_and_longrope_look_at_the_length(rope_type: str, depends: bool) -> None:
    rope, _ = rope_of(ROPE_PARAMETERS[rope_type])
    positions = torch.arange(5)
    short, long = (rope.cos_sin(positions, torch.full((5,), length))[0] for length in (10, 5000))
    assert torch.equal(short, long) is not depends


@pytest.mark.parametrize(
    ("parameters", "head_dim", "message"),
    [
        ({"rope_type": "mrope", "rope_theta": 1e4}, 16, "rope_type='mrope' is not supported.*longrope"),
        ({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}, 16, "partial_rotary_factor=0.5"),
        ({"full_attention": {"rope_type": "default", "rope_theta": 1e4}}, 16, "per layer type .full_attention."),
        ({"rope_type": "default", "rope_theta": 1e4}, 15, "head_dim=15 is odd"),
        (LONGROPE, 32, "short_factor has 8 entries; head_dim=32 needs 16"),
    ],
)
def test_what_cannot_be_rotated_is_refused_by_name(parameters: dict[str, Any], head_dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeConfig.from_parameters(parameters, head_dim, 512)
