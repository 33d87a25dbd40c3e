"""native: built once and whole, done without where there is no compiler, and the same bits at any number of threads."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_sparse.kernels import native
from distributed_sparse.kernels.attend.attend import attend
from distributed_sparse.kernels.attend.attend_native import attend_native
from distributed_sparse.kernels.attend.attend_torch import attend_torch
from distributed_sparse.kernels.cache.append_native import append_native, rotary_append_native
from distributed_sparse.kernels.cache.append_torch import rotary_append_torch
from distributed_sparse.kernels.quest.page_scores_native import page_scores_native
from distributed_sparse.kernels.reference import attend_reference, int4_logits_reference, top_p_reference
from distributed_sparse.kernels.twilight.int4_logits_native import int4_logits_native
from distributed_sparse.kernels.twilight.top_p_native import top_p_native
from distributed_sparse.kernels.vattention.residual_statistics_native import residual_statistics_native
from distributed_sparse.kernels.vattention.residual_statistics_torch import residual_statistics_torch
from distributed_sparse.kernels.vattention.sample_residual_native import sample_residual_native
from distributed_sparse.kernels.vattention.sample_residual_torch import sample_residual_torch
from tests.support.kernels import TOLERANCE, assert_near, bits
from tests.support.patience import WAIT_S

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache of libraries, a process that has loaded none, and few sources to build one of."""
    (sources := tmp_path / "cpp").mkdir()
    for name in ("vectors.h", "layer/rms_norm.cpp", "barrier.cpp"):
        shutil.copy(native.SOURCES / name, sources)
    monkeypatch.setattr(native, "SOURCES", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DISTRIBUTED_SPARSE_NATIVE", raising=False)
    native.library.cache_clear()
    yield tmp_path / "distributed_sparse"
    native.library.cache_clear()


@pytest.fixture
def smallest(fresh: Path) -> Path:
    """The same with the one source that is compiled soonest."""
    (native.SOURCES / "rms_norm.cpp").unlink()
    return fresh


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


@pytest.mark.slow  # it compiles all of it
def test_of_processes_that_want_it_at_once_one_builds_and_all_get_it_whole(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler, said = tmp_path / "compiler", tmp_path / "said"
    compiler.write_text(f'#!/bin/sh\necho " $@ " >> {said}\nexec {native._compiler()} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    told = "import torch; from distributed_sparse.kernels import native; assert native.library() is not None"
    processes = [subprocess.Popen([sys.executable, "-c", told], cwd=ROOT) for _ in range(3)]
    assert [process.wait(timeout=WAIT_S) for process in processes] == [0, 0, 0]
    assert [path.suffix for path in fresh.iterdir()] == [".so"]
    compiled = [line.split(" -c ")[1].split()[0] for line in said.read_text().splitlines() if " -c " in line]
    sources = (ROOT / "kernels").rglob("*.cpp")
    assert sorted(Path(name).name for name in compiled) == sorted(path.name for path in sources)


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


@pytest.mark.parametrize(("flags", "told", "expected"), [("avx2", "", False), ("avx512f", "", True), ("avx2", "1", True)])
def test_a_processor_without_wide_vectors_is_left_to_torch_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, flags: str, told: str, expected: bool
) -> None:
    assert native.library() is not None  # not one of the other processor's
    monkeypatch.setattr(native, "_processor", lambda: f"flags : {flags}")
    monkeypatch.setenv("DISTRIBUTED_SPARSE_NATIVE", told)
    native.has_wide_vectors.cache_clear()
    try:
        assert native.serves(torch.zeros(1, 64)) == expected
        case = dense_case(70)
        assert torch.equal(attend(*case, 0.1), attend_native(*case, 0.1) if expected else attend_torch(*case, 0.1))
    finally:
        native.has_wide_vectors.cache_clear()


def test_a_home_that_cannot_be_written_is_no_obstacle(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (no_folder := tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(no_folder))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert native.library() is not None
    assert len([*tmp_path.glob("distributed_sparse-*/native-*.so")]) == 1


def damage(path: Path, kind: str) -> None:
    """Put something else in the place of a library."""
    content = path.read_bytes()
    path.unlink()
    if kind == "a folder":
        (path / "with").mkdir(parents=True)
    elif kind == "a link to nothing":
        path.symlink_to(path.with_name("nothing"))
    elif kind == "unreadable":
        path.symlink_to(path.name)  # a loop: root may read what is only forbidden
    else:
        changed = bytearray(content)
        changed[18:20] = b"\xb7\x00"  # e_machine: AArch64
        kinds = {"empty": b"", "garbage": b"\0" * 5000, "cut": content[: len(content) // 2], "other": bytes(changed)}
        path.write_bytes(kinds[kind])


@pytest.mark.parametrize("kind", ["empty", "garbage", "cut", "other", "a folder", "a link to nothing", "unreadable"])
def test_a_damaged_library_is_built_again(smallest: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    assert native.library() is not None
    (built,) = smallest.iterdir()
    whole = built.read_bytes()
    damage(built, kind)
    native.library.cache_clear()
    assert native.library() is not None and not caplog.records
    assert [path.name for path in smallest.iterdir()] == [built.name]
    assert len(built.read_bytes()) == len(whole) and native._whole(built) is not None


def test_what_killed_processes_left_behind_is_removed_and_holds_nobody_up(smallest: Path) -> None:
    (smallest / "building-left").mkdir(parents=True)
    hold = "fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    held = f"import fcntl, os, sys; {hold}"
    holder = subprocess.Popen([sys.executable, "-c", held, str(smallest)], stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    holder.kill()
    holder.communicate()
    assert native.library() is not None
    assert [path.suffix for path in smallest.iterdir()] == [".so"]


def test_a_process_that_holds_the_lock_for_too_long_is_waited_for_no_longer(
    smallest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smallest.mkdir()
    (smallest / "building-still").mkdir()
    monkeypatch.setattr(native, "LOCK_TIMEOUT_S", 2.0)
    with native._lock_on(smallest) as locked:
        assert locked
        monkeypatch.setattr(native._Recipe, "build", lambda self, folder: shutil.copy(__file__, folder / self.name))
        with pytest.raises(OSError):  # it went on, and what was built is no library
            native._built(native._Recipe("native-x.so", [], [], None), smallest)
    assert (smallest / "building-still").exists(), "who is waited for may be at work there"


@pytest.mark.parametrize("home", ["no home", "a home that is no folder", "a cache that is no folder"])
def test_without_a_home_the_library_lies_in_a_private_temporary_folder_and_is_found_again(
    smallest: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: str
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "file").touch()
    if home == "no home":
        monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where HOME is not set, and the user is unknown
    elif home == "a home that is no folder":
        monkeypatch.setenv("HOME", str(tmp_path / "file"))
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        smallest.touch()
    found = []
    for _ in range(2):
        assert native.library() is not None
        native.library.cache_clear()
        (built,) = tmp_path.glob("distributed_sparse-*/native-*.so")
        assert built.parent.stat().st_mode & 0o077 == 0
        found.append(built.stat().st_mtime_ns)
    assert found[0] == found[1]


def test_a_temporary_folder_that_others_can_write_is_not_trusted(
    smallest: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (shared := tmp_path / f"distributed_sparse-{os.getuid()}").mkdir()
    shared.chmod(0o777)
    assert native.library() is not None
    assert not list(shared.iterdir())
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


@pytest.mark.parametrize("key_bits", [2, 4, 8])
@pytest.mark.parametrize("dim", [16, 80, 128])
def test_an_append_has_the_bits_of_torchs_with_all_that_is_kept_of_a_key(dim: int, key_bits: int) -> None:
    """Queries, keys (in their pages, and as they are returned), their min and max, their low-bit copy."""
    torch.manual_seed(0)
    q, k, v = torch.randn(70, 4, dim), torch.randn(70, 2, dim), torch.randn(70, 2, dim)
    angles, offset = 100 * torch.randn(70, dim // 2), torch.randn(2, dim)
    runs = [
        torch.tensor(column, dtype=torch.int32) for column in ([1, 2, 3, 4, 5], [0, 16, 32, 48, 64], [0] * 5, [16] * 4 + [6])
    ]
    found = []
    for function in (rotary_append_native, rotary_append_torch):
        caches = [torch.zeros(6, 2, 16, dim), torch.zeros(6, 2, 16, dim), torch.zeros(6, 2, 2, dim)]
        copy = [torch.zeros(6, 2, 16, dim * key_bits // 8, dtype=torch.uint8), torch.zeros(6, 2, 16, 2, dtype=torch.half)]
        turned = function(q, k, v, angles.cos(), angles.sin(), *runs, *caches, *copy, offset, return_keys=True)
        found.append([*(x + 0.0 for x in turned), *caches, copy[0].int(), copy[1]])
    for ours, theirs in zip(*found):
        assert torch.equal(bits(ours), bits(theirs))


def test_minima_of_every_size_are_rounded_to_half_precision_as_torch_rounds() -> None:
    """Keys without spread: every half that exists, those halfway between two, their neighbours, and what overflows."""
    halves = torch.arange(0x7C00, dtype=torch.int16).view(torch.half).float()
    halfway = (halves[1:] + halves[:-1]) / 2
    more = torch.tensor([65519.996, 65520.0, 65536.0, 1e30, torch.inf])
    values = torch.cat(
        [halves, halfway, halfway.nextafter(torch.tensor(0.0)), halfway.nextafter(torch.tensor(torch.inf)), more]
    )
    values = torch.cat([values, -values])
    pages = -(-len(values) // 16)
    k = torch.zeros(pages * 16, 1, 16)
    k[: len(values)] = values[:, None, None]
    starts = torch.arange(pages, dtype=torch.int32) * 16
    caches = [torch.empty(pages, 1, 16, 16) for _ in range(2)]
    codes, scales = torch.empty(pages, 1, 16, 8, dtype=torch.uint8), torch.empty(pages, 1, 16, 2, dtype=torch.half)
    append_native(k, k, starts // 16, starts, starts * 0, starts * 0 + 16, *caches, None, codes, scales)
    minima = scales.flatten(0, 2)[: len(values), 1]
    assert torch.equal(bits(minima), bits((values + 0.0).half()))  # -0.0 is stored as +0.0


@pytest.mark.parametrize(("dim", "key_bits"), [(16, 4), (16, 8), (32, 2), (48, 2), (48, 8), (80, 4), (96, 2), (112, 8)])
def test_codes_of_any_whole_number_of_bytes_are_multiplied(dim: int, key_bits: int) -> None:
    """Few bytes, or no multiple of a vector: none past the last token's are read."""
    q, copy, rows = candidates(dim=dim, key_bits=key_bits)
    assert_near(int4_logits_native(q, *copy, *rows, 0.1), int4_logits_reference(q, *copy, *rows, 0.1), 2e-6)


def candidates(batch: int = 2, dim: int = 64, key_bits: int = 4) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple]:
    """q, a low-bit copy, and scattered pages, their numbers, tokens in the last one; of 2 KV heads of 6 query heads."""
    torch.manual_seed(0)
    codes = torch.randint(256, (100, 2, 16, dim * key_bits // 8), dtype=torch.uint8)
    scales = torch.stack([0.1 * torch.rand(100, 2, 16), -torch.rand(100, 2, 16)], dim=-1).half()
    pages = torch.stack([torch.randperm(100)[:70] for _ in range(2 * batch)]).view(batch, 2, 70).int()
    rows = (pages, torch.tensor([[70, 41], [1, 0]], dtype=torch.int32), torch.tensor([5, 16], dtype=torch.int32))
    return torch.randn(batch, 12, dim), (codes, scales), rows


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_candidates_are_estimated_and_pruned_alike_at_any_number_of_threads_and_alone(threads: int) -> None:
    q, copy, rows = candidates()
    before = torch.get_num_threads()
    found = []
    try:
        for n, some in ((1, slice(0, 2)), (threads, slice(0, 2)), (threads, slice(0, 1))):
            torch.set_num_threads(n)
            own = [x[some] for x in rows]
            logits = int4_logits_native(q[some], *copy, *own, 0.1)
            tokens, counts, least = top_p_native(logits, *own, 0.2, page_size=16, sink_pages=1, recent_pages=1)
            kept = [tokens[0, h, : counts[0, h]] for h in range(2)]
            assert all(32 < len(x) < (pages - 1) * 16 + 5 for x, pages in zip(kept, (70, 41)))  # more than what is forced
            found.append([bits(logits[0]), bits(least[0]), counts[0], *kept])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other))


@pytest.mark.parametrize("spread", [0.0, 1e-6, 0.3, 3.0, 30.0, 300.0])
def test_the_pruned_set_is_the_exact_one_and_not_within_the_rounding_of_float32(spread: float) -> None:
    """Shares of the mass are asked for that one token more or less would bring by 1e-10 alone."""
    torch.manual_seed(1)
    rows = (torch.arange(3125, dtype=torch.int32)[None, None], *(torch.tensor(x).int() for x in ([[3125]], [9])))
    n = 3125 * 16 - 7
    logits = spread * torch.randn(1, 8, 50000) + torch.tensor([0.0, 1e3]).repeat(4)[:, None]
    logits[..., n:] = torch.nan
    logits[:, 2] = logits[:, 2].round()  # ties
    logits[:, 3, 77] = 1e4  # all others lie in the last bin
    mass = logits[0, 0, :n].double().softmax(0).sort(descending=True).values.cumsum(0)
    close = [min(float(mass[k]) + by, 0.999999) for k in (0, 20, 2500, 25000) for by in (-1e-10, 1e-10)]
    for p in (0.05, 0.95, *close):
        _, _, threshold = top_p_native(logits, *rows, p, page_size=16, sink_pages=0, recent_pages=0)
        exact = torch.stack([row[top_p_reference(row, p)].min() for row in logits[0, :, :n]])
        assert torch.equal(threshold[0], exact)


def sampled(block: int) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a sample of 3 sequences of 2 KV heads: more than a piece, chosen runs, ranks beyond the prefix table."""
    torch.manual_seed(0)
    lengths = torch.tensor([40_000, 700, 1], dtype=torch.int32)
    blocks = -(-lengths // block)
    kept = torch.tensor([[min(900, int(n) - 2), 0] for n in blocks]).clamp_min(1).int()
    chosen = torch.zeros(3, 2, int(kept.max()), dtype=torch.int32)
    for b, n in enumerate(blocks.tolist()):
        for h in range(2):
            others = torch.randperm(n - 1)[: kept[b, h] - 1]
            chosen[b, h, : kept[b, h]] = torch.cat([others, torch.tensor([n - 1])]).sort().values
    chosen[0, 0, :400] = torch.arange(400)
    chosen[0, 0, 400 : kept[0, 0]] = torch.arange(int(blocks[0]) - int(kept[0, 0]) + 400, int(blocks[0]))
    count = ((blocks[:, None] - kept) * block).clamp_max(5000)
    table = torch.stack([torch.randperm(2500) for _ in range(3)]).int()
    return (chosen, kept, table, lengths, count, torch.randint(2**32, (4, 3))), {"block_tokens": block, "page_size": 16}


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_sample_is_that_of_torch_at_any_number_of_threads(threads: int, block: int) -> None:
    arguments, options = sampled(block)
    options |= {"layer": 3, "first_kv_head": 5, "draw": 1, "capacity": 5001}
    expected = sample_residual_torch(*arguments, **options)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        slots = sample_residual_native(*arguments, **options)
    finally:
        torch.set_num_threads(before)
    counts = arguments[4]
    assert counts.max() > 4000 and counts.min() == 0
    for b in range(3):
        for h in range(2):
            assert torch.equal(slots[b, h, : counts[b, h]], expected[b, h, : counts[b, h]])


def pilots(group: int = 6, dim: int = 48) -> tuple:
    """The arguments of statistics of 2 sequences of 2 KV heads: pilots of several chunks, of less than one, and of nothing."""
    torch.manual_seed(0)
    caches = [torch.randn(60, 2, 16, dim) for _ in range(2)]
    tokens = torch.stack([torch.randperm(960) for _ in range(4)]).view(2, 2, 960).int()
    m = torch.tensor([[300, 129], [5, 0]], dtype=torch.int32)
    partial = (torch.randn(2, 2 * group, dim), torch.rand(2, 2 * group))
    return torch.randn(2, 2 * group, dim), *caches, tokens, m, 9 * m, partial, 0.1


@pytest.mark.parametrize(("group", "dim"), [(1, 16), (5, 80), (7, 112), (9, 48)])
def test_statistics_of_groups_and_heads_of_any_size_equal_those_of_torch(group: int, dim: int) -> None:
    case = pilots(group, dim)
    for ours, theirs in zip(residual_statistics_native(*case, centred=True), residual_statistics_torch(*case, centred=True)):
        assert_near(ours[0], theirs[0], 1e-4)
        assert_near(ours[1, :group], theirs[1, :group], 1e-3)
        assert ours[1, group:].isnan().all()


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_statistics_have_the_same_bits_at_any_number_of_threads_and_alone(threads: int) -> None:
    """A row is all one thread's, or its chunks are shared: by the numbers of rows and threads."""
    q, k, v, tokens, m, n_s, (out, lse), scale = pilots()
    before = torch.get_num_threads()
    found = []
    try:
        for n, some in ((1, slice(0, 2)), (threads, slice(0, 2)), (threads, slice(0, 1))):
            torch.set_num_threads(n)
            own = (q[some], k, v, tokens[some], m[some], n_s[some], (out[some], lse[some]), scale)
            found.append([bits(x[0]) for x in residual_statistics_native(*own, centred=True)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other))
