"""The split of a model over ranks: every element of the checkpoint on the ranks that need it, and on no other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distributed_sparse.model.config import ModelConfig
from distributed_sparse.model.sharding import LocalSizes, ShardSpec, check_divisibility, slice_tensor, tensor_slices
from tests.support.checkpoints import tiny_config


@pytest.fixture
def config(tmp_path: Path) -> ModelConfig:
    tiny_config("llama", intermediate_size=61, attention_bias=True, mlp_bias=True).save_pretrained(tmp_path)
    return ModelConfig.from_pretrained(tmp_path)


def test_a_world_size_that_would_cut_a_kv_head_is_refused_with_the_sizes_that_work(config: ModelConfig) -> None:
    config = replace(config, num_key_value_heads=8, num_attention_heads=32)
    with pytest.raises(ValueError) as error:
        check_divisibility(config, 3)
    assert str(error.value) == "tensor_parallel_size=3 does not divide num_key_value_heads=8; use 1, 2, 4 or 8"
    with pytest.raises(ValueError, match="tensor_parallel_size=16 does not divide num_key_value_heads=8"):
        LocalSizes(config, ShardSpec(0, 16))
    with pytest.raises(ValueError, match="tensor_parallel_size=5 does not divide"):
        tensor_slices(config, ShardSpec(0, 5))


def test_a_world_size_that_would_cut_a_query_head_is_refused(config: ModelConfig) -> None:
    with pytest.raises(ValueError, match=r"tensor_parallel_size=4 does not divide num_attention_heads=6; use 1 or 2$"):
        check_divisibility(replace(config, num_attention_heads=6, num_key_value_heads=4), 4)


def test_a_single_kv_head_allows_one_rank_alone(config: ModelConfig) -> None:
    with pytest.raises(ValueError, match=r"num_key_value_heads=1; use 1$"):
        check_divisibility(replace(config, num_key_value_heads=1), 2)


@pytest.mark.parametrize(
    ("rank", "world_size", "message"), [(2, 2, r"rank=2 must lie in \[0, 2\)"), (0, 0, "must be at least 1")]
)
def test_a_rank_outside_its_world_is_refused(rank: int, world_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardSpec(rank, world_size)


def test_local_sizes_are_equal_on_all_ranks_and_cover_the_whole(config: ModelConfig) -> None:
    sizes = [LocalSizes(config, ShardSpec(rank, 4)) for rank in range(4)]
    for size in sizes:
        assert (size.num_attention_heads, size.num_key_value_heads) == (2, 1)
        assert (size.q_size, size.kv_size) == (32, 16)
        assert (size.vocab_size, size.intermediate_size) == (83, 16)  # 4 x 83 = 332 >= 331, 4 x 16 = 64 >= 61
    assert [size.first_key_value_head for size in sizes] == [0, 1, 2, 3]
    assert [size.first_token_id for size in sizes] == [0, 83, 166, 249]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_slices_of_all_ranks_join_to_the_whole_tensor(config: ModelConfig, world_size: int) -> None:
    ranks = [tensor_slices(config, ShardSpec(rank, world_size)) for rank in range(world_size)]
    for name, first in ranks[0].items():
        whole = torch.arange(torch.Size(first.shape).numel()).view(first.shape)
        read = [whole[rank[name].index] for rank in ranks]
        assert [part.numel() for part in read] == [rank[name].num_read for rank in ranks]
        if first.axis is None:
            assert all(torch.equal(part, whole) for part in read)
        else:
            assert torch.equal(torch.cat(read, first.axis), whole)
            assert all(rank[name].local_shape == first.local_shape for rank in ranks)


def test_only_norms_and_the_biases_added_after_the_sum_are_replicated(config: ModelConfig) -> None:
    slices = tensor_slices(config, ShardSpec(1, 2))
    replicated = {name.split(".", 3)[-1] for name, part in slices.items() if part.axis is None}
    assert replicated == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.o_proj.bias",
        "mlp.down_proj.bias",
        "weight",  # model.norm.weight
    }
    by_columns = {name.split(".", 3)[-1] for name, part in slices.items() if part.axis == 1}
    assert by_columns == {"self_attn.o_proj.weight", "mlp.down_proj.weight"}


def test_ranks_beyond_a_small_tensor_hold_padding_alone() -> None:
    parts = [slice_tensor("t", (5, 3), 0, ShardSpec(rank, 4)) for rank in range(4)]
    assert [(part.start, part.stop) for part in parts] == [(0, 2), (2, 4), (4, 5), (5, 5)]
    assert [part.num_read for part in parts] == [6, 6, 3, 0]
    assert all(part.local_shape == (2, 3) for part in parts)
