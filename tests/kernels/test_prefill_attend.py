"""prefill_attend: prompt chunks of any size see exactly their own past, whatever lies in the pages around it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from distributed_sparse.kernels.attend import prefill_attend_torch, prefill_attend_triton
from distributed_sparse.kernels.attend.prefill_attend import prefill_attend
from distributed_sparse.kernels.reference import prefill_attend_reference
from tests.support.kernels import ARCHITECTURES, TOLERANCE, Implementation, assert_compiles, assert_near, bits, poison_

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CHUNKS = [(1, 1), (17, 17), (16, 15), (100, 33), (64, 0), (513, 1), (130, 70)]  # (context after the chunk, its queries)


@dataclass
class Case:
    """The arguments of `prefill_attend`. Keys and values outside the contexts, unused table entries and padding are poison."""

    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor
    query_start: Tensor
    context_lens: Tensor

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.q, self.k_pages, self.v_pages, self.page_table, self.query_start, self.context_lens

    @property
    def max_query_len(self) -> int:
        return int(self.query_start.diff().max())

    def run(self, implementation: Implementation, longer_grid: int = 0) -> Tensor:
        """The outputs of the chunks' queries, without those of the padding."""
        function = implementation.function("prefill_attend")
        tensors = (x.to(implementation.device) for x in self.tensors)
        out = function(*tensors, self.scale, self.max_query_len + longer_grid)
        assert out.shape == self.q.shape and out.dtype == self.q.dtype
        return out.cpu()[: int(self.query_start[-1])]

    def reference(self) -> Tensor:
        return prefill_attend_reference(*self.tensors, self.scale)

    def chunks(self, which: list[int]) -> Case:
        """Some chunks of a case, in the order named, without padding."""
        starts = self.query_start.tolist()
        queries = [self.q[starts[r] : starts[r + 1]] for r in which]
        lengths = torch.tensor([0, *map(len, queries)])
        return Case(
            torch.cat(queries),
            self.k_pages,
            self.v_pages,
            self.page_table[which],
            lengths.cumsum(0).int(),
            self.context_lens[which],
        )


