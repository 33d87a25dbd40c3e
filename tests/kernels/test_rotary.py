"""rotary: each channel pair turned by its token's angle, for queries and keys of any layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from distributed_sparse.kernels.reference import rotary_reference
from tests.support.kernels import TOLERANCE, Implementation, assert_near

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HEADS_AND_DIMS = [(1, 1, 64), (6, 2, 96), (15, 3, 128), (7, 1, 256)]  # query heads, KV heads, head_dim


def angles(tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [N, d/2] of positions far into a long context."""
    inverse_frequency = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.randint(100_000, (tokens, 1)).double() * inverse_frequency
    return angle.cos().float(), angle.sin().float()


def rotate(implementation: Implementation, *args: Tensor) -> tuple[Tensor, Tensor]:
    return implementation.function("rotary")(*(x.to(implementation.device) for x in args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads_q", "heads_kv", "dim"), HEADS_AND_DIMS)
def test_queries_and_keys_turn_as_in_the_reference(implementation, heads_q, heads_kv, dim, dtype):
    torch.manual_seed(0)
    q, k = torch.randn(5, heads_q, dim).to(dtype), torch.randn(5, heads_kv, dim).to(dtype)
    cos, sin = angles(5, dim)
    for x, result in zip((q, k), rotate(implementation, q, k, cos, sin)):
        assert result.dtype == dtype and result.is_contiguous()
        assert_near(result, rotary_reference(x, cos, sin), TOLERANCE[dtype])


def test_float32_equals_transformers(implementation):
    torch.manual_seed(1)
    q, k = torch.randn(9, 4, 64), torch.randn(9, 2, 64)
    cos, sin = angles(9, 64)
    whole_cos, whole_sin = torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)
    expected = apply_rotary_pos_emb(q, k, whole_cos, whole_sin, unsqueeze_dim=1)
    for result, want in zip(rotate(implementation, q, k, cos, sin), expected):
        assert_near(result, want, 1e-7)


def test_views_of_a_fused_projection_are_rotated_and_left_as_they_are(implementation):
    torch.manual_seed(2)
    fused = torch.randn(7, 8, 128, device=implementation.device)
    before = fused.clone()
    cos, sin = (x.to(implementation.device) for x in angles(7, 128))
    q, k = implementation.function("rotary")(fused[:, :4], fused[:, 4:6], cos, sin)
    assert torch.equal(fused, before)
    assert_near(q, rotary_reference(fused[:, :4].cpu(), cos.cpu(), sin.cpu()), TOLERANCE[torch.float32])
    assert_near(k, rotary_reference(fused[:, 4:6].cpu(), cos.cpu(), sin.cpu()), TOLERANCE[torch.float32])


def test_an_attention_factor_in_cos_and_sin_scales_the_result(implementation):
    """YaRN folds its factor into the tables: the op must not assume cos^2 + sin^2 = 1."""
    torch.manual_seed(3)
    q, k = torch.randn(2, 2, 64), torch.randn(2, 1, 64)
    cos, sin = angles(2, 64)
    plain, scaled = rotate(implementation, q, k, cos, sin), rotate(implementation, q, k, 2 * cos, 2 * sin)
    for one, two in zip(plain, scaled):
        assert torch.equal(2 * one, two)


def test_no_tokens_give_no_tokens(implementation):
    q, k = rotate(implementation, torch.empty(0, 4, 64), torch.empty(0, 2, 64), torch.empty(0, 32), torch.empty(0, 32))
    assert q.shape == (0, 4, 64) and k.shape == (0, 2, 64)
