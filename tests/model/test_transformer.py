"""The decoder computes what transformers computes, for every family, and the same at any number of ranks."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed_sparse.model.config import ModelConfig
from distributed_sparse.model.sharding import ShardSpec
from distributed_sparse.model.transformer import Transformer
from distributed_sparse.model.weights import load_weights
from tests.support.checkpoints import ROPE_PARAMETERS, tiny_checkpoint, transformers_model
from tests.support.dense_model import DenseModel, SingleRank, dense_logits
from tests.support.thread_ranks import ThreadCollectives, run_ranks

PROMPT = [int(token) for token in torch.randint(0, 331, (70,), generator=torch.Generator().manual_seed(3))]

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 8}),
    ("llama", {"num_key_value_heads": 1, "head_dim": 64, "tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"head_dim": 24, "intermediate_size": 61, "rope_parameters": ROPE_PARAMETERS["yarn"]}),
    ("mistral", {}),
    ("mistral", {"head_dim": 32, "num_key_value_heads": 8}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}),
    ("qwen3", {}),
    ("qwen3", {"head_dim": 32, "attention_bias": True, "tie_word_embeddings": True}),
]


def assert_equal_logits(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Largest error at most ``tolerance`` of the logits' spread: fp32 sums in another order, and no more."""
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert (found - expected).abs().max() <= tolerance * expected.std()


@torch.no_grad()
def reference_logits(path: Path, token_ids: list[int]) -> Tensor:
    return transformers_model(path)(torch.tensor([token_ids])).logits[0]


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_logits_equal_those_of_transformers(tmp_path: Path, family: str, overrides: dict[str, Any]) -> None:
    path = tiny_checkpoint(tmp_path, family, **overrides)
    assert_equal_logits(dense_logits(path, PROMPT), reference_logits(path, PROMPT))


@pytest.mark.parametrize("rope_type", ROPE_PARAMETERS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_logits_equal_those_of_transformers_for_every_rope_type(tmp_path: Path, family: str, rope_type: str) -> None:
    # 70 tokens are more than dynamic's 40 and longrope's 32.
    limits: dict[str, Any] = {"max_position_embeddings": 40} if rope_type == "dynamic" else {}
    path = tiny_checkpoint(tmp_path, family, rope_parameters=ROPE_PARAMETERS[rope_type], **limits)
    assert_equal_logits(dense_logits(path, PROMPT), reference_logits(path, PROMPT))


@pytest.mark.parametrize("rope_type", ROPE_PARAMETERS)
def test_the_rope_type_matters_to_these_checkpoints(tmp_path: Path, rope_type: str) -> None:
    """Else the test above would pass with the rotary parameters ignored."""
    limits: dict[str, Any] = {"max_position_embeddings": 40} if rope_type == "dynamic" else {}
    path = tiny_checkpoint(tmp_path / "scaled", rope_parameters=ROPE_PARAMETERS[rope_type], **limits)
    plain = tiny_checkpoint(tmp_path / "plain", rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    expected = reference_logits(path, PROMPT)
    assert (expected - reference_logits(plain, PROMPT)).abs().max() > 0.1 * expected.std()


@pytest.mark.parametrize("rope_type", ["default", "dynamic", "longrope"])
@pytest.mark.parametrize("prefill_length", [20, 50])
def test_chunks_and_decode_steps_equal_transformers_across_the_original_length(
    tmp_path: Path, rope_type: str, prefill_length: int
) -> None:
    """A prompt below the border (32, 40) whose answer crosses it, and one beyond it that arrives in odd chunks."""
    limits: dict[str, Any] = {"max_position_embeddings": 40} if rope_type == "dynamic" else {}
    path = tiny_checkpoint(tmp_path, rope_parameters=ROPE_PARAMETERS[rope_type], **limits)

    model = DenseModel(path)
    borders = [0, 7, 8, prefill_length - 1, prefill_length]
    found = [model.logits(PROMPT[start:stop], prefill_length) for start, stop in pairwise(borders)]
    found += [model.logits([token], prefill_length) for token in PROMPT[prefill_length:]]

    reference = transformers_model(path)
    with torch.no_grad():
        output = reference(torch.tensor([PROMPT[:prefill_length]]), use_cache=True)
        expected = [output.logits[0]]
        for token in PROMPT[prefill_length:]:
            output = reference(torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)
            expected.append(output.logits[0])
    assert_equal_logits(torch.cat(found), torch.cat(expected))


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "intermediate_size": 61}),
        ("mistral", {"num_key_value_heads": 8}),
        ("qwen2", {"tie_word_embeddings": True, "intermediate_size": 9}),
        ("qwen3", {"head_dim": 32, "intermediate_size": 61, "attention_bias": True}),
    ],
)
def test_ranks_together_equal_transformers(tmp_path: Path, family: str, overrides: dict[str, Any], world_size: int) -> None:
    """Vocabulary 331 and these intermediate sizes are divided by no world size; of 9 rows, four ranks get 3, 3, 3, 0."""
    path = tiny_checkpoint(tmp_path, family, **overrides)
    expected = reference_logits(path, PROMPT)
    ranks = run_ranks(world_size, lambda collectives: dense_logits(path, PROMPT, collectives))
    for logits in ranks:
        assert_equal_logits(logits, expected)
        assert torch.equal(logits, ranks[0])  # or the ranks would sample different tokens


