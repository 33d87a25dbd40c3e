"""Memory in huge pages: zeros like torch's, taken as they are touched, and given back."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import pytest
import torch

from distributed_sparse.kernels import huge_pages
from distributed_sparse.kernels.huge_pages import HUGE_PAGE_BYTES, zeros

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def kept(what: str) -> int:
    """Bytes that this process has of a kind: a line of smaps_rollup."""
    found = re.search(rf"^{what}:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int32])
@pytest.mark.parametrize("shape", [(3, 5), (0, 7), (1 << 21,), (1025, 3, 2048)])
def test_they_are_zeros_of_that_shape_that_can_be_written(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    made = zeros(shape, dtype, "cpu")
    assert made.shape == shape and made.dtype == dtype and made.device.type == "cpu" and made.is_contiguous()
    assert not made.any()
    made.fill_(3)
    assert (made == 3).all()


def test_on_the_meta_device_nothing_is_taken() -> None:
    assert zeros((1 << 40, 8), torch.float32, "meta").device.type == "meta"


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux alone says what a process has")
def test_memory_is_taken_when_touched_and_given_back_with_the_last_view() -> None:
    size = 64 * HUGE_PAGE_BYTES
    before = kept("Rss")
    made = zeros((size,), torch.uint8, "cpu")
    assert kept("Rss") - before < size // 4
    made[: size // 2] = 1
    assert size // 4 < kept("Rss") - before < 3 * size // 4
    part = made[: size // 4]
    del made
    gc.collect()
    assert part.sum() == size // 4
    del part
    gc.collect()
    assert kept("Rss") - before < size // 4


@pytest.mark.skipif(
    not ENABLED.exists() or "[never]" in ENABLED.read_text(),
    reason="huge pages are off here",
)
def test_the_pages_are_huge() -> None:
    before = kept("AnonHugePages")
    made = zeros((64 * HUGE_PAGE_BYTES,), torch.uint8, "cpu").fill_(1)
    assert kept("AnonHugePages") - before >= 32 * HUGE_PAGE_BYTES  # a few may be missing on a full machine
    assert made.data_ptr() % HUGE_PAGE_BYTES == 0


def test_memory_that_is_not_there_is_refused_in_torchs_words() -> None:
    with pytest.raises(RuntimeError, match=r"can't allocate memory|not enough memory"):
        zeros((1 << 50,), torch.uint8, "cpu")


def test_a_kernel_that_knows_no_huge_pages_gives_ordinary_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(num_bytes: int) -> torch.Tensor:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(huge_pages, "_mapped", refuse)
    assert not zeros((2 * HUGE_PAGE_BYTES,), torch.uint8, "cpu").any()
