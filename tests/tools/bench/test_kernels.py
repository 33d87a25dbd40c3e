"""The kernel benchmark times what it has checked, counts bytes by their formulas, and says what it could not measure."""

from __future__ import annotations

import time
import weakref
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from distributed_sparse.tools.bench import kernels, peers
from distributed_sparse.tools.bench import timing as measure
from distributed_sparse.tools.bench.kernels import KernelSettings, bench_kernels, shapes
from distributed_sparse.tools.bench.ops import OPS

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = KernelSettings(
    context=(1024,),
    batch=(2,),
    token_budget=(256,),
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    prefill_tokens=96,
    caches=2,
    repeats=1,
)
OWN = "cpu"


@pytest.fixture(autouse=True)
def bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda device: 2e9)


def own_rows(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["op"]: row for row in rows if row["implementation"] == OWN}


def test_every_kernel_is_timed_with_the_bytes_that_it_must_move() -> None:
    told: list[dict[str, Any]] = []
    rows = bench_kernels(SMALL, told.append)
    own = own_rows(rows)
    assert rows == told and list(own) == list(OPS)
    kv_row, queries = 2 * 64 * 4, 2 * 4 * 64 * 4  # K and V of a token and head; q of the batch, and as much output
    table, scores = 4 * 2 * 64, 4 * 2 * 2 * 64  # the page tables; a float32 per page and row
    expected = {
        "page_scores": 2 * 2 * 64 * kv_row + queries + table + scores,  # a min and a max are as large as a K and a V
        "top_k_pages": scores + table + 4 * 4 * (16 + 1),
        "attend dense": 4 * (1024 * kv_row + 4 * 64) + 2 * queries,
        "attend pages": 4 * (256 * kv_row + 4 * 16) + 2 * queries,
        "attend tokens": 4 * (256 * kv_row + 4 * 256) + 2 * queries,
        "prefill_attend": 1024 * 2 * kv_row + 2 * 96 * 4 * 64 * 4,
        "rms_norm": (2 + 1 + 2) * 4 * 64 * 4,
        "hamming_scores": 2 * 4 * 1025 * 4 + table + 4 * 4 * 1024,
        "int4_logits": 4 * (1024 * 36 + 4 * 64) + queries + 4 * 2 * 4 * 1024,
    }
    for name, num_bytes in expected.items():
        assert own[name]["MB"] * 1e6 == pytest.approx(num_bytes), name
        assert own[name]["bytes_ms"] == pytest.approx(num_bytes / 2e9 * 1e3), name
    for name, row in own.items():
        assert row["p10_ms"] <= row["ms"] <= row["p90_ms"] and row["ms"] > 0, name
        partly = {"append prompt": "4 of 6 pages", "rotary_append prompt": "4 of 6 pages", "prefill_attend": "32 of 96 queries"}
        assert row["checked"] == partly.get(name, "all")
        assert row["bandwidth_share"] == pytest.approx(row["bytes_ms"] / row["ms"]) and row["over_ours"] == 1, name
    # 96 queries behind 928 tokens; two products, of 2 x 64 operations each, per pair and head
    pairs = 96 * 928 + 96 * 97 / 2
    assert own["prefill_attend"]["TFLOP_per_s"] == pytest.approx(4 * 64 * 4 * pairs / own["prefill_attend"]["ms"] / 1e9)


def test_a_point_is_timed_once_along_the_axes_that_an_op_does_not_have() -> None:
    grid = replace(SMALL, context=(512, 1024), token_budget=(128, 256), ops=("rms_norm", "attend dense", "attend pages"))
    rows = [row for row in bench_kernels(grid) if row["implementation"] == OWN]
    assert [row["op"] for row in rows].count("rms_norm") == 1
    assert [(row["context"], row.get("token_budget")) for row in rows if row["op"] == "attend dense"] == [
        (512, None),
        (1024, None),
    ]
    assert len({(row["context"], row["token_budget"]) for row in rows if row["op"] == "attend pages"}) == 4


def test_peers_stand_beside_what_they_can_do_and_say_why_they_cannot() -> None:
    rows = bench_kernels(replace(SMALL, ops=("attend dense", "top_k_pages", "prefill_attend")))
    found = {(row["op"], row["implementation"]): row for row in rows}
    for timed in (("attend dense", "sdpa"), ("prefill_attend", "sdpa"), ("top_k_pages", "torch.topk")):
        own = found[timed[0], OWN]
        assert found[timed]["over_ours"] == pytest.approx(found[timed]["ms"] / own["ms"]) and found[timed]["MB"] == own["MB"]
    assert found["attend dense", "flashinfer"]["unavailable"] == "flashinfer has no kernels for cpu"
    assert "timed on cuda" in found["attend dense", "flex_attention"]["unavailable"]


