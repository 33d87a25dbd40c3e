"""native: built once and whole, done without where there is no compiler, and the same bits at any number of threads."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distributed_sparse.kernels import native
from distributed_sparse.kernels.append_native import rotary_append_native
from distributed_sparse.kernels.append_torch import rotary_append_torch
from distributed_sparse.kernels.attend import attend
from distributed_sparse.kernels.attend_native import attend_native
from distributed_sparse.kernels.attend_torch import attend_torch
from distributed_sparse.kernels.page_scores_native import page_scores_native
from distributed_sparse.kernels.reference import attend_reference
from tests.support.kernels import TOLERANCE, assert_near, bits

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache of libraries, and a process that has loaded none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DISTRIBUTED_SPARSE_NATIVE", raising=False)
    native.library.cache_clear()
    yield tmp_path / "distributed_sparse"
    native.library.cache_clear()


def dense_case(context: int = 1200, dim: int = 64) -> tuple[torch.Tensor, ...]:
    """q, K, V, pages, their number, tokens in the last one; of 2 KV heads of 4 query heads."""
    torch.manual_seed(0)
    pages = -(-context // 16)
    table = (torch.randperm(pages) + 1).int()[None, None].expand(1, 2, -1)
    caches = (torch.randn(pages + 1, 2, 16, dim) for _ in range(2))
    counts = torch.full((1, 1), pages, dtype=torch.int32).expand(1, 2)
    return torch.randn(1, 8, dim), *caches, table, counts, torch.tensor([(context - 1) % 16 + 1], dtype=torch.int32)


def test_this_machine_builds_the_kernels() -> None:
    assert native.library() is not None


def test_the_kernels_run_on_torchs_own_threads() -> None:
    """A second OpenMP library would keep threads of its own, which fight with torch's for the cores."""
    native.library()
    mapped = {Path(name).resolve() for name in Path("/proc/self/maps").read_text().split() if "/libgomp" in name}
    assert len(mapped) == 1 and "torch" in str(*mapped)


@pytest.mark.parametrize("dim", [16, 48, 80, 112])
def test_heads_of_any_multiple_of_16_dimensions_are_served(dim: int) -> None:
    case = dense_case(1200, dim)
    assert_near(attend_native(*case, 0.1), attend_reference(*case, 0.1)[0], TOLERANCE[torch.float32])


def test_heads_of_other_sizes_go_to_torch() -> None:
    case = dense_case(70, 24)
    assert torch.equal(attend(*case, 0.1), attend_torch(*case, 0.1))


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_a_row_has_the_same_bits_at_any_number_of_threads(threads: int) -> None:
    case = dense_case()
    metadata, table = torch.randn(90, 2, 2, 64), (torch.randperm(89)[None] + 1).int()
    before = torch.get_num_threads()
    found = []
    try:
        for n in (1, threads):
            torch.set_num_threads(n)
            scores = page_scores_native(case[0], metadata, table, torch.tensor([89], dtype=torch.int32))
            found.append((attend_native(*case, 0.1), scores))
    finally:
        torch.set_num_threads(before)
    for one, many in zip(*found):
        assert torch.equal(bits(one), bits(many))


@pytest.mark.parametrize("context", [2600, 4096])
def test_heads_with_one_list_have_the_bits_of_heads_with_lists_of_their_own(context: int) -> None:
    """Some chunks are read for all heads at once, others head by head: by the number of threads, and by the lists."""
    q, k, v, pages, counts, last = dense_case(context)
    assert pages.stride(1) == 0
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 64):  # few chunks for so many: head by head
            torch.set_num_threads(threads)
            for own in (pages, pages.contiguous()):
                found.append(attend_native(q, k, v, own, counts, last, 0.1))
                tokens = pages[..., :40] * 16 + 3
                more = {"tokens": tokens.contiguous(), "num_tokens": torch.tensor([[40, 7]], dtype=torch.int32)}
                found.append(attend_native(q, k, v, own, counts - 40, last * 0 + 16, 0.1, **more))
    finally:
        torch.set_num_threads(before)
    assert_near(found[0], attend_reference(q, k, v, pages, counts, last, 0.1)[0], TOLERANCE[torch.float32])
    for i, out in enumerate(found):
        assert torch.equal(bits(out), bits(found[i % 2]))


def test_it_is_built_once_and_found_again(fresh: Path) -> None:
    assert native.library() is not None
    (built,) = fresh.iterdir()
    modified = built.stat().st_mtime_ns
    native.library.cache_clear()
    assert native.library() is not None
    assert [path.stat().st_mtime_ns for path in fresh.iterdir()] == [modified]


