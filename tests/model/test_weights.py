"""A rank reads its own slices of a checkpoint and nothing else, and a checkpoint that does not fit is refused by name."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distributed_sparse.model import checkpoint, weights
from distributed_sparse.model.config import ModelConfig
from distributed_sparse.model.sharding import ShardSpec
from distributed_sparse.model.weights import Weights, load_weights
from tests.support.checkpoints import tiny_checkpoint
from tests.support.dense_model import dense_logits


def load(
    path: Path, rank: int = 0, world_size: int = 1, dtype: torch.dtype = torch.float32, load_format: str = "auto"
) -> Weights:
    return load_weights(path, ModelConfig.from_pretrained(path), ShardSpec(rank, world_size), dtype, "cpu", load_format)


def edit(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite a checkpoint's one file after ``change`` has been at its tensors."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_bytes_that_ranks_read_add_up_to_the_file_and_the_replicated_tensors(
    tmp_path: Path, family: str, world_size: int
) -> None:
    path = tiny_checkpoint(tmp_path, family, intermediate_size=61, dtype=torch.bfloat16)
    tensors = load_file(path / "model.safetensors")
    whole = sum(tensor.nbytes for tensor in tensors.values())
    replicated = sum(tensor.nbytes for name, tensor in tensors.items() if name.endswith("norm.weight"))
    read = [load(path, rank, world_size).bytes_read for rank in range(world_size)]
    assert sum(read) == whole + (world_size - 1) * replicated
    # Equal shares up to one row of the vocabulary matrices and one of the MLP's per layer.
    assert max(read) - min(read) <= 2 * (2 * 3 * 64 + 3 * 3 * 3 * 64)


def test_bytes_read_are_those_asked_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted at the file's own interface, so that reading a whole tensor and keeping a slice of it would show."""
    path = tiny_checkpoint(tmp_path)
    taken: list[int] = []

    class Counting:
        def __init__(self, tensor: object) -> None:
            self.tensor = tensor

        def __getitem__(self, index: object) -> Tensor:
            part = self.tensor[index]  # type: ignore[index]
            taken.append(part.nbytes)
            return part

        def __getattr__(self, name: str) -> object:
            return getattr(self.tensor, name)

    original = checkpoint.TensorFiles.tensor
    monkeypatch.setattr(checkpoint.TensorFiles, "tensor", lambda self, name: Counting(original(self, name)))
    weights = load(path, 1, 4)
    assert sum(taken) == weights.bytes_read
    file_bytes = sum(tensor.nbytes for tensor in load_file(path / "model.safetensors").values())
    assert weights.bytes_read < 0.26 * file_bytes


def test_a_rank_holds_its_share_in_memory_in_the_dtype_asked_for(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, attention_bias=True, mlp_bias=True)
    whole, quarter = load(path), load(path, 3, 4)
    replicated = (
        sum(t.nbytes for layer in whole.layers for t in (layer.input_norm, layer.post_attention_norm)) + whole.norm.nbytes
    )
    replicated += sum(bias.nbytes for layer in whole.layers for bias in (layer.o_bias, layer.down_bias) if bias is not None)
    padding = 2 * 64 * 4 / 4  # vocabulary 331 is padded to 332, twice
    assert quarter.nbytes == (whole.nbytes - replicated) / 4 + replicated + padding
    half = load(path, dtype=torch.bfloat16)
    assert half.nbytes == whole.nbytes / 2 and all(tensor.dtype == torch.bfloat16 for tensor in half.tensors())


@pytest.mark.parametrize("rank", [0, 1])
def test_projections_lie_fused_with_this_ranks_heads(tmp_path: Path, rank: int) -> None:
    path = tiny_checkpoint(tmp_path, "qwen2", intermediate_size=61)
    tensors = load_file(path / "model.safetensors")
    layer = load(path, rank, 2).layers[1]
    prefix = "model.layers.1."
    q, k, v = (tensors[f"{prefix}self_attn.{name}_proj.weight"].chunk(2)[rank] for name in "qkv")
    assert torch.equal(layer.qkv, torch.cat([q, k, v]))
    biases = (tensors[f"{prefix}self_attn.{name}_proj.bias"].chunk(2)[rank] for name in "qkv")
    assert layer.qkv_bias is not None and torch.equal(layer.qkv_bias, torch.cat(list(biases)))
    assert torch.equal(layer.o, tensors[f"{prefix}self_attn.o_proj.weight"].chunk(2, dim=1)[rank])
    rows = slice(31 * rank, 31 * (rank + 1))
    down = tensors[f"{prefix}mlp.down_proj.weight"][:, rows]
    assert torch.equal(layer.down[:, : down.shape[1]], down)
    for half, name in zip(layer.gate_up.chunk(2), ("gate", "up")):
        expected = tensors[f"{prefix}mlp.{name}_proj.weight"][rows]
        assert torch.equal(half[: len(expected)], expected)
        assert half.shape == (31, 64) and not half[len(expected) :].any()