def test_a_peer_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.OPS["top_k_pages"], "peers", lambda self, data, arguments: {"worst": lambda: worst})

    def worst(arguments: dict[str, Tensor]) -> Tensor:
        return (-arguments["scores"]).topk(16, dim=-1).indices

    row = bench_kernels(replace(SMALL, ops=("top_k_pages",)))[-1]
    assert row["implementation"] == "worst" and "not what the reference gives" in row["wrong"] and "ms" not in row


def test_a_library_stands_with_the_faster_of_its_kernels_and_is_named_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def variant(seconds: float) -> Any:
        def run(arguments: dict[str, Tensor]) -> Tensor:
            time.sleep(seconds)
            return arguments["scores"].topk(16, dim=-1).indices

        return lambda: run

    both = {"lib/slow": variant(0.02), "lib/fast": variant(0.0)}
    monkeypatch.setattr(kernels.OPS["top_k_pages"], "peers", lambda self, data, arguments: both)
    rows = bench_kernels(replace(SMALL, ops=("top_k_pages",)))
    assert [row["implementation"] for row in rows] == [OWN, "lib/fast"]
    both["lib/fast"] = lambda: 1 / 0  # type: ignore[assignment]
    rows = bench_kernels(replace(SMALL, ops=("top_k_pages",)))
    assert [row["implementation"] for row in rows] == [OWN, "lib/slow"] and "ms" in rows[1]