def test_processes_that_build_at_once_all_get_it_whole(fresh: Path) -> None:
    told = "import torch; from distributed_sparse.kernels import native; assert native.library() is not None"
    processes = [subprocess.Popen([sys.executable, "-c", told], cwd=ROOT) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert [path.suffix for path in fresh.iterdir()] == [".so"]


@pytest.mark.parametrize(
    ("compiler", "said"),
    [
        ("no-such-compiler", "no-such-compiler"),
        (f"{sys.executable} -c print()", "could not be built"),
        ("false", "could not be built"),
    ],
    ids=["absent", "compiles nothing", "fails"],
)
def test_without_a_compiler_torch_does_the_work_and_it_is_said_once(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, compiler: str, said: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    case = dense_case(70)
    with caplog.at_level(logging.WARNING):
        outputs = [attend(*case, 0.1) for _ in range(2)]
    assert native.library() is None
    assert len(caplog.records) == 1 and said in caplog.text
    for out in outputs:
        assert torch.equal(out, attend_torch(*case, 0.1))


def test_the_variable_turns_it_off_without_a_word(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DISTRIBUTED_SPARSE_NATIVE", "0")
    case = dense_case(70)
    assert torch.equal(attend(*case, 0.1), attend_torch(*case, 0.1))
    assert not caplog.records and not fresh.exists()


def test_a_home_that_cannot_be_written_is_no_obstacle(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (no_folder := tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(no_folder))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert native.library() is not None
    assert len([*tmp_path.glob("distributed_sparse-*/native-*.so")]) == 1


def test_values_of_every_size_are_read_right_from_half_precision() -> None:
    """Subnormals, zeros of both signs, and the largest numbers, through a softmax over one token, which is its value."""
    for dtype in (torch.float16, torch.bfloat16):
        information = torch.finfo(dtype)
        values = torch.tensor([0.0, -0.0, information.tiny, information.smallest_normal / 4, information.max, -1.5, 3.0, 1e-3])
        v = torch.zeros(2, 1, 16, 64, dtype=dtype)
        v[1, 0, 0] = values.to(dtype).repeat(8)
        ones = torch.ones(1, 1, dtype=torch.int32)
        out = attend_native(torch.randn(1, 1, 64).to(dtype), torch.zeros_like(v), v, ones[None], ones, ones[0], 1.0)
        assert torch.equal(out[0, 0], v[1, 0, 0])


def test_exponentials_of_every_size_are_right() -> None:
    """Two tokens: one with the logit 0 and the value 0, one with the logit x and the value 1: e^x / (1 + e^x)."""
    logits = -torch.linspace(0.0, 95.0, 4001)
    n = len(logits)
    q = torch.zeros(n, 1, 64)
    q[:, 0, 0] = logits
    k, v = torch.zeros(2, 2, 1, 16, 64)
    k[1, 0, 1, 0] = v[1, 0, 1] = 1.0
    ones = torch.ones(n, 1, dtype=torch.int32)
    out = attend_native(q, k, v, ones[..., None], ones, ones[:, 0] + 1, 1.0)[:, 0, 5]
    expected = logits.double().sigmoid()
    kept = logits > -87
    assert ((out[kept].double() / expected[kept] - 1).abs() < 5e-7).all()
    assert (out[~kept] < 1e-37).all()
    assert_near(out, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dim", [16, 80, 128])
def test_queries_and_keys_are_turned_to_the_bits_that_torch_turns_them_to(dim: int) -> None:
    """A method that keeps low-bit keys is served by torch: under a covering budget it is bitwise dense all the same."""
    torch.manual_seed(0)
    q, k, v = torch.randn(70, 4, dim), torch.randn(70, 2, dim), torch.randn(70, 2, dim)
    angles = 100 * torch.randn(70, dim // 2)
    runs = [
        torch.tensor(column, dtype=torch.int32) for column in ([1, 2, 3, 4, 5], [0, 16, 32, 48, 64], [0] * 5, [16] * 4 + [6])
    ]
    found = []
    for function in (rotary_append_native, rotary_append_torch):
        caches = [torch.zeros(6, 2, 16, dim), torch.zeros(6, 2, 16, dim), torch.zeros(6, 2, 2, dim)]
        turned, _ = function(q, k, v, angles.cos(), angles.sin(), *runs, *caches)
        found.append([turned + 0.0, *caches])
    for ours, theirs in zip(*found):
        assert torch.equal(bits(ours), bits(theirs))
