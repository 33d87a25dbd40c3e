"""rotary_append: each channel pair of queries and keys turned by its token's angle, and the turned keys appended as ever."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from distributed_sparse.kernels.cache.append_torch import append_torch, rotate
from distributed_sparse.kernels.reference import append_reference, quantise_reference, rotary_reference
from tests.support.kernels import TOLERANCE, Implementation, assert_near, bits

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HEADS_AND_DIMS = [(1, 1, 64), (6, 2, 96), (15, 3, 128), (7, 1, 256), (16, 2, 64)]  # query heads, KV heads, head_dim
RUNS = {  # pages, starts, offsets, counts
    "decode": [(7, 0, 3, 1), (2, 1, 0, 1), (9, 2, 15, 1)],
    "a prompt over pages": [(7, 0, 13, 3), (3, 3, 0, 16), (9, 19, 0, 2)],
    "decode, a chunk, a padded row": [(2, 0, 4, 1), (0, 1, 0, 0), (5, 2, 15, 1), (6, 3, 0, 10), (0, 13, 0, 1)],
}


def angles(tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [N, d/2] of positions far into a long context."""
    inverse_frequency = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.randint(100_000, (tokens, 1)).double() * inverse_frequency
    return angle.cos().float(), angle.sin().float()


class Step:
    """A batch of un-rotated q, k, v with its runs, and a cache of ten pages of 16 tokens that others have written before."""

    def __init__(self, heads_q: int, heads: int, dim: int, dtype: torch.dtype, runs: list[tuple[int, ...]], key_bits: int = 4):
        tokens = max(start + count for _, start, _, count in runs)
        self.q, self.k, self.v = (torch.randn(tokens, h, dim).to(dtype) for h in (heads_q, heads, heads))
        self.cos, self.sin = angles(tokens, dim)
        self.runs = list(torch.tensor(runs, dtype=torch.int32).T.contiguous().unbind(0))
        self.live = [start + i for _, start, _, count in runs for i in range(count)]
        self.key_bits, self.key_offset = key_bits, torch.randn(heads, dim)
        self.cache = [
            torch.randn(10, heads, 16, dim).to(dtype),
            torch.randn(10, heads, 16, dim).to(dtype),
            torch.randn(10, heads, 2, dim).to(dtype),
            torch.randint(256, (10, heads, 16, dim * key_bits // 8), dtype=torch.uint8),
            torch.randn(10, heads, 16, 2).half(),
        ]

    def rotary_append(self, implementation: Implementation) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Rotated q and k, and the cache afterwards (K, V, min and max, codes, scales)."""
        batch = (x.to(implementation.device) for x in (self.q, self.k, self.v, self.cos, self.sin, *self.runs))
        cache = [x.to(implementation.device, copy=True) for x in self.cache]
        offset = self.key_offset.to(implementation.device)
        op = implementation.function("rotary_append", "append")
        q, k = op(*batch, *cache, offset, return_keys=True)
        assert q.is_contiguous() and k.is_contiguous()
        return q.cpu(), k.cpu(), [x.cpu() for x in cache]


def rotate_with(implementation: Implementation, *args: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated q and k of args (q, k, cos, sin), their pages not looked at."""
    q, k, cos, sin = (x.to(implementation.device) for x in args)
    tokens, heads, dim = k.shape
    starts = torch.arange(0, tokens, 16, dtype=torch.int32)
    runs = (starts // 16 + 1, starts, torch.zeros_like(starts), (tokens - starts).clamp(max=16))
    pages = torch.zeros(len(starts) + 1, heads, 16, dim, dtype=k.dtype, device=k.device)
    op = implementation.function("rotary_append", "append")
    q, k = op(q, k, k, cos, sin, *(x.to(k.device) for x in runs), pages, pages.clone(), return_keys=True)
    return q.cpu(), k.cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads_q", "heads_kv", "dim"), HEADS_AND_DIMS)
def test_queries_and_keys_turn_as_in_the_reference(implementation, heads_q, heads_kv, dim, dtype):
    torch.manual_seed(0)
    q, k = torch.randn(5, heads_q, dim).to(dtype), torch.randn(5, heads_kv, dim).to(dtype)
    cos, sin = angles(5, dim)
    for x, result in zip((q, k), rotate_with(implementation, q, k, cos, sin)):
        assert result.dtype == dtype
        assert_near(result, rotary_reference(x, cos, sin), TOLERANCE[dtype])


def test_float32_equals_transformers(implementation):
    torch.manual_seed(1)
    q, k = torch.randn(9, 4, 64), torch.randn(9, 2, 64)
    cos, sin = angles(9, 64)
    whole_cos, whole_sin = torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)
    expected = apply_rotary_pos_emb(q, k, whole_cos, whole_sin, unsqueeze_dim=1)
    for result, want in zip(rotate_with(implementation, q, k, cos, sin), expected):
        assert_near(result, want, 1e-7)


def test_views_of_a_fused_projection_are_rotated_and_left_as_they_are(implementation):
    torch.manual_seed(2)
    fused = torch.randn(7, 8, 128, device=implementation.device)
    before = fused.clone()
    cos, sin = angles(7, 128)
    q, k = rotate_with(implementation, fused[:, :4], fused[:, 4:6], cos, sin)
    assert torch.equal(fused, before)
    assert_near(q, rotary_reference(fused[:, :4].cpu(), cos, sin), TOLERANCE[torch.float32])
    assert_near(k, rotary_reference(fused[:, 4:6].cpu(), cos, sin), TOLERANCE[torch.float32])


def test_an_attention_factor_in_cos_and_sin_scales_the_result(implementation):
    """YaRN folds its factor into the tables: the op must not assume cos^2 + sin^2 = 1."""
    torch.manual_seed(3)
    q, k = torch.randn(2, 2, 64), torch.randn(2, 1, 64)
    cos, sin = angles(2, 64)
    plain, scaled = rotate_with(implementation, q, k, cos, sin), rotate_with(implementation, q, k, 2 * cos, 2 * sin)
    for one, two in zip(plain, scaled):
        assert torch.equal(2 * one, two)


def test_no_tokens_give_no_tokens(implementation):
    q, k = rotate_with(implementation, torch.empty(0, 4, 64), torch.empty(0, 2, 64), torch.empty(0, 32), torch.empty(0, 32))
    assert q.shape == (0, 4, 64) and k.shape == (0, 2, 64)


@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads_q", "heads_kv", "dim"), [(4, 2, 64), (3, 1, 96), (4, 1, 128), (1, 1, 256)])
def test_the_cache_takes_the_bits_of_rotation_rounding_and_appending_one_after_the_other(
    implementation, heads_q, heads_kv, dim, dtype, runs
):
    """Promise A: no bit of a query, a key or its metadata depends on how many launches made it, nor on what made it."""
    torch.manual_seed(4)
    step = Step(heads_q, heads_kv, dim, dtype, runs)
    q, k, cache = step.rotary_append(implementation)
    rotated_q, rotated_k = rotate(step.q, step.cos, step.sin), rotate(step.k, step.cos, step.sin)
    assert torch.equal(bits(q[step.live]), bits(rotated_q[step.live]))
    assert torch.equal(bits(k[step.live]), bits(rotated_k[step.live]))
    expected = [x.clone() for x in step.cache]
    append_torch(rotated_k, step.v, *step.runs, *expected, step.key_offset)
    for found, wanted in zip(cache, expected):  # what the null page holds is nobody's business
        assert torch.equal(found[1:].view(torch.uint8), wanted[1:].view(torch.uint8))


@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("key_bits", [2, 4, 8])
def test_pages_hold_what_the_references_say_of_the_rotated_keys(implementation, key_bits, runs):
    torch.manual_seed(5)
    step = Step(4, 2, 64, torch.float32, runs, key_bits)
    _, k, (k_pages, v_pages, page_min_max, codes, scales) = step.rotary_append(implementation)
    assert_near(k[step.live], rotary_reference(step.k, step.cos, step.sin)[step.live], TOLERANCE[torch.float32])
    expected_k, expected_v, _ = append_reference(k, step.v, *step.runs, *step.cache[:2])
    assert torch.equal(k_pages[1:], expected_k[1:]) and torch.equal(v_pages[1:], expected_v[1:])
    k[[n for n in range(len(k)) if n not in step.live]] = 0.0  # undefined, and of no page
    new_codes, new_scales = quantise_reference(k, key_bits, step.key_offset)
    before = step.cache[2]
    for page, start, offset, count in zip(*(column.tolist() for column in step.runs)):
        if page == 0:
            continue
        held = k[start : start + count]
        low, high = held.amin(0), held.amax(0)
        if offset:
            low, high = low.minimum(before[page, :, 0]), high.maximum(before[page, :, 1])
        assert torch.equal(page_min_max[page], torch.stack([low, high], dim=1))
        assert torch.equal(codes[page, :, offset : offset + count], new_codes[start : start + count].transpose(0, 1))
        assert torch.equal(scales[page, :, offset : offset + count], new_scales[start : start + count].transpose(0, 1))


@pytest.mark.parametrize("group", range(1, 9))
def test_every_query_head_of_every_group_is_turned(implementation, group):
    torch.manual_seed(6)
    step = Step(2 * group, 2, 64, torch.float32, RUNS["decode, a chunk, a padded row"][:3])
    q, _, _ = step.rotary_append(implementation)
    assert_near(q[step.live], rotary_reference(step.q, step.cos, step.sin)[step.live], TOLERANCE[torch.float32])


def test_tokens_of_one_prompt_are_the_same_bits_one_by_one(implementation):
    torch.manual_seed(7)
    counts = [1] * 5
    starts = [0, *accumulate(counts)][:5]
    whole = Step(4, 2, 64, torch.float32, [(3, 0, 0, 5)])
    pieces = Step(4, 2, 64, torch.float32, [(3, start, start, 1) for start in starts])
    pieces.q, pieces.k, pieces.v, pieces.cos, pieces.sin = whole.q, whole.k, whole.v, whole.cos, whole.sin
    pieces.cache, pieces.key_offset = whole.cache, whole.key_offset
    together, _, cache = whole.rotary_append(implementation)
    for i in starts:  # one step each: a page occurs in one run of a step
        pieces.runs = [torch.tensor([value], dtype=torch.int32) for value in (3, i, i, 1)]
        q, _, pieces.cache = pieces.rotary_append(implementation)
        assert torch.equal(bits(q[i]), bits(together[i]))
    for found, wanted in zip(pieces.cache, cache):
        assert torch.equal(found, wanted)


def test_keys_are_returned_to_those_alone_who_ask(implementation):
    k, angle = torch.zeros(1, 1, 64, device=implementation.device), torch.zeros(1, 32, device=implementation.device)
    pages = torch.zeros(2, 1, 16, 64, device=implementation.device)
    run = [torch.tensor([value], dtype=torch.int32, device=implementation.device) for value in (1, 0, 0, 1)]
    _, keys = implementation.function("rotary_append", "append")(k, k, k, angle, angle, *run, pages, pages.clone())
    assert keys is None
