"""A kernel compiled at warm-up is the kernel that serves: no batch size and no context length asks for another one.

Triton compiles once per key: dtypes, constants, and, unless told otherwise, whether an integer is 1 or a multiple of 16 and
whether a pointer is a multiple of 16 bytes. Batch size and page-table width move all of these.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from distributed_sparse.kernels.attend.attend_triton import attend_triton, combine_triton
from distributed_sparse.kernels.attend.count_attended_triton import count_attended_triton
from distributed_sparse.kernels.attend.prefill_attend_triton import prefill_attend_triton
from distributed_sparse.kernels.cache.append_triton import append_triton, rotary_append_triton
from distributed_sparse.kernels.cache.whole_rows_triton import whole_rows_triton
from distributed_sparse.kernels.hash.hamming_scores_triton import hamming_scores_triton
from distributed_sparse.kernels.hash.signatures_triton import append_signatures_triton, pack_signs_triton
from distributed_sparse.kernels.layer.rms_norm_triton import add_rms_norm_triton, rms_norm_triton
from distributed_sparse.kernels.quest.page_scores_triton import page_scores_triton
from distributed_sparse.kernels.quest.top_k_pages_triton import top_k_pages_triton
from distributed_sparse.kernels.twilight.int4_logits_triton import int4_logits_triton
from distributed_sparse.kernels.twilight.top_p_triton import top_p_triton
from distributed_sparse.kernels.vattention.residual_statistics import ResidualStatistics
from distributed_sparse.kernels.vattention.residual_statistics_triton import residual_statistics_triton
from distributed_sparse.kernels.vattention.sample_plan import GUARANTEES
from distributed_sparse.kernels.vattention.sample_plan_triton import plan_pilot_triton, plan_samples_triton
from distributed_sparse.kernels.vattention.sample_residual_triton import sample_residual_triton

BATCHES = [1, 2, 3, 4, 8, 16]
WIDTHS = [1, 7, 16, 33, 100]  # pages of the longest context
TOKENS = [*BATCHES, 33, 100]  # of a step: its decode rows, or those and a prompt's chunk
DIM, PAGE_SIZE = 64, 16

on_every_shard = pytest.mark.parametrize(("q_heads", "kv_heads"), [(8, 2), (4, 1), (3, 3)])
in_every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


@contextlib.contextmanager
def recorded_keys() -> Iterator[dict[str, set[str]]]:
    """Inside, kernels are not launched: the keys by which they would be compiled for sm_90 are noted by kernel name."""
    keys: dict[str, set[str]] = defaultdict(set)
    backend = make_backend(GPUTarget("cuda", 90, 32))

    def note_key(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        bind = create_function_from_signature(self.signature, self.params, backend)
        _, specialization, launch_options = bind(*arguments, **options)
        keys[self.__name__].add(f"{specialization} {launch_options}")

    run = JITFunction.run
    JITFunction.run = note_key
    try:
        yield keys
    finally:
        JITFunction.run = run


def assert_one_key_each(keys: dict[str, set[str]], *kernels: str) -> None:
    assert set(keys) == set(kernels)
    for kernel, its_keys in keys.items():
        assert len(its_keys) == 1, f"{kernel} is compiled {len(its_keys)} times:\n" + "\n".join(sorted(its_keys))


def index_rows(count: int, length: int) -> tuple[Tensor, ...]:
    """Rows of one transferred int32 [count, length]: a row starts on 16 bytes only where the length is a multiple of 4."""
    return torch.ones(count, length, dtype=torch.int32).unbind(0)


def projected(tokens: int, q_heads: int, kv_heads: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v [N, H, d]: strided views of the one projection."""
    sizes = [q_heads * DIM, kv_heads * DIM, kv_heads * DIM]
    parts = torch.zeros(tokens, sum(sizes), dtype=dtype).split(sizes, dim=-1)
    return tuple(part.unflatten(-1, (-1, DIM)) for part in parts)


