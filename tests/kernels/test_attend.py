"""attend and combine: every list a Selection can hold, right, blind to what is not listed, and row by row the same bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed_sparse.kernels.attend import attend_triton
from distributed_sparse.kernels.attend.attend import CHUNK_TOKENS, attend
from distributed_sparse.kernels.attend.attend_torch import combine_torch
from distributed_sparse.kernels.reference import attend_reference, combine_reference
from tests.support.kernels import ARCHITECTURES, TOLERANCE, Implementation, assert_compiles, assert_near, bits, poison_

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CONTEXTS = [1, 15, 16, 17, 511, 512, 513, 700]  # around a page and around a chunk
LSE_TOLERANCE = 2e-6  # logits are float32 sums of exact products of the inputs, whatever the dtype


@dataclass
class Case:
    """The arguments of `attend`. Whatever is not listed is poison: keys, values, and list entries past their counts."""

    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    pages: Tensor
    num_pages: Tensor
    last_page_len: Tensor
    tokens: Tensor | None = None
    num_tokens: Tensor | None = None
    log_weight: Tensor | None = None
    partial: tuple[Tensor, Tensor] | None = None

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def run(self, implementation: Implementation, **options: Any) -> Any:
        def there(x: Any) -> Any:
            return tuple(map(there, x)) if isinstance(x, tuple) else x if x is None else x.to(implementation.device)

        function = implementation.function("attend")
        result = function(*map(there, self.head), self.scale, **{name: there(x) for name, x in self.more.items()}, **options)
        return tuple(x.cpu() for x in result) if isinstance(result, tuple) else result.cpu()

    @property
    def head(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.q, self.k_pages, self.v_pages, self.pages, self.num_pages, self.last_page_len

    @property
    def more(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("tokens", "num_tokens", "log_weight", "partial")}

    def reference(self) -> tuple[Tensor, Tensor]:
        return attend_reference(*self.head, self.scale, **self.more)

    def rows(self, sequences: list[int], heads: list[int], padding: int = 0) -> Case:
        """Some sequences and KV heads of a case, as a shard holding those heads alone sees them, in lists of another width."""
        group = self.q.shape[1] // self.k_pages.shape[1]
        q_heads = [h * group + g for h in heads for g in range(group)]

        def of_rows(x: Any, columns: list[int] = heads) -> Any:
            return x[sequences][:, columns] if x is not None else None

        def wider(entries: Any) -> Any:
            if entries is None:
                return None
            return torch.cat([of_rows(entries), poison_(entries.new_empty(len(sequences), len(heads), padding))], dim=2)

        return Case(
            of_rows(self.q, q_heads),
            self.k_pages[:, heads].contiguous(),
            self.v_pages[:, heads].contiguous(),
            wider(self.pages),
            of_rows(self.num_pages),
            self.last_page_len[sequences],
            wider(self.tokens),
            of_rows(self.num_tokens),
            of_rows(self.log_weight),
            (of_rows(self.partial[0], q_heads), of_rows(self.partial[1], q_heads)) if self.partial is not None else None,
        )


def make_case(
    num_pages: list[list[int]],
    last_page_len: list[int],
    *,
    group: int = 4,
    dim: int = 64,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    num_tokens: list[list[int]] | None = None,
) -> Case:
    """A random case of B sequences and H_kv heads, from its counts [B][H_kv]; pages lie scattered in memory."""
    batch, heads = len(num_pages), len(num_pages[0])
    counts = torch.tensor(num_pages, dtype=torch.int32)
    most = int(counts.max())
    most_tokens = max(map(max, num_tokens)) if num_tokens else 0
    token_pages = -(-2 * most_tokens // page_size)
    total = 1 + batch * (most + token_pages)
    scattered = (torch.randperm(total - 1) + 1).view(batch, most + token_pages)
    k_pages, v_pages = (poison_(torch.empty(total, heads, page_size, dim, dtype=dtype)) for _ in range(2))
    pages = poison_(torch.empty(batch, heads, most + 2, dtype=torch.int32))
    tokens = poison_(torch.empty(batch, heads, most_tokens + 3, dtype=torch.int32)) if num_tokens else None
    for b in range(batch):
        for h in range(heads):
            n = num_pages[b][h]
            mine = scattered[b, :most][torch.randperm(most)[:n].sort().values]
            pages[b, h, :n] = mine
            for cache in (k_pages, v_pages):
                if n:
                    cache[mine[:-1], h] = torch.randn(n - 1, page_size, dim).to(dtype)
                    cache[mine[-1], h, : last_page_len[b]] = torch.randn(last_page_len[b], dim).to(dtype)
            if num_tokens is not None and tokens is not None:
                n = num_tokens[b][h]
                where = torch.randperm(token_pages * page_size)[:n]
                slots = (scattered[b, most:][where // page_size] * page_size + where % page_size).sort().values
                tokens[b, h, :n] = slots
                for cache in (k_pages, v_pages):
                    cache[slots // page_size, h, slots % page_size] = torch.randn(n, dim).to(dtype)
    return Case(
        (1.5 * torch.randn(batch, heads * group, dim)).to(dtype),
        k_pages,
        v_pages,
        pages,
        counts,
        torch.tensor(last_page_len, dtype=torch.int32),
        tokens,
        torch.tensor(num_tokens, dtype=torch.int32) if num_tokens else None,
    )


def of_contexts(contexts: list[int], heads: int, page_size: int, **shape: Any) -> Case:
    """The dense case: every page of each context, the same pages for each head."""
    counts = [[-(-n // page_size)] * heads for n in contexts]
    return make_case(counts, [(n - 1) % page_size + 1 for n in contexts], page_size=page_size, **shape)


def mixed_case(dtype: torch.dtype = torch.float32, dim: int = 64, group: int = 3) -> Case:
    """Rows of pages, of tokens, of both and of neither, each with and without a partial result; log weights on all."""
    case = make_case(
        [[40, 0], [3, 33], [0, 1]],
        [7, 16, 1],
        num_tokens=[[0, 0], [513, 700], [40, 1]],
        dtype=dtype,
        dim=dim,
        group=group,
    )
    batch, q_heads, _ = case.q.shape
    case.log_weight = 3 * torch.rand(batch, q_heads // group)
    lse = 4 + 2 * torch.randn(batch, q_heads)
    lse[0, :group] = lse[1, -1] = lse[2, 0] = float("-inf")
    out = torch.randn(batch, q_heads, dim)
    case.partial = (torch.where((lse == float("-inf"))[..., None], float("nan"), out), lse)
    return case


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("dim", "group", "page_size"),
    [
        (64, 1, 16),
        (96, 3, 32),
        (128, 4, 16),
        (256, 8, 64),
        pytest.param(64, 16, 64, marks=pytest.mark.not_interpreted),
        pytest.param(128, 8, 32, marks=pytest.mark.not_interpreted),
    ],
)
def test_dense_decode_equals_the_reference_at_every_context_length(implementation, dim, group, page_size, dtype):
    case = of_contexts(CONTEXTS, heads=1, page_size=page_size, dim=dim, group=group, dtype=dtype)
    expected, expected_lse = case.reference()
    out = case.run(implementation)
    assert out.dtype == dtype
    assert_near(out, expected, TOLERANCE[dtype])
    wide, lse = case.run(implementation, return_lse=True)
    assert wide.dtype == lse.dtype == torch.float32
    assert_near(wide, expected, TOLERANCE[dtype])
    assert_near(lse, expected_lse, LSE_TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_of_one_sequence_may_list_different_pages(implementation, dtype):
    case = make_case([[1, 70, 0], [33, 32, 5]], [9, 16], dtype=dtype)
    expected, expected_lse = case.reference()
    out, lse = case.run(implementation, return_lse=True)
    assert_near(out, expected, TOLERANCE[dtype])
    assert_near(lse, expected_lse, LSE_TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 96, *(pytest.param(dim, marks=pytest.mark.not_interpreted) for dim in (128, 256))])
def test_pages_tokens_log_weights_and_a_partial_result_make_one_softmax(implementation, dim, dtype):
    case = mixed_case(dtype, dim)
    expected, expected_lse = case.reference()
    out, lse = case.run(implementation, return_lse=True)
    assert_near(out, expected, TOLERANCE[dtype])
    assert_near(lse, expected_lse, LSE_TOLERANCE)
    assert_near(case.run(implementation), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_alone_need_no_pages(implementation, dtype):
    case = make_case([[0, 0]], [1], num_tokens=[[1, 600]], dtype=dtype)
    expected, _ = case.reference()
    assert_near(case.run(implementation), expected, TOLERANCE[dtype])
    case.pages = case.pages[:, :, :0]
    assert_near(case.run(implementation), expected, TOLERANCE[dtype])


def test_a_page_listed_as_tokens_gives_what_the_page_gives(implementation):
    as_pages = make_case([[3, 3]], [16])
    slots = as_pages.pages[:, :, :3, None] * 16 + torch.arange(16, dtype=torch.int32)
    as_tokens = replace(
        as_pages,
        num_pages=torch.zeros(1, 2, dtype=torch.int32),
        tokens=slots.flatten(2).contiguous(),
        num_tokens=torch.full((1, 2), 48, dtype=torch.int32),
    )
    assert torch.equal(bits(as_tokens.run(implementation)), bits(as_pages.run(implementation)))


def test_a_log_weight_counts_a_token_that_often(implementation):
    case = make_case([[2]], [5], num_tokens=[[30]])
    case.log_weight = torch.tensor([[3.0]]).log()
    once = replace(case, log_weight=None)
    out, lse = once.run(implementation, return_lse=True)
    thrice = replace(once, num_pages=torch.zeros(1, 1, dtype=torch.int32), partial=(out, lse))
    thrice.partial = thrice.run(implementation, return_lse=True)
    expected, expected_lse = thrice.run(implementation, return_lse=True)
    weighted, weighted_lse = case.run(implementation, return_lse=True)
    assert_near(weighted, expected, TOLERANCE[torch.float32])
    assert_near(weighted_lse, expected_lse, LSE_TOLERANCE)


def test_a_row_that_lists_nothing_is_zero_or_its_partial_result(implementation):
    case = make_case([[0, 2], [0, 0]], [3, 1], num_tokens=[[0, 0], [0, 0]])
    out, lse = case.run(implementation, return_lse=True)
    empty = torch.tensor([[True, False], [True, True]]).repeat_interleave(4, dim=1)
    assert (out[empty] == 0).all() and (lse[empty] == float("-inf")).all()
    assert out[~empty].isfinite().all() and lse[~empty].isfinite().all()
    case.partial = (torch.randn_like(out), torch.randn_like(lse))
    out, lse = case.run(implementation, return_lse=True)
    assert torch.equal(bits(out[empty]), bits(case.partial[0][empty]))
    assert torch.equal(lse[empty], case.partial[1][empty])


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_over_a_split_list_merges_to_attention_over_the_whole(implementation, dtype):
    case = make_case([[40, 37]], [4], dtype=dtype)
    first = replace(
        case, num_pages=torch.tensor([[33, 2]], dtype=torch.int32), last_page_len=torch.tensor([16], dtype=torch.int32)
    )
    rest = replace(case, num_pages=case.num_pages - first.num_pages, partial=first.run(implementation, return_lse=True))
    rest.pages = poison_(torch.empty_like(case.pages))
    for h in range(2):
        n, skipped = int(rest.num_pages[0, h]), int(first.num_pages[0, h])
        rest.pages[0, h, :n] = case.pages[0, h, skipped : skipped + n]
    assert_near(rest.run(implementation), case.reference()[0], TOLERANCE[dtype])


def test_logits_of_hundreds_neither_overflow_nor_vanish(implementation):
    case = make_case([[40, 3]], [4], num_tokens=[[520, 9]])
    case.q *= 40
    case.log_weight = torch.tensor([[50.0, 0.5]])
    expected, expected_lse = case.reference()
    assert expected_lse.max() > 100
    out, lse = case.run(implementation, return_lse=True)
    # A float32 logit of 300 is known to 3e-5, and its exponential as well.
    assert_near(out, expected, 1e-4)
    assert_near(lse, expected_lse, LSE_TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("one_thread")
def test_a_row_has_the_same_bits_alone_and_among_any_others(implementation, dtype):
    case = mixed_case(dtype, dim=96)
    group, batch, heads = 3, 3, 2
    out, lse = case.run(implementation, return_lse=True)
    reordered, reordered_lse = case.rows([2, 0, 1], [1, 0], padding=600).run(implementation, return_lse=True)
    for b in range(batch):
        for h in range(heads):
            alone, alone_lse = case.rows([b], [h]).run(implementation, return_lse=True)
            here, there = slice(h * group, (h + 1) * group), slice((1 - h) * group, (2 - h) * group)
            assert torch.equal(bits(alone[0]), bits(out[b, here]))
            assert torch.equal(bits(alone_lse[0]), bits(lse[b, here]))
            assert torch.equal(bits(alone[0]), bits(reordered[(b + 1) % 3, there]))
            assert torch.equal(bits(alone_lse[0]), bits(reordered_lse[(b + 1) % 3, there]))


@pytest.mark.implementations("torch", "native", "triton")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("one_thread")
def test_a_long_row_among_many_has_the_bits_it_has_alone(implementation, dtype):
    counts = torch.randint(0, 200, (6, 8)).tolist()
    case = make_case(counts, [3, 16, 1, 9, 16, 5], dtype=dtype, dim=128)
    out = case.run(implementation)
    for b, h in [(0, 0), (3, 7), (5, 4)]:
        alone = case.rows([b], [h], padding=77).run(implementation)
        assert torch.equal(bits(alone[0]), bits(out[b, 4 * h : 4 * h + 4]))


@pytest.mark.usefixtures("one_thread")
def test_a_table_expanded_over_heads_has_the_bits_of_a_list_per_head(implementation):
    case = of_contexts([300, 20], heads=3, page_size=16)
    for b, n in enumerate(case.num_pages[:, 0].tolist()):
        case.pages[b, :, :n] = case.pages[b, 0, :n]
        used, last = case.pages[b, 0, :n].long(), int(case.last_page_len[b])
        for cache in (case.k_pages, case.v_pages):
            cache[used[:-1]] = torch.randn(n - 1, 3, 16, 64)
            cache[used[-1], :, :last] = torch.randn(3, last, 64)
    expanded = replace(
        case,
        pages=case.pages[:, :1].clone().expand(-1, 3, -1),
        num_pages=case.num_pages[:, :1].clone().expand(-1, 3),
    )
    assert expanded.pages.stride(1) == 0
    out = case.run(implementation)
    assert_near(out, case.reference()[0], TOLERANCE[torch.float32])
    assert torch.equal(bits(expanded.run(implementation)), bits(out))


@pytest.mark.implementations("interpreter", "triton")
def test_how_many_programs_share_a_row_changes_no_bit(implementation, monkeypatch):
    case = mixed_case()
    results = []
    for programs in (1, 3):
        monkeypatch.setattr(attend_triton, "programs_per_row", lambda *_, n=programs: n)
        results.append(torch.cat([x.flatten() for x in case.run(implementation, return_lse=True)]))
    assert torch.equal(bits(results[0]), bits(results[1]))


def combine_case(dim: int = 96) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    outs, lses = torch.randn(5, 9, 3, dim), 20 * torch.randn(5, 9, 3)
    num_partials = torch.tensor([9, 1, 0, 4, 7], dtype=torch.int32)
    for r, n in enumerate(num_partials):
        poison_(outs[r, n:]), poison_(lses[r, n:])
    empty = torch.tensor([[0, 0], [0, 8], [3, 0], [3, 2], [4, 3]])
    lses[empty[:, 0], empty[:, 1]] = float("-inf")
    poison_(outs[4, 3])
    partial_lse = 20 * torch.randn(5, 3)
    partial_lse[0] = partial_lse[2, 1] = float("-inf")
    return (
        outs,
        lses,
        num_partials,
        (torch.where(partial_lse.isinf()[..., None], float("nan"), torch.randn(5, 3, dim)), partial_lse),
    )


@pytest.mark.implementations("torch", "interpreter", "triton")
@pytest.mark.parametrize("with_partial", [False, True])
def test_combine_equals_the_reference_and_ignores_empty_partials(implementation, with_partial):
    outs, lses, num_partials, partial = combine_case()
    expected, expected_lse = combine_reference(outs, lses, num_partials, partial if with_partial else None)
    device = implementation.device
    function = implementation.function("combine", file="attend")
    out, lse = function(
        outs.to(device),
        lses.to(device),
        num_partials.to(device),
        (partial[0].to(device), partial[1].to(device)) if with_partial else None,
    )
    assert_near(out.cpu(), expected, 5e-6)  # an lse of 40 is known to 4e-6
    assert_near(lse.cpu(), expected_lse, LSE_TOLERANCE)


@pytest.mark.implementations("torch", "interpreter", "triton")
def test_combine_gives_the_same_bits_at_any_capacity(implementation):
    outs, lses, num_partials, (partial_out, partial_lse) = combine_case()
    device = implementation.device
    outs, lses, num_partials = outs.to(device), lses.to(device), num_partials.to(device)
    partial = partial_out.to(device), partial_lse.to(device)
    function = implementation.function("combine", file="attend")
    out, lse = function(outs, lses, num_partials, partial)
    wider = poison_(outs.new_empty(5, 80, 3, 96)), poison_(lses.new_empty(5, 80, 3))
    wider[0][:, :9], wider[1][:, :9] = outs, lses
    same, same_lse = function(*wider, num_partials, partial)
    assert torch.equal(bits(same), bits(out)) and torch.equal(bits(same_lse), bits(lse))


def test_the_dispatchers_choose_the_implementation_of_the_tensors_device():
    case = of_contexts([5], heads=1, page_size=16)
    out, lse = attend(*case.head, case.scale, return_lse=True)
    assert_near(out, case.reference()[0], TOLERANCE[torch.float32])
    group = out.view(1, 1, 4, 64), lse.view(1, 1, 4)
    merged, merged_lse = combine_torch(*group, torch.ones(1, dtype=torch.int32))
    assert torch.equal(merged, group[0][0]) and torch.equal(merged_lse, group[1][0])


@pytest.mark.implementations("triton")
def test_offsets_beyond_two_to_the_31_reach_their_page(implementation):
    num_pages = 2**31 // (64 * 256) + 2
    cache = torch.zeros(num_pages, 1, 64, 256, dtype=torch.bfloat16, device="cuda")
    cache[-1] = torch.randn(64, 256)
    pages = torch.tensor([[[num_pages - 1]]], dtype=torch.int32)
    small = Case(
        torch.randn(1, 4, 256).bfloat16(), cache[-1:].cpu(), cache[-1:].cpu(), pages, torch.ones_like(pages[0]), pages[0, 0]
    )
    small.last_page_len = torch.tensor([64], dtype=torch.int32)
    large = replace(small, k_pages=cache, v_pages=cache)
    small = replace(small, pages=torch.zeros_like(pages))
    assert_near(large.run(implementation), small.reference()[0], TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("dim", "group", "page_size"),
    [(64, 3, 64), (96, 8, 16), (128, 4, 16), (256, 16, 32)]
    + [
        pytest.param(dim, group, page_size, marks=pytest.mark.slow)
        for dim in (64, 96, 128, 256)
        for group in (1, 16)
        for page_size in (16, 64)
    ],
)
def test_the_kernels_compile_without_a_gpu_and_spill_nothing(dim, group, page_size, dtype, architecture):
    case = make_case(
        [[2, 1], [1, 0]], [3, 1], dim=dim, group=group, page_size=page_size, dtype=dtype, num_tokens=[[1, 2], [0, 1]]
    )
    assert_compiles(attend_triton.attend_triton, *case.head, case.scale, architecture=architecture)
    everything = {
        "tokens": case.tokens,
        "num_tokens": case.num_tokens,
        "log_weight": torch.zeros(2, 2),
        "partial": (case.q.float(), case.q[..., 0].float()),
    }
    assert_compiles(
        attend_triton.attend_triton, *case.head, case.scale, **everything, return_lse=True, architecture=architecture
    )


def test_a_chunk_holds_whole_pages_of_every_page_size():
    assert all(CHUNK_TOKENS % page_size == 0 for page_size in (16, 32, 64))


# ---- numbers that are none


@pytest.mark.parametrize(
    ("where", "tokens"),
    [
        *(("key", 1), ("key", 530), ("all keys", 530), ("value", 40), ("query", 40), ("infinite key", 40)),
        *(("listed token", 1), ("partial", 40)),
    ],
)
def test_a_row_that_attends_a_nan_is_nan_and_no_other_row_is(implementation: Implementation, where: str, tokens: int) -> None:
    """Else a sequence whose keys are NaN would go on with plausible numbers."""
    torch.manual_seed(21)
    pages = -(-tokens // 16)
    case = make_case([[pages, pages], [pages, pages]], [(tokens - 1) % 16 + 1] * 2, num_tokens=[[20, 20], [20, 20]])
    nan, page, slot = torch.nan, int(case.pages[0, 1, pages // 2]), int(case.tokens[0, 1, 7])  # type: ignore[index]
    heads = slice(4, 8)
    if where == "key":
        case.k_pages[page, 1, 0, 3] = nan
    elif where == "all keys":
        case.k_pages[:, 1].fill_(nan)
    elif where == "infinite key":
        case.k_pages[page, 1, 0] = torch.inf  # the products' signs differ
    elif where == "value":
        case.v_pages[page, 1, 0].fill_(nan)
    elif where == "listed token":
        case.k_pages[slot // 16, 1, slot % 16].fill_(nan)
    elif where == "query":
        case.q[0, heads] = nan
    else:
        case.partial = (torch.randn(2, 8, 64), torch.randn(2, 8))
        case.partial[1][0, heads] = nan
    out, lse = case.run(implementation, return_lse=True)
    sequences = 2 if where == "all keys" else 1
    is_nan = torch.zeros(2, 8, dtype=torch.bool)
    is_nan[:sequences, heads] = True
    assert torch.equal(out.isnan().all(-1), is_nan) and torch.equal(out.isnan().any(-1), is_nan)
    assert not lse[~is_nan].isnan().any()


@pytest.mark.implementations("torch", "interpreter", "triton")
def test_a_nan_partial_is_merged_and_an_empty_one_is_not(implementation: Implementation) -> None:
    function = implementation.function("combine", file="attend")
    outs, lses = torch.randn(3, 2, 1, 64), torch.tensor([[0.0, torch.nan], [0.0, -torch.inf], [torch.nan, torch.nan]])
    outs[1, 1] = torch.nan
    counts = torch.full((3,), 2, dtype=torch.int32)
    device = implementation.device
    out, _ = function(outs.to(device), lses[..., None].to(device), counts.to(device))
    assert out.cpu().isnan().all(-1).flatten().tolist() == [True, False, True]