def make_case(
    chunks: list[tuple[int, int]],
    *,
    heads: int = 2,
    group: int = 3,
    dim: int = 64,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    padding: int = 5,
) -> Case:
    """A random case of (context, queries) chunks; pages lie scattered in memory."""
    counts = [-(-context // page_size) for context, _ in chunks]
    scattered = (torch.randperm(sum(counts)) + 1).split(counts)
    k_pages, v_pages = (poison_(torch.empty(sum(counts) + 1, heads, page_size, dim, dtype=dtype)) for _ in range(2))
    page_table = poison_(torch.empty(len(chunks), max(counts) + 3, dtype=torch.int32))
    for r, (context, _) in enumerate(chunks):
        page_table[r, : counts[r]] = scattered[r]
        last = (context - 1) % page_size + 1
        for cache in (k_pages, v_pages):
            cache[scattered[r][:-1]] = torch.randn(counts[r] - 1, heads, page_size, dim).to(dtype)
            cache[scattered[r][-1], :, :last] = torch.randn(heads, last, dim).to(dtype)
    query_start = torch.tensor([0, *(queries for _, queries in chunks)]).cumsum(0).int()
    q = 1.5 * torch.randn(int(query_start[-1]) + padding, heads * group, dim)
    poison_(q[int(query_start[-1]) :])
    contexts = torch.tensor([context for context, _ in chunks], dtype=torch.int32)
    return Case(q.to(dtype), k_pages, v_pages, page_table, query_start, contexts)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("dim", "heads", "group", "page_size"), [(64, 2, 3, 16), (64, 1, 16, 64), (96, 2, 1, 32), (128, 2, 4, 16), (256, 1, 8, 32)]
)
def test_each_query_sees_its_own_past_and_nothing_else(implementation, dim, heads, group, page_size, dtype):
    case = make_case(CHUNKS, dim=dim, heads=heads, group=group, page_size=page_size, dtype=dtype)
    assert_near(case.run(implementation), case.reference(), TOLERANCE[dtype])


@pytest.mark.implementations("torch", "triton")
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_chunks_over_long_histories_equal_the_reference(implementation, dtype):
    case = make_case([(1500, 1100), (900, 900), (1024, 256), (2000, 3)], dtype=dtype, heads=1, group=2)
    assert_near(case.run(implementation), case.reference(), TOLERANCE[dtype])


@pytest.mark.implementations("torch")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [16, 100, 128])
def test_a_history_attended_in_blocks_is_attended_once(implementation, block, dtype, monkeypatch):
    monkeypatch.setattr(prefill_attend_torch, "HISTORY_BLOCK_TOKENS", block)
    case = make_case([(300, 44), (257, 1), (129, 29)], dtype=dtype)
    assert_near(case.run(implementation), case.reference(), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prompt_cut_into_odd_chunks_gives_what_the_whole_gives(implementation, dtype):
    whole = make_case([(150, 150)], dtype=dtype, padding=0)
    cuts = [0, 7, 24, 25, 130, 150]
    pieces = []
    for begin, end in pairwise(cuts):
        chunk = Case(
            whole.q[begin:end],
            poison_(whole.k_pages.clone()),
            poison_(whole.v_pages.clone()),
            whole.page_table,
            torch.tensor([0, end - begin], dtype=torch.int32),
            torch.tensor([end], dtype=torch.int32),
        )
        for i in range(end):  # later tokens are not written yet
            page = int(whole.page_table[0, i // 16])
            chunk.k_pages[page, :, i % 16] = whole.k_pages[page, :, i % 16]
            chunk.v_pages[page, :, i % 16] = whole.v_pages[page, :, i % 16]
        pieces.append(chunk.run(implementation))
    assert_near(torch.cat(pieces), whole.reference(), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("one_thread")
def test_a_chunk_has_the_same_bits_alone_and_among_any_others(implementation, dtype):
    case = make_case([(100, 33), (40, 40), (70, 1)], dtype=dtype)
    out = case.run(implementation, longer_grid=60)
    reordered = case.chunks([2, 0, 1])
    pieces = dict(zip([2, 0, 1], reordered.run(implementation).split(reordered.query_start.diff().tolist())))
    for r in range(3):
        here = out[int(case.query_start[r]) : int(case.query_start[r + 1])]
        assert torch.equal(bits(pieces[r]), bits(here))
        assert torch.equal(bits(case.chunks([r]).run(implementation)), bits(here))


def test_logits_of_hundreds_neither_overflow_nor_vanish(implementation):
    case = make_case([(90, 40)])
    case.q *= 40
    # A float32 logit of 300 is known to 3e-5, and its exponential as well.
    assert_near(case.run(implementation), case.reference(), 1e-4)


def test_the_dispatcher_chooses_the_implementation_of_the_tensors_device():
    case = make_case([(20, 20)], padding=0)
    assert_near(prefill_attend(*case.tensors, case.scale, 20), case.reference(), TOLERANCE[torch.float32])


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
def test_the_kernel_compiles_without_a_gpu_and_spills_nothing(dim, group, page_size, dtype, architecture):
    case = make_case([(3, 2)], dim=dim, group=group, page_size=page_size, dtype=dtype)
    launcher = prefill_attend_triton.prefill_attend_triton
    assert_compiles(launcher, *case.tensors, case.scale, case.max_query_len, architecture=architecture)


@pytest.mark.parametrize("where", ["key", "value", "history"])
def test_a_query_that_attends_a_nan_is_nan_and_no_other_chunk_is(implementation: Implementation, where: str) -> None:
    """Else a prompt with a NaN in it would go on with plausible numbers."""
    torch.manual_seed(5)
    case = make_case([(100, 33), (130, 70)], heads=2)
    position = 10 if where == "history" else 70
    cache = case.v_pages if where == "value" else case.k_pages
    cache[case.page_table[0, position // 16], 1, position % 16] = torch.nan
    out = case.run(implementation).unflatten(1, (2, -1))  # [N, H_kv, G, d]
    first_query = 100 - 33
    assert out[max(position - first_query, 0) : 33, 1].isnan().all()
    assert not out[:33, 0].isnan().any() and not out[33:].isnan().any()
