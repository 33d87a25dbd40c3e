"""scratch: a thread's own buffers, kept from call to call, so that a decode step on CPU maps no memory anew."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distributed_sparse.kernels import scratch as module
from distributed_sparse.kernels.attend.attend_torch import attend_torch
from distributed_sparse.kernels.attend.prefill_attend_torch import prefill_attend_torch
from distributed_sparse.kernels.cache.append_torch import append_torch
from distributed_sparse.kernels.hash.hamming_scores_torch import hamming_scores_torch
from distributed_sparse.kernels.quest.page_scores_torch import page_scores_torch
from distributed_sparse.kernels.scratch import scratch
from distributed_sparse.kernels.twilight.int4_logits_torch import int4_logits_torch

HEADS, GROUP, DIM, PAGE_SIZE, CONTEXT = 4, 2, 64, 16, 4096
PAGES = CONTEXT // PAGE_SIZE


@pytest.fixture(autouse=True)
def uninitialised_memory_is_poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Not here, where what is kept is what is tested; nor is what other tests have left."""
    monkeypatch.setattr(module._buffers, "by_name", {})
    yield


def test_a_name_gives_the_same_memory_again_in_any_shape() -> None:
    first = scratch("a", (4, 6))
    assert first.shape == (4, 6) and first.dtype == torch.float32 and first.is_contiguous()
    assert scratch("a", (2, 3, 4)).data_ptr() == first.data_ptr()
    assert scratch("a", (5,)).data_ptr() == first.data_ptr()
    assert scratch("a", (0, 7)).shape == (0, 7)


def test_names_and_dtypes_do_not_share_memory() -> None:
    buffers = [scratch("a", (8,)), scratch("b", (8,)), scratch("a", (8,), torch.float16), scratch("a", (8,), torch.uint8)]
    for value, buffer in enumerate(buffers):
        buffer.fill_(value)
    assert [buffer.unique().tolist() for buffer in buffers] == [[0], [1], [2], [3]]


def test_a_buffer_grows_and_never_shrinks() -> None:
    scratch("a", (10,))
    large = scratch("a", (1000,))
    assert large.shape == (1000,)
    assert scratch("a", (10,)).data_ptr() == large.data_ptr()
    assert scratch("a", (1000,)).data_ptr() == large.data_ptr()


def test_two_threads_never_write_to_the_same_memory() -> None:
    found: list[int] = []
    mine = scratch("a", (16,)).fill_(1.0)

    def work() -> None:
        theirs = scratch("a", (16,)).fill_(2.0)
        found.append(theirs.data_ptr())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found != [mine.data_ptr()] and (mine == 1.0).all()


def test_what_inference_mode_has_made_can_be_written_to_outside_of_it() -> None:
    with torch.inference_mode():
        scratch("a", (4,)).fill_(1.0)
    assert scratch("a", (4,)).add_(1.0).tolist() == [2.0] * 4


class Allocations(TorchDispatchMode):
    """Bytes of the largest tensor that an operation has returned and that lies in none of a thread's buffers."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage().data_ptr() for tensor in module._buffers.by_name.values()}
        known |= {
            x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)
        }  # a view of an argument, or that itself
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


def calls() -> dict[str, Callable[[], object]]:
    """One call of each op that reads a long context, which is much larger than what the call returns."""
    torch.manual_seed(0)
    k_pages, v_pages = torch.randn(2, PAGES + 1, HEADS, PAGE_SIZE, DIM).unbind(0)
    q = torch.randn(1, HEADS * GROUP, DIM)
    table = (torch.randperm(PAGES) + 1).int()[None]
    count, last = torch.tensor([PAGES], dtype=torch.int32), torch.tensor([PAGE_SIZE], dtype=torch.int32)
    context_lens, starts = torch.tensor([CONTEXT], dtype=torch.int32), torch.arange(PAGES, dtype=torch.int32) * PAGE_SIZE
    pages, counts = table[:, None].expand(-1, HEADS, -1), count[:, None].expand(-1, HEADS)
    min_max = torch.zeros(PAGES + 1, HEADS, 2, DIM)
    codes = torch.zeros(PAGES + 1, HEADS, PAGE_SIZE, DIM // 2, dtype=torch.uint8)
    scales = torch.zeros(PAGES + 1, HEADS, PAGE_SIZE, 2, dtype=torch.float16)
    runs = (table[0], starts, torch.zeros_like(starts), torch.full_like(starts, PAGE_SIZE))
    append_torch(torch.randn(CONTEXT, HEADS, DIM), torch.randn(CONTEXT, HEADS, DIM), *runs, k_pages, v_pages, min_max)
    signatures = torch.zeros(PAGES + 1, HEADS, PAGE_SIZE, GROUP, 4, dtype=torch.int32)
    chunk = torch.randn(2, HEADS * GROUP, DIM)
    of_chunk = (table, torch.tensor([0, 2], dtype=torch.int32), context_lens)
    return {
        "attend": lambda: attend_torch(q, k_pages, v_pages, pages, counts, last, 0.1),
        "page_scores": lambda: page_scores_torch(q, min_max, table, count),
        "int4_logits": lambda: int4_logits_torch(q, codes, scales, pages, counts, last, 0.1),
        "hamming_scores": lambda: hamming_scores_torch(
            torch.zeros(1, HEADS * GROUP, 4, dtype=torch.int32), signatures, table, context_lens
        ),
        "prefill_attend": lambda: prefill_attend_torch(chunk, k_pages, v_pages, *of_chunk, 0.1, 2),
    }


@pytest.mark.parametrize("op", ["attend", "page_scores", "int4_logits", "hamming_scores", "prefill_attend"])
@pytest.mark.parametrize("inference", [True, False])
def test_a_second_call_allocates_nothing_of_the_size_of_what_it_reads(op: str, inference: bool) -> None:
    """Were a buffer allocated once per call, each layer of each step would fault its memory in anew."""
    with torch.inference_mode(inference):
        call = calls()[op]
        call()
        with Allocations() as allocations:
            call()
    held = max(tensor.untyped_storage().nbytes() for tensor in module._buffers.by_name.values())
    assert 0 < allocations.largest <= held / 4
