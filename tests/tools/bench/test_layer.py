"""The layer benchmark times every method on data that it has checked, and says what a step is made of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed_sparse.cache import Geometry
from distributed_sparse.commands import bench
from distributed_sparse.selection import policy_class, resolve_sparse_config
from distributed_sparse.selection.base import Policy, Selection
from distributed_sparse.selection.quest import QuestPolicy
from distributed_sparse.selection.window import WindowPolicy
from distributed_sparse.tools.bench import layer
from distributed_sparse.tools.bench import timing as measure
from distributed_sparse.tools.bench.layer import (
    PARTS,
    Inputs,
    LayerSettings,
    bench_layer,
    check,
    check_pages,
    make_inputs,
    make_rotation,
)

SMALL = LayerSettings(context=8192, num_heads=8, num_kv_heads=2, head_dim=64, token_budget=512, caches=2, repeats=2)
GEOMETRY = Geometry(2, 4, 64, 16, torch.float32, torch.device("cpu"), first_kv_head=0)
METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "quest": {"token_budget": 512},
    "twilight": {},
    "vattention": {"top_k_fraction": 0.02},
    "window": {"token_budget": 512},
}


def test_every_method_is_timed_beside_sdpa_with_its_bytes_and_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "read_bandwidth", lambda device: 2e9)
    rows = {row["method"]: row for row in bench_layer(SMALL)}
    assert list(rows) == ["sdpa", *METHODS]
    kv_bytes = 2 * 8192 * 2 * 64 * 4
    for name, row in rows.items():
        assert row["ms"] > 0 and row["read_bandwidth_GB_per_s"] == 2
        if name != "sdpa":
            assert tuple(row["parts_ms"]) == PARTS and row["parts_ms"]["append"] > 0 and row["parts_ms"]["attend"] > 0
    assert rows["sdpa"]["MB"] == rows["dense"]["MB"] == pytest.approx(kv_bytes / 1e6)
    assert rows["quest"]["density"] == rows["window"]["density"] == 512 / 8192
    assert rows["quest"]["MB"] == pytest.approx(kv_bytes * (1 / 16 + 1 / 16) / 1e6)
    assert rows["window"]["MB"] == pytest.approx(kv_bytes / 16 / 1e6)
    # 8.39 MB at 2 GB/s, and an eighth and a sixteenth of them
    assert [rows[name]["bytes_ms"] for name in ("sdpa", "dense")] == pytest.approx([4.194304] * 2)
    assert [rows[name]["bytes_ms"] for name in ("quest", "window")] == pytest.approx([0.524288, 0.262144])
    beside = {name: row["MB"] * 1e6 - kv_bytes * (row["density"] + 1 / 16) for name, row in rows.items()}
    assert 0 < rows["twilight"]["density"] < 1 and 0 < rows["vattention"]["density"] < 1
    # 32 bytes of codes and two fp16 of 2048 candidates; pilots of 256 keys and values, and what a row read before it went dense
    assert beside["twilight"] == pytest.approx(2 * 2048 * (32 + 4))
    assert beside["vattention"] >= 2 * 256 * 2 * 64 * 4
    assert rows["twilight"]["parts_ms"]["estimate"] > 0 and rows["twilight"]["parts_ms"]["prune"] > 0
    assert rows["vattention"]["parts_ms"]["sample"] > 0


# ---- no speed of a wrong result


def policy(method: str) -> Policy:
    return policy_class(method)(resolve_sparse_config({"method": method, **METHODS[method]}), GEOMETRY)


def inputs(method: Policy) -> Inputs:
    return make_inputs(SMALL, GEOMETRY, method.metadata, seed=0)


def one_head_off(right: Any) -> Any:
    """The same function, whose first query head is 1% too large."""

    def wrong(*arguments: Any) -> Tensor:
        out = right(*arguments).clone()
        out[:, 0] *= 1.01
        return out

    return wrong


@pytest.mark.parametrize("method", METHODS)
def test_an_output_that_is_off_in_one_head_is_refused(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    own = policy(method)
    check(inputs(own), own, GEOMETRY)
    monkeypatch.setattr(layer, "attend_selection", one_head_off(layer.attend_selection))
    with pytest.raises(AssertionError, match=f"{type(own).__name__}: RMS error"):
        check(inputs(own), own, GEOMETRY)


def test_a_part_that_the_policy_attended_wrongly_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    own = policy("vattention")
    right = own.select

    def select(*arguments: Any) -> Selection:
        selection = right(*arguments)
        assert selection.partial is not None
        out, log_sum_exp = selection.partial
        assert log_sum_exp.isfinite().any(), "a sparse row"
        return replace(selection, partial=(out, log_sum_exp + 0.1))

    monkeypatch.setattr(own, "select", select)
    with pytest.raises(AssertionError, match="VAttentionPolicy: RMS error"):
        check(inputs(own), own, GEOMETRY)


def test_no_wrong_method_is_timed_and_the_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []
    right, clock = layer.check, layer.time_in_turn

    def fails(one: Inputs, own: Policy, geometry: Geometry) -> None:
        if isinstance(own, QuestPolicy):
            raise RuntimeError("PassManager::run failed")
        monkeypatch.setattr(layer, "attend_selection", wrong if isinstance(own, WindowPolicy) else attend)
        right(one, own, geometry)

    def noted(functions: dict[str, Any], *rest: Any, **options: Any) -> Any:
        timed.extend(functions)
        monkeypatch.setattr(layer, "attend_selection", attend)
        return clock(functions, *rest, **options)

    attend = layer.attend_selection
    wrong = one_head_off(attend)
    monkeypatch.setattr(layer, "check", fails)
    monkeypatch.setattr(layer, "time_in_turn", noted)
    rows = {row["method"]: row for row in bench_layer(SMALL)}
    assert timed == ["sdpa", "dense", "twilight", "vattention"]
    assert rows["quest"]["wrong"] == "quest failed: RuntimeError: PassManager::run failed" and "ms" not in rows["quest"]
    assert "WindowPolicy: RMS error" in rows["window"]["wrong"] and "ms" not in rows["window"]
    assert rows["dense"]["ms"] > 0


# ---- what is taken in turn


def test_large_caches_are_one_with_several_sets_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "LARGE_CACHE_BYTES", 1 << 20)
    own = policy("quest")
    few = replace(SMALL, batch=3, context=2048, caches=3)
    sets = make_rotation(few, GEOMETRY, own.metadata)
    assert len(sets) == 3 and all(one.cache is sets[0].cache for one in sets)
    for one in sets:
        check(one, own, GEOMETRY)
        logits = torch.einsum("bhgd,bhnd->bhgn", one.q.unflatten(1, (2, 4)), one.k) * GEOMETRY.scale
        heavy = (logits > few.heavy_logit - 0.1).sum(-1)
        assert (heavy >= few.heavy_tokens - 1).all(), "every set of queries has its heavy tokens"
    chosen = [set(own.select(one.q, one.cache, one.batch).pages[0, 0].tolist()) for one in sets]
    assert chosen[0] != chosen[1] != chosen[2], "and reads other pages"
    assert not torch.equal(sets[0].batch.random_key, sets[1].batch.random_key)
    monkeypatch.setattr(layer, "LARGE_CACHE_BYTES", 1 << 40)
    caches = make_rotation(few, GEOMETRY, own.metadata)
    assert len({id(one.cache) for one in caches}) == 3


def test_without_room_for_contiguous_keys_sdpa_alone_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    kv_bytes = 2 * 2 * 8192 * 2 * 64 * 4  # of both caches
    monkeypatch.setattr(measure, "available_bytes", lambda device: int(1.5 * kv_bytes))
    rows = {row["method"]: row for row in bench_layer(SMALL)}
    assert "no room for contiguous K and V" in rows["sdpa"]["unavailable"]
    assert rows["quest"]["ms"] > 0 and rows["quest"]["speedup_over_sdpa"] is None


@pytest.mark.parametrize("method", ["quest", "vattention"])
def test_of_a_large_batch_the_first_sequences_are_compared(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    own = policy(method)
    several = make_inputs(replace(SMALL, batch=3), GEOMETRY, own.metadata, seed=0)
    check(several, own, GEOMETRY)
    right = layer.attend_selection
    monkeypatch.setattr(
        layer, "attend_selection", lambda *arguments: right(*arguments) * torch.tensor([1, 1.1, 1])[:, None, None]
    )
    with pytest.raises(AssertionError, match="RMS error"):
        check(several, own, GEOMETRY)


def test_other_pages_than_quest_s_best_are_refused() -> None:
    own = policy("quest")
    one = inputs(own)
    selection = own.select(one.q, one.cache, one.batch)
    check_pages(one, own, selection)  # type: ignore[arg-type]
    chosen = set(selection.pages[0, 1].tolist())
    other = next(page for page in one.batch.page_table[0].tolist() if page not in chosen)
    for wrong in (other, int(selection.pages[0, 1, 4])):  # a page of a lower score, and one that is listed twice
        pages = selection.pages.clone()
        pages[0, 1, 3] = wrong
        with pytest.raises(AssertionError, match="Quest chose other pages"):
            check_pages(one, own, replace(selection, pages=pages))  # type: ignore[arg-type]


def test_the_command_prints_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    small = {"context": 2048, "num-heads": 4, "num-kv-heads": 2, "head-dim": 64, "token-budget": 512, "caches": 1, "repeats": 1}
    bench.main(["layer", "--threads", "1", *(f"--{name}={value}" for name, value in small.items())])
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    assert "1 threads" in printed and "speedup_over_sdpa" in printed and "bytes_ms" in printed
    assert "append  score  top_k  estimate  prune  sample  attend" in " ".join(printed.split()).replace(" ", "  ")