def test_every_token_of_the_vocabulary_is_embedded_by_one_rank(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, num_hidden_layers=1)
    everything = list(range(331))
    expected = reference_logits(path, everything)
    for logits in run_ranks(4, lambda collectives: dense_logits(path, everything, collectives)):
        assert_equal_logits(logits, expected)


def test_ranks_meet_twice_per_layer_and_once_for_the_embedding(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, num_hidden_layers=3, attention_bias=True)

    def count(collectives: ThreadCollectives) -> int:
        dense_logits(path, PROMPT[:5], collectives)
        return collectives.num_all_reduces

    assert run_ranks(2, count) == [7, 7]


def test_logits_of_chosen_rows_equal_those_rows_of_all(tmp_path: Path) -> None:
    model = DenseModel(tiny_checkpoint(tmp_path)).transformer
    positions = torch.arange(30)
    tokens = torch.tensor(PROMPT[:30])
    hidden = model.forward(tokens, positions, positions + 1, lambda layer, q, *_: q)
    assert hidden.shape == (30, 64)
    torch.testing.assert_close(model.logits(hidden[[4, 29]]), model.logits(hidden)[[4, 29]])
    assert model.logits(hidden[:0]).shape == (0, 331)  # a step in which no sequence wants logits


def test_attention_sees_each_layer_once_with_this_ranks_heads(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, "qwen3", num_hidden_layers=2, head_dim=32)

    def shapes(collectives: ThreadCollectives) -> list[tuple[int, ...]]:
        seen: list[tuple[int, ...]] = []

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            seen.append((layer, *q.shape, *k.shape, *v.shape, *cos.shape, *sin.shape))
            return q

        positions = torch.arange(6)
        DenseModel(path, collectives).transformer.forward(torch.tensor(PROMPT[:6]), positions, positions + 1, attention)
        return seen

    expected = [(layer, 6, 4, 32, 6, 2, 32, 6, 2, 32, 6, 16, 6, 16) for layer in (0, 1)]
    assert run_ranks(2, shapes) == [expected, expected]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_as_near_to_float32_as_transformers_own(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tiny_checkpoint(tmp_path, "qwen3")
    exact = reference_logits(path, PROMPT)
    with torch.no_grad():
        theirs = transformers_model(path, dtype)(torch.tensor([PROMPT])).logits[0].float()
    ours = DenseModel(path, dtype=dtype).logits(PROMPT, len(PROMPT))
    assert ours.dtype == torch.float32
    # Both round as often; 1.5 leaves room for luck, and would not hold with a norm or the rotation in half precision twice.
    assert (ours - exact).pow(2).mean().sqrt() <= 1.5 * (theirs - exact).pow(2).mean().sqrt()


@pytest.mark.parametrize("rope_scaling", [None, {"type": "linear", "factor": 4.0}, {"rope_type": "dynamic", "factor": 3.0}])
def test_an_older_config_with_rope_theta_and_rope_scaling_equals_transformers(
    tmp_path: Path, rope_scaling: dict[str, Any] | None
) -> None:
    path = tiny_checkpoint(tmp_path, max_position_embeddings=40)
    config = json.loads((path / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 700.0, "rope_scaling": rope_scaling, "torch_dtype": config.pop("dtype")}
    (path / "config.json").write_text(json.dumps(config))
    assert ModelConfig.from_pretrained(path).rope.rope_theta == 700.0
    assert_equal_logits(dense_logits(path, PROMPT), reference_logits(path, PROMPT))


@pytest.mark.parametrize("rope_type", ["yarn", "longrope", "llama3"])
@pytest.mark.parametrize("within", [False, True])
def test_an_original_length_at_the_top_of_the_config_equals_transformers(tmp_path: Path, rope_type: str, within: bool) -> None:
    """As Phi 3 writes it; with one within rope_scaling too, the one at the top counts."""
    path = tiny_checkpoint(tmp_path)
    config = json.loads((path / "config.json").read_text())
    del config["rope_parameters"]
    scaling = {key: value for key, value in ROPE_PARAMETERS[rope_type].items() if key != "original_max_position_embeddings"}
    misread = {**config, "rope_scaling": scaling}
    config = {**misread, "original_max_position_embeddings": 48}
    if within:
        misread["rope_scaling"] = config["rope_scaling"] = scaling | {"original_max_position_embeddings": 300}
    found = []
    for written in (config, misread):
        (path / "config.json").write_text(json.dumps(written))
        found.append(dense_logits(path, PROMPT))
        assert_equal_logits(found[-1], reference_logits(path, PROMPT))
    assert (found[0] - found[1]).abs().max() > 0.1 * found[0].std()  # so that the key matters here


def test_forward_never_waits_for_the_device(tmp_path: Path) -> None:
    """On the meta device a value cannot be read back: .item(), a mask used as an index, or a branch on data would raise."""
    path = tiny_checkpoint(tmp_path, "qwen3", rope_parameters=ROPE_PARAMETERS["longrope"])
    config, shard = ModelConfig.from_pretrained(path), ShardSpec(0, 1)
    weights = load_weights(path, config, shard, torch.float32, "meta")
    model = Transformer(config, shard, weights, SingleRank())
    tokens = torch.zeros(9, dtype=torch.int64, device="meta")
    hidden = model.forward(tokens, tokens, tokens, lambda layer, q, *_: q)
    assert model.logits(hidden).shape == (9, 331)