def test_tied_embeddings_share_their_storage(tmp_path: Path) -> None:
    tied = load(tiny_checkpoint(tmp_path / "tied", tie_word_embeddings=True))
    untied = load(tiny_checkpoint(tmp_path / "untied"))
    assert tied.lm_head.data_ptr() == tied.embedding.data_ptr()
    assert untied.nbytes - tied.nbytes == untied.lm_head.nbytes == untied.bytes_read - tied.bytes_read


def test_a_tied_checkpoint_that_stores_lm_head_as_well_shares_it_if_it_is_the_same(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, tie_word_embeddings=True)
    edit(path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    weights = load(path, 1, 2)
    assert weights.lm_head is weights.embedding
    edit(path, lambda tensors: tensors["lm_head.weight"].neg_())
    weights = load(path, 1, 2)
    assert torch.equal(weights.lm_head, -weights.embedding)


def test_a_tied_checkpoint_may_store_lm_head_alone(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, tie_word_embeddings=True)
    expected = load(path).embedding
    edit(path, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    assert torch.equal(load(path).embedding, expected)


def test_a_checkpoint_in_many_files_is_the_same_as_in_one(tmp_path: Path) -> None:
    one = tiny_checkpoint(tmp_path / "one")
    many = tiny_checkpoint(tmp_path / "many", max_shard_size="60KB")
    assert len(list(many.glob("*.safetensors"))) > 3
    for rank in range(2):
        left, right = load(one, rank, 2), load(many, rank, 2)
        assert left.bytes_read == right.bytes_read
        assert all(torch.equal(a, b) for a, b in zip(left.tensors(), right.tensors(), strict=True))


def test_a_missing_tensor_is_named_with_its_shape(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    edit(path, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"tensor model.layers.2.mlp.up_proj.weight of shape \[96, 64\] is missing"):
        load(path)


def test_a_tensor_of_the_wrong_shape_is_named_with_its_file_and_both_shapes(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, max_shard_size="60KB")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": 340}))
    message = (
        r"tensor model.embed_tokens.weight in .*model-0000.*safetensors has shape \[331, 64\]; config.json asks for \[340, 64\]"
    )
    with pytest.raises(ValueError, match=message):
        load(path)


def test_a_tensor_of_another_dtype_is_refused(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    edit(path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
    with pytest.raises(ValueError, match=r"tensor model.norm.weight of shape \[64\] in .* has dtype I8; supported are F32"):
        load(path)


def test_weights_that_the_config_would_leave_out_are_refused(tmp_path: Path) -> None:
    """A Qwen2 checkpoint under a Llama config would answer, but without its biases."""
    path = tiny_checkpoint(tmp_path)
    bias = "model.layers.0.self_attn.q_proj.bias"
    edit(path, lambda tensors: tensors.update({bias: torch.ones(128)}))
    with pytest.raises(ValueError, match=f"model.safetensors holds {bias}, for which .*config.json .*has no use"):
        load(path)


def test_frequencies_that_old_checkpoints_store_are_ignored(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    expected = load(path).bytes_read
    edit(path, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert load(path).bytes_read == expected


def test_dummy_weights_are_the_same_model_at_any_world_size(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, "qwen2", num_hidden_layers=2, intermediate_size=61)
    (path / "model.safetensors").unlink()
    whole = load(path, load_format="dummy")
    ranks = [load(path, rank, 2, load_format="dummy") for rank in range(2)]
    assert torch.equal(torch.cat([rank.embedding for rank in ranks])[:331], whole.embedding)
    assert torch.equal(torch.cat([rank.layers[1].o for rank in ranks], dim=1), whole.layers[1].o)
    up = torch.cat([rank.layers[0].gate_up.chunk(2)[1] for rank in ranks])
    assert torch.equal(up[:61], whole.layers[0].gate_up.chunk(2)[1]) and not up[61:].any()
    assert whole.bytes_read == 0
    assert not torch.equal(whole.layers[0].o, whole.layers[1].o)
    assert torch.equal(whole.norm, torch.ones(64)) and abs(whole.embedding.std() - 0.02) < 0.001


def test_an_unknown_load_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="load_format='pickle' is unknown; use one of auto, dummy"):
        load(tiny_checkpoint(tmp_path), load_format="pickle")


def test_the_progress_bar_ends_at_the_bytes_of_this_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "BAR_DELAY_S", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    path = tiny_checkpoint(tmp_path)
    capsys.readouterr()
    config = ModelConfig.from_pretrained(path)
    load_weights(path, config, ShardSpec(1, 2), torch.float32, "cpu")
    assert "Loading weights (rank" not in capsys.readouterr().err
    load_weights(path, config, ShardSpec(1, 2), torch.float32, "cpu", progress=True)
    shown = capsys.readouterr().err
    assert "Loading weights (rank 1): 100%" in shown


def test_a_checkpoint_needs_no_tokenizer(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    assert not list(path.glob("tokenizer*"))
    assert dense_logits(path, [3, 1, 4]).shape == (3, 331)