@pytest.mark.slow
def test_flex_attention_is_compiled_at_every_shape_and_never_runs_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch stops compiling a function after `recompile_limit` shapes, and would go on without a word."""
    compiler = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)

    def decode(flex: Any, context: int) -> None:
        q, k, v = torch.ones(1, 4, 1, 64), torch.ones(1, 2, context, 64), torch.ones(1, 2, context, 64)
        flex(q, k, v, scale=1.0, enable_gqa=True)

    [shape] = shapes(SMALL)
    flex = None
    for number in range(5):
        flex = peers._compiled_flex(replace(shape, context=128 + 16 * number))
        decode(flex, 128 + 16 * number)
        assert compiler.frame_count == number + 1
    assert peers._compiled_flex(replace(shape, context=192)) is flex, "caches of one shape share what is compiled"
    decode(flex, 256)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        decode(flex, 512)
    torch._dynamo.reset()


# ---- no speed of a wrong result


def spoiled(result: Any) -> Any:
    """Off by 1% of its spread in one head, or by one in its first entry."""
    if not isinstance(result, Tensor):
        return type(result)(*map(spoiled, result)) if hasattr(result, "_fields") else tuple(map(spoiled, result))
    result = result.clone()
    if result.is_floating_point():
        result[:, 0] += 0.1 * result[result.isfinite()].std() + 1e-3
    else:
        result.view(-1)[0] += 1
    return result


@pytest.mark.parametrize("name", OPS)
def test_a_kernel_that_is_wrong_is_refused_and_the_others_are_timed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    right = OPS[name].run
    in_place = "append" in name
    monkeypatch.setattr(OPS[name], "run", (lambda self, a: a) if in_place else (lambda self, a: spoiled(right(self, a))))
    other = "add_rms_norm" if name != "add_rms_norm" else "rms_norm"
    found = own_rows(bench_kernels(replace(SMALL, ops=(name, other))))
    assert name in found[name]["wrong"] and "ms" not in found[name]
    assert found[other]["ms"] > 0


def test_more_rows_than_are_checked_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CHECKED_ROWS", 2)
    rows = own_rows(bench_kernels(replace(SMALL, ops=("rms_norm", "page_scores"))))
    assert rows["page_scores"]["checked"] == "2 of 4 rows" and rows["rms_norm"]["checked"] == "all"


def test_the_caches_are_left_as_they_were_by_the_kernels_that_write_them() -> None:
    [shape] = shapes(SMALL)
    with torch.inference_mode():
        [data, _] = kernels._make_data(SMALL, shape)
        before = [tensor.clone() for tensor in data.cache.pages]
        for name in ("append step", "append prompt", "rotary_append step", "rotary_append prompt"):
            op = OPS[name](shape)
            arguments = op.arguments(data, torch.Generator().manual_seed(0))
            op.before_check(arguments)
            op.check(arguments, op.run(arguments), [])
            for was, now in zip(before, data.cache.pages):
                assert torch.equal(was[1:], now[1:]), name  # the null page is nobody's


# ---- what cannot be measured


def test_a_point_that_does_not_fit_is_printed_with_the_reason_and_the_rest_goes_on() -> None:
    rows = bench_kernels(replace(SMALL, context=(1 << 40, 512), ops=("page_scores", "attend pages")))
    found = {(row["op"], row["context"]): row for row in rows}
    for name in ("page_scores", "attend pages"):
        assert "out of memory" in found[name, 1 << 40]["unavailable"] and found[name, 512]["ms"] > 0


def test_peers_without_room_for_contiguous_keys_are_unavailable_and_the_kernel_is_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kv_bytes = 2 * 2 * 2 * 1024 * 2 * 64 * 4  # of both caches
    monkeypatch.setattr(measure, "available_bytes", lambda device: int(1.5 * kv_bytes))
    rows = {row["implementation"]: row for row in bench_kernels(replace(SMALL, ops=("attend dense",)))}
    assert "contiguous" in rows["sdpa"]["unavailable"] and rows[OWN]["ms"] > 0


def test_other_dtypes_are_checked_by_their_own_tolerance() -> None:
    rows = own_rows(bench_kernels(replace(SMALL, dtype="bfloat16")))
    assert not [row for row in rows.values() if "wrong" in row] and rows["attend dense"]["dtype"] == "bfloat16"
    assert rows["rms_norm"]["MB"] * 1e6 == pytest.approx((2 + 1 + 2) * 4 * 64 * 2)


def test_settings_that_cannot_be_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="--ops='attned' is not known"):
        KernelSettings(ops=("attned",))
    with pytest.raises(ValueError, match="--num-heads 6 is no multiple of --num-kv-heads 4"):
        KernelSettings(num_heads=6, num_kv_heads=4)
    assert KernelSettings(device="cuda").dtype == "bfloat16" and KernelSettings(device="cuda").context[-1] == 131072


def test_what_fails_in_its_own_way_ends_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer built for another version, a kernel that does not compile."""

    def fails(*_: Any) -> Any:
        raise TypeError("not what it used to be")

    monkeypatch.setattr(kernels.OPS["attend dense"], "peers", lambda self, data, arguments: {"old": lambda: fails})
    monkeypatch.setattr(kernels.OPS["attend pages"], "run", fails)
    rows = bench_kernels(replace(SMALL, ops=("attend dense", "attend pages", "rms_norm")))
    found = {(row["op"], row["implementation"]): row for row in rows}
    assert found["attend dense", "old"]["unavailable"] == "old failed: TypeError: not what it used to be"
    assert found["attend pages", OWN]["wrong"] == "attend pages failed: TypeError: not what it used to be"
    assert found["attend dense", OWN]["ms"] > 0 and found["rms_norm", OWN]["ms"] > 0


def test_a_peer_that_fails_while_it_is_timed_takes_nobody_s_time_along(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def fails_later(arguments: dict[str, Tensor]) -> Tensor:
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("CUDA error: misaligned address\nCompile with TORCH_USE_CUDA_DSA")
        return arguments["scores"].topk(16, dim=-1).indices

    both = {"torch.topk": lambda: peers.torch_topk(shape), "late": lambda: fails_later}
    [shape] = shapes(SMALL)
    monkeypatch.setattr(kernels.OPS["top_k_pages"], "peers", lambda self, data, arguments: both)
    found = {row["implementation"]: row for row in bench_kernels(replace(SMALL, ops=("top_k_pages",)))}
    assert found["late"]["unavailable"] == "late failed: RuntimeError: CUDA error: misaligned address"
    assert found[OWN]["ms"] > 0 and found["torch.topk"]["ms"] > 0


def test_the_data_of_a_point_are_gone_before_the_next_ones_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the largest points would not fit into memory together."""
    made: list[weakref.ref[Tensor]] = []
    right = kernels._make_data

    def make_data(*arguments: Any) -> Any:
        assert all(data() is None for data in made)
        found = right(*arguments)
        made.append(weakref.ref(found[0].cache.k_pages))
        return found

    monkeypatch.setattr(kernels, "_make_data", make_data)
    grid = replace(SMALL, token_budget=(128, 256), ops=("attend pages", "attend dense", "top_k_pages"))
    rows = bench_kernels(grid)
    assert len(made) == 2 and [row["token_budget"] for row in rows if row["op"] == "attend pages"] == [128, 256]