def cache(kv_heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """k_pages, v_pages, page_min_max of a cache of three pages."""
    pages = torch.zeros(3, kv_heads, PAGE_SIZE, DIM, dtype=dtype)
    return pages, pages.clone(), torch.zeros(3, kv_heads, 2, DIM, dtype=dtype)


def low_bit_copy(kv_heads: int) -> tuple[Tensor, Tensor]:
    """key_codes of 4 bits and key_scales of a cache of three pages."""
    codes = torch.zeros(3, kv_heads, PAGE_SIZE, DIM // 2, dtype=torch.uint8)
    return codes, torch.zeros(3, kv_heads, PAGE_SIZE, 2, dtype=torch.float16)


@on_every_shard
@in_every_dtype
def test_append_is_compiled_once(q_heads, kv_heads, dtype):
    k_pages, v_pages, page_min_max = cache(kv_heads, dtype)
    with recorded_keys() as keys:
        for tokens in TOKENS:
            _, k, v = projected(tokens, q_heads, kv_heads, dtype)
            pages, starts, offsets, counts = index_rows(4, tokens)
            append_triton(k.contiguous(), v, pages, starts, offsets, counts, k_pages, v_pages, page_min_max)
    assert_one_key_each(keys, "_append_kernel")


@on_every_shard
@in_every_dtype
@pytest.mark.parametrize("with_offset", [False, True])
def test_append_with_a_low_bit_copy_is_compiled_once(q_heads, kv_heads, dtype, with_offset):
    k_pages, v_pages, _ = cache(kv_heads, dtype)
    key_codes, key_scales = low_bit_copy(kv_heads)
    key_offset = torch.zeros(kv_heads, DIM) if with_offset else None
    with recorded_keys() as keys:
        for tokens in TOKENS:
            _, k, v = projected(tokens, q_heads, kv_heads, dtype)
            pages, starts, offsets, counts = index_rows(4, tokens)
            batch = (k.contiguous(), v, pages, starts, offsets, counts)
            append_triton(*batch, k_pages, v_pages, None, key_codes, key_scales, key_offset)
    assert_one_key_each(keys, "_append_kernel")


@on_every_shard
@in_every_dtype
@pytest.mark.parametrize("kept", ["nothing", "min and max", "a low-bit copy", "keys"])
def test_rotary_append_is_compiled_once(q_heads, kv_heads, dtype, kept):
    k_pages, v_pages, page_min_max = cache(kv_heads, dtype)
    metadata = {"nothing": (), "min and max": (page_min_max,), "a low-bit copy": (None, *low_bit_copy(kv_heads)), "keys": ()}
    with recorded_keys() as keys:
        for tokens in TOKENS:
            angles = torch.arange(tokens).float()[:, None] * torch.ones(DIM // 2)
            batch = (*projected(tokens, q_heads, kv_heads, dtype), angles.cos(), angles.sin(), *index_rows(4, tokens))
            rotary_append_triton(*batch, k_pages, v_pages, *metadata[kept], return_keys=kept == "keys")
    assert_one_key_each(keys, "_append_kernel")


@on_every_shard
@in_every_dtype
def test_int4_logits_and_top_p_are_compiled_once(q_heads, kv_heads, dtype):
    """Over lists of Quest, and over the page table itself."""
    key_codes, key_scales = low_bit_copy(kv_heads)
    with recorded_keys() as keys:
        for batch, width in product(BATCHES, WIDTHS):
            _, num_pages, last_page_len = index_rows(3, batch)
            q = torch.zeros(batch, q_heads, DIM, dtype=dtype)
            table = torch.ones(batch, width, dtype=torch.int32)[:, None, :].expand(-1, kv_heads, -1)
            selected = torch.ones(batch, kv_heads, min(width, 32), dtype=torch.int32)
            counts = num_pages[:, None].expand(-1, kv_heads)
            forced = {"page_size": PAGE_SIZE, "sink_pages": min(width, 2), "recent_pages": 1}
            for pages, listed in ((table, counts), (selected, counts.contiguous())):
                logits = int4_logits_triton(q, key_codes, key_scales, pages, listed, last_page_len, 0.125)
                top_p_triton(logits, pages, listed, last_page_len, 0.95, **forced)
    assert_one_key_each(keys, "_int4_logits_kernel", "_top_p_threshold_kernel", "_top_p_list_kernel")


@on_every_shard
@in_every_dtype
def test_page_scores_and_top_k_pages_are_compiled_once(q_heads, kv_heads, dtype):
    _, _, page_min_max = cache(kv_heads, dtype)
    with recorded_keys() as keys:
        for batch, width in product(BATCHES, WIDTHS):
            _, num_pages, k = index_rows(3, batch)
            table = torch.ones(batch, width, dtype=torch.int32)
            scores = page_scores_triton(torch.zeros(batch, q_heads, DIM, dtype=dtype), page_min_max, table, num_pages)
            forced = {"sink_pages": min(width, 2), "recent_pages": 1}
            top_k_pages_triton(scores, table, num_pages, k, **forced, capacity=min(width, 32))
    assert_one_key_each(keys, "_page_scores_kernel", "_top_k_pages_kernel")


@on_every_shard
@in_every_dtype
@pytest.mark.parametrize("with_tokens", [False, True])
def test_attend_is_compiled_once_for_the_whole_context_and_for_lists_of_any_width(q_heads, kv_heads, dtype, with_tokens):
    k_pages, v_pages, _ = cache(kv_heads, dtype)
    with recorded_keys() as keys:
        for batch, width in product(BATCHES, WIDTHS):
            _, num_pages, last_page_len = index_rows(3, batch)
            q = torch.zeros(batch, q_heads, DIM, dtype=dtype)
            sampled: dict[str, Any] = {}
            if with_tokens:
                lists = torch.ones(batch, kv_heads, width, dtype=torch.int32)
                partial = torch.zeros(batch, q_heads, DIM), torch.zeros(batch, q_heads)
                sampled = {
                    "tokens": lists,
                    "num_tokens": lists[..., 0],
                    "log_weight": lists[..., 0].float(),
                    "partial": partial,
                }
            table = torch.ones(batch, width, dtype=torch.int32)[:, None, :].expand(-1, kv_heads, -1)
            selected = torch.ones(batch, kv_heads, min(width, 32), dtype=torch.int32)
            attend_triton(q, k_pages, v_pages, table, num_pages[:, None].expand(-1, kv_heads), last_page_len, 0.125, **sampled)
            attend_triton(q, k_pages, v_pages, selected, selected[..., 0].contiguous(), last_page_len, 0.125, **sampled)
    assert_one_key_each(keys, "_attend_kernel", "_combine_kernel")


@pytest.mark.parametrize("kv_heads", [1, 2, 3])
def test_count_attended_is_compiled_once_per_kind_of_selection(kv_heads):
    counters = torch.zeros(5, kv_heads, dtype=torch.int64)
    with recorded_keys() as keys:
        for layer, batch in product(range(3), BATCHES):
            num_pages, last_page_len, context_lens = index_rows(3, batch)
            counts = torch.ones(batch, kv_heads, dtype=torch.int32)
            for listed in (num_pages[:, None].expand(-1, kv_heads), counts, counts.T.contiguous().T):
                count_attended_triton(counters[layer], *counters[3:], listed, last_page_len, context_lens, PAGE_SIZE)
    assert_one_key_each(keys, "_count_attended_kernel")


@pytest.mark.parametrize("group", [1, 4])
def test_combine_is_compiled_once(group):
    with recorded_keys() as keys:
        for rows, capacity in product(BATCHES, WIDTHS):
            (_, num_partials) = index_rows(2, rows)
            combine_triton(torch.zeros(rows, capacity, group, DIM), torch.zeros(rows, capacity, group), num_partials)
    assert_one_key_each(keys, "_combine_kernel")


@on_every_shard
@in_every_dtype
def test_prefill_attend_is_compiled_once(q_heads, kv_heads, dtype):
    k_pages, v_pages, _ = cache(kv_heads, dtype)
    with recorded_keys() as keys:
        for chunks, width, decode_rows in product([1, 2, 3, 4], WIDTHS, [0, 1, 3]):
            q = torch.zeros(decode_rows + 5 * chunks, q_heads, DIM, dtype=dtype)[decode_rows:]
            query_start = torch.arange(0, 5 * chunks + 1, 5, dtype=torch.int32)
            _, context_lens = index_rows(2, chunks)
            table = torch.ones(chunks, width, dtype=torch.int32)
            prefill_attend_triton(q, k_pages, v_pages, table, query_start, context_lens, 0.125, 5)
    assert_one_key_each(keys, "_prefill_attend_kernel")


@in_every_dtype
def test_rms_norm_is_compiled_once_for_the_residual_stream(dtype):
    weight = torch.ones(256, dtype=dtype)
    with recorded_keys() as keys:
        for tokens in TOKENS:
            x = torch.zeros(tokens, 256, dtype=dtype)
            add_rms_norm_triton(x, x.clone(), weight, 1e-6)
    assert_one_key_each(keys, "_rms_norm_kernel")


@on_every_shard
@in_every_dtype
@pytest.mark.parametrize("part", [0, 1])
def test_rms_norm_is_compiled_once_for_queries_and_once_for_keys(q_heads, kv_heads, dtype, part):
    weight = torch.ones(DIM, dtype=dtype)
    with recorded_keys() as keys:
        for tokens in TOKENS:
            rms_norm_triton(projected(tokens, q_heads, kv_heads, dtype)[part], weight, 1e-6)
    assert_one_key_each(keys, "_rms_norm_kernel")


@on_every_shard
@pytest.mark.parametrize("block_tokens", [1, PAGE_SIZE])
def test_sample_residual_is_compiled_once_for_every_layer_rank_and_draw(q_heads, kv_heads, block_tokens):
    with recorded_keys() as keys:
        for batch, width, (layer, draw) in product(BATCHES, WIDTHS, [(0, 0), (1, 1), (16, 0), (31, 1)]):
            (_, context_lens) = index_rows(2, batch)
            chosen = torch.ones(batch, kv_heads, width, dtype=torch.int32)
            table, key = torch.ones(batch, width + 3, dtype=torch.int32), torch.ones(4, batch, dtype=torch.int64)
            rows = (chosen, context_lens[:, None].expand(-1, kv_heads), table, context_lens, chosen[..., 0])
            options = {"block_tokens": block_tokens, "page_size": PAGE_SIZE, "layer": layer, "draw": draw}
            sample_residual_triton(*rows, key, **options, first_kv_head=layer * kv_heads, capacity=5 * width)
            contiguous = (chosen, chosen[..., 0].contiguous(), table, context_lens, chosen[..., 0].contiguous())
            sample_residual_triton(*contiguous, key, **options, first_kv_head=layer * kv_heads, capacity=512)
    assert_one_key_each(keys, "_sample_residual_kernel")


@on_every_shard
@in_every_dtype
def test_residual_statistics_is_compiled_once(q_heads, kv_heads, dtype):
    k_pages, v_pages, _ = cache(kv_heads, dtype)
    with recorded_keys() as keys:
        for batch, width in product(BATCHES, WIDTHS):
            q = torch.zeros(batch, q_heads, DIM, dtype=dtype)
            tokens = torch.ones(batch, kv_heads, width, dtype=torch.int32)
            partial = torch.zeros(batch, q_heads, DIM), torch.zeros(batch, q_heads)
            for counts in (tokens[..., 0], tokens[..., 0].contiguous()):
                residual_statistics_triton(q, k_pages, v_pages, tokens, counts, counts, partial, 0.125, centred=True)
    assert_one_key_each(keys, "_residual_statistics_kernel")


@on_every_shard
@pytest.mark.parametrize("guarantee", GUARANTEES)
def test_plans_of_samples_are_compiled_once(q_heads, kv_heads, guarantee):
    settings = {"guarantee": guarantee, "epsilon": 0.1, "delta": 0.1, "min_context": 0, "max_sample": None}
    with recorded_keys() as keys:
        for batch in BATCHES:
            context, num_pages = index_rows(2, batch)
            chosen = torch.ones(batch, kv_heads, dtype=torch.int32)
            statistics = ResidualStatistics(*torch.ones(7, batch, q_heads).unbind(0))
            n_s, m = plan_pilot_triton(chosen, context, block_tokens=PAGE_SIZE, base_fraction=0.02)
            plan_samples_triton(statistics, torch.ones(batch, q_heads), chosen, n_s, m, num_pages, context, **settings)
    assert_one_key_each(keys, "_plan_pilot_kernel", "_plan_samples_kernel")


@on_every_shard
def test_whole_rows_is_compiled_once(q_heads, kv_heads):
    with recorded_keys() as keys:
        for batch, min_context in product(BATCHES, (0, 1, 16)):
            context, num_pages = index_rows(2, batch)
            whole_rows_triton(torch.ones(batch, kv_heads, dtype=torch.int32), num_pages, context, min_context)
    assert_one_key_each(keys, "_whole_rows_kernel")


@on_every_shard
@in_every_dtype
def test_signatures_and_hamming_scores_are_compiled_once(q_heads, kv_heads, dtype):
    signatures = torch.zeros(3, kv_heads, PAGE_SIZE, q_heads // kv_heads, 1, dtype=torch.int32)
    with recorded_keys() as keys:
        for tokens in TOKENS:
            x = torch.zeros(tokens, q_heads, 32, dtype=dtype)
            append_signatures_triton(x, *index_rows(4, tokens), signatures)
        for batch, width in product(BATCHES, WIDTHS):
            _, context_lens = index_rows(2, batch)
            queries = pack_signs_triton(torch.zeros(batch, q_heads, 32, dtype=dtype))
            table = torch.ones(batch, width, dtype=torch.int32)
            scores = hamming_scores_triton(queries, signatures, table, context_lens)
            positions = torch.ones(1, scores.shape[2], dtype=torch.int32).expand(batch, -1)
            forced = {"sink_pages": 0, "recent_pages": 0, "capacity": 64}
            top_k_pages_triton(scores, positions, context_lens, context_lens, **forced)
    kernels = ("_append_signatures_kernel", "_pack_signs_kernel", "_hamming_scores_kernel", "_top_k_pages_kernel")
    assert_one_key_each(keys, *kernels)


def test_the_record_tells_apart_what_is_compiled_apart():
    """An integer that turns 1, a pointer off its 16 bytes, another dtype: each costs a key where it is specialised on."""
    weight = torch.ones(DIM)
    with recorded_keys() as keys:
        rms_norm_triton(torch.zeros(2, 16, DIM), weight, 1e-6)
        rms_norm_triton(torch.zeros(2, 1, DIM), weight, 1e-6)
        rms_norm_triton(torch.zeros(2 * 16 * DIM + 1)[1:].view(2, 16, DIM), weight, 1e-6)
        rms_norm_triton(torch.zeros(2, 16, DIM, dtype=torch.float16), weight, 1e-6)
    assert len(keys["_rms_norm_kernel"]) == 4
