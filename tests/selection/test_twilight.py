"""Twilight keeps, of the selector's candidates, the fewest tokens that hold the share p of their estimated mass: exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from distributed_sparse.cache import PageMinMax, QuantizedKeys
from distributed_sparse.kernels.reference import int4_logits_reference
from distributed_sparse.selection import resolve_sparse_config
from distributed_sparse.selection.base import Policy, Selection, dense_selection
from distributed_sparse.selection.twilight import TwilightConfig, TwilightPolicy
from tests.support.decode_rows import DecodeRows, positions_read, rows_for
from tests.support.eager_methods import EagerTwilight
from tests.support.hash_weights import random_hash_weights
from tests.support.promise_a import all_rows, assert_rows_depend_on_themselves

pytestmark = pytest.mark.usefixtures("one_thread")  # on CPU, equal bits are promised at one thread

CONTEXTS = [333, 5, 64, 65, 17, 200, 1, 700]
SETTINGS: dict[str, Any] = {"p": 0.8, "candidate_fraction": 0.5, "min_candidates": 64}
CLEAR = {"code": -1.0, "mass": 1e-6, "threshold": 1e-6, "probability": 1e-6}
"""The keys are the engine's own, so that codes are equal however they are decided."""
COMMON = ("p", "selector", "candidate_fraction", "min_candidates", "key_bits", "sink_pages", "recent_pages", "min_context")


def rows_of(config: TwilightConfig, contexts: list[int] = CONTEXTS, **shape: Any) -> DecodeRows:
    return rows_for(TwilightPolicy, config, contexts, **shape)


def twilight(rows: DecodeRows, config: TwilightConfig) -> Policy:
    return rows.policy(TwilightPolicy, config)


def eager(config: TwilightConfig, **more: Any) -> EagerTwilight:
    settings = {name: getattr(config, name) for name in (*COMMON, "hash_weights")}
    return EagerTwilight(dense_layers=0, **settings, **more)


def expected_positions(rows: DecodeRows, own: EagerTwilight, row: int) -> list[list[int]]:
    """Per KV head, what the definition keeps of one sequence."""
    layer, group = rows.cache.layer, rows.geometry.group_size
    weights = own.log_weights(layer, rows.q[row], rows.keys[row], rows.values[row])
    return [seen.isfinite().nonzero()[:, 0].tolist() for seen in weights[::group]]


def kept_outside_forced_pages(rows: DecodeRows, selection: Selection, row: int, head: int) -> list[int]:
    """What a row keeps beside the newest page."""
    newest = (int(rows.batch.num_pages[row]) - 1) * rows.batch.page_size
    return [i for i in positions_read(rows, selection, row, head) if i < newest]


# ---- the kept set


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({}, {"group": 1}),
        ({}, {"group": 4}),
        ({"p": 0.3}, {"group": 2, "page_size": 32}),
        ({"p": 0.99, "selector": "full"}, {"group": 2}),
        ({"selector": "oracle"}, {"group": 2}),
        ({"key_bits": 2}, {"group": 2}),
        ({"key_bits": 8, "sink_pages": 0}, {"group": 2}),
        ({"sink_pages": 3, "recent_pages": 2, "candidate_fraction": 0.1}, {"group": 2, "head_dim": 128}),
        ({"min_context": 201}, {"group": 2}),
    ],
)
def test_a_row_keeps_the_union_of_its_query_heads_exact_sets(settings: dict[str, Any], shape: dict[str, Any]) -> None:
    config = TwilightConfig(**{**SETTINGS, **settings})
    rows = rows_of(config, **shape)
    selection = rows.select(twilight(rows, config))
    own = eager(config, page_size=rows.batch.page_size)
    pruned = 0
    for row, n in enumerate(CONTEXTS):
        for head, expected in enumerate(expected_positions(rows, own, row)):
            assert sorted(positions_read(rows, selection, row, head)) == expected, f"sequence {row}, head {head}"
            pruned += len(expected) < n
    own.margins.assert_clear(**CLEAR)
    assert pruned >= 2 * rows.geometry.num_kv_heads


@pytest.mark.parametrize("p", [0.5, 0.8, 0.95, 0.999])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_kept_mass_reaches_p_and_without_its_lowest_tie_class_does_not(bits: int, p: float) -> None:
    """By the codes that lie in the cache, decoded as the layout says; one query head per KV head, so that no union hides it."""
    config = TwilightConfig(p=p, selector="full", key_bits=bits, sink_pages=0, recent_pages=1)
    rows = rows_of(config, [333, 700], group=1)
    selection = rows.select(twilight(rows, config))
    estimates = estimated(rows)
    for row, n in enumerate((333, 700)):
        for head in range(4):
            kept = kept_outside_forced_pages(rows, selection, row, head)
            logits = estimates[row, head, :n]
            lowest = logits[kept].min()
            mass = logits.softmax(0)
            assert mass[logits >= lowest - 1e-6].sum() >= p - 1e-6
            assert mass[logits > lowest + 1e-6].sum() < p
            newest = list(range((n - 1) // 16 * 16, n))
            above = (logits > lowest + 1e-6).nonzero()[:, 0].tolist()
            assert set(above) <= set(kept) | set(newest)
            assert 0 < len(kept) < n - len(newest)


def estimated(rows: DecodeRows) -> torch.Tensor:
    """float64 [B, H_q, n]: the logits that the low-bit copy of all keys gives."""
    every = dense_selection(rows.batch, rows.geometry.num_kv_heads)
    codes, scales = rows.cache.metadata["key_codes"], rows.cache.metadata["key_scales"]
    return int4_logits_reference(
        rows.q, codes, scales, every.pages, every.num_pages, rows.batch.last_page_len, rows.geometry.scale
    )


def test_equal_estimates_all_stay_where_one_does() -> None:
    """A tie is not cut: with all keys alike, any p keeps every candidate."""
    config = TwilightConfig(p=0.1, selector="full")
    rows = rows_of(config, [200])
    for kept in rows.cache.metadata.values():
        table = rows.batch.page_table[0].long()
        kept[table] = kept[table[0], :, :1].unsqueeze(0).expand_as(kept[table]).clone()
    selection = rows.select(twilight(rows, config))
    assert selection.attended(rows.batch.last_page_len, 16).tolist() == [[200] * 4]
    assert torch.equal(rows.attend(selection), rows.attend(dense_selection(rows.batch, 4)))


def test_candidates_without_the_first_token_prune_to_the_exact_count() -> None:
    """The released kernel searches from the first candidate's weight, and keeps everything where the selector drops token 0."""
    config = TwilightConfig(p=0.8, candidate_fraction=0.25, min_candidates=32, sink_pages=0)
    rows = rows_of(config, [1200], group=1)
    selection = rows.select(twilight(rows, config))
    own, without_first = eager(config), 0
    for head, expected in enumerate(expected_positions(rows, own, 0)):
        candidates = own.candidates(0, head, rows.q[0, head : head + 1].double(), rows.keys[0][head].double())
        without_first += 0 not in candidates
        assert len(expected) < len(candidates)
        assert selection.num_tokens is not None and int(selection.num_tokens[0, head]) == len(expected)
    assert without_first > 0


@pytest.mark.parametrize("selector", ["quest", "oracle", "full"])
def test_p_of_one_keeps_all_candidates(selector: str) -> None:
    config = TwilightConfig(**{**SETTINGS, "p": 1.0, "selector": selector})
    rows = rows_of(config)
    selection = rows.select(twilight(rows, config))
    own = eager(config)
    for row, n in enumerate(CONTEXTS):
        for head in range(4):
            queries = rows.q[row, 2 * head : 2 * head + 2].double()
            expected = own.candidates(0, head, queries, rows.keys[row][head].double())
            assert sorted(positions_read(rows, selection, row, head)) == expected
            assert (len(expected) < n) == (selector != "full" and n > 64)
    if selector == "full":
        assert selection.is_dense and torch.equal(rows.attend(selection), rows.attend(dense_selection(rows.batch, 4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_is_attention_over_the_kept_tokens(dtype: torch.dtype) -> None:
    config = TwilightConfig(**SETTINGS)
    rows = rows_of(config, dtype=dtype)
    selection = rows.select(twilight(rows, config))
    found = rows.attend(selection).double()
    for row in range(len(CONTEXTS)):
        for i in range(8):
            kept = positions_read(rows, selection, row, i // 2)
            assert len(set(kept)) == len(kept)
            keys, values = (of[row][i // 2, kept].double() for of in (rows.keys, rows.values))
            expected = (keys @ rows.q[row, i].double() / 8).softmax(0) @ values
            limit = 1e-4 if dtype == torch.float32 else 0.02
            assert (found[row, i] - expected).abs().max() <= limit


def test_tokens_are_listed_by_ascending_position() -> None:
    config = TwilightConfig(**SETTINGS)
    rows = rows_of(config)
    selection = rows.select(twilight(rows, config))
    for row in range(len(CONTEXTS)):
        kept = positions_read(rows, selection, row, 1)
        assert kept == sorted(kept)


# ---- candidates


@pytest.mark.parametrize(("fraction", "least"), [(0.95, 16), (0.25, 48), (1.0, 16), (0.01, 1)])
def test_the_host_and_the_device_agree_on_the_number_of_candidates(fraction: float, least: int) -> None:
    """Of a context of 34 tokens, 95% round up to all three pages; of one of 33, to two: beside each other as alone."""
    config = TwilightConfig(p=1.0, candidate_fraction=fraction, min_candidates=least)
    contexts = [33, 34, 31, 48, 49, 100, 161]
    rows = rows_of(config, contexts)
    together = all_rows(rows, lambda some: twilight(some, config))
    own = eager(config)
    for row, n in enumerate(contexts):
        alone = rows.of_sequences([row])
        assert all_rows(alone, lambda some: twilight(some, config)) == [together[row]]
        expected = len(own.candidates(0, 0, rows.q[row, :2].double(), rows.keys[row][0].double()))
        assert len(positions_read(alone, alone.select(twilight(alone, config)), 0, 0)) == expected
        for longer in range(row, len(contexts)):
            pair = rows.of_sequences([row, longer])
            assert all_rows(pair, lambda some: twilight(some, config))[0] == together[row], f"{n} beside {contexts[longer]}"


def test_the_key_copy_is_written_for_the_selector_and_the_pruner() -> None:
    geometry = rows_of(TwilightConfig()).geometry
    assert TwilightPolicy(TwilightConfig(), geometry).metadata == (QuantizedKeys(4), PageMinMax())
    assert TwilightPolicy(TwilightConfig(selector="full", key_bits=2), geometry).metadata == (QuantizedKeys(2),)
    assert not TwilightPolicy(TwilightConfig(selector="oracle"), geometry).graph_safe


def test_bytes_scored_are_those_of_bounds_codes_and_scales() -> None:
    config = TwilightConfig(**SETTINGS)
    rows = rows_of(config)
    policy = twilight(rows, config)
    bounds, of_key = 2 * 64 * 4, 64 // 2 + 4
    assert policy.bytes_scored([333, 60]) == 4 * ((21 + 4) * bounds + (11 * 16 + 60) * of_key)
    assert policy.bytes_scored([60]) == 4 * 60 * of_key  # all are candidates: nothing is scored
    full = twilight(rows, TwilightConfig(selector="full", key_bits=8))
    assert full.bytes_scored([333]) == 4 * 333 * (64 + 4)


# ---- settings


def test_below_min_context_a_row_is_bitwise_dense() -> None:
    config = TwilightConfig(**SETTINGS, min_context=200)
    rows = rows_of(config)
    dense = rows.attend(dense_selection(rows.batch, 4))
    selection = rows.select(twilight(rows, config))
    found = rows.attend(selection)
    for row, n in enumerate(CONTEXTS):
        covered = bool((selection.attended(rows.batch.last_page_len, 16)[row] == n).all())
        assert covered == (n < 200)
        assert torch.equal(found[row], dense[row]) == covered
    short = rows.of_sequences([0]).with_batch(max_context_len=199)
    assert short.select(twilight(short, config)).is_dense


def test_codes_are_those_of_the_keys_less_their_offset(tmp_path: Path) -> None:
    """Per layer and global KV head; attention itself is over the keys as they are."""
    offset = 6.0 * torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(5))
    path = str(tmp_path / "offset.safetensors")
    save_file({f"model.layers.{layer}.key_offset": offset[layer] for layer in range(3)}, path)
    config = TwilightConfig(p=0.7, selector="full", key_bits=2, key_offset=path)
    rows = rows_of(config, [333, 200], layer=2)
    own = eager(config, key_offset=offset)
    selection = rows.select(twilight(rows, config))
    for row in range(2):
        for head, expected in enumerate(expected_positions(rows, own, row)):
            assert sorted(positions_read(rows, selection, row, head)) == expected
    own.margins.assert_clear(**CLEAR)
    without = replace(config, key_offset=None)
    plain = rows_of(without, [333, 200], layer=2)
    assert all_rows(plain, lambda some: twilight(some, without)) != all_rows(rows, lambda some: twilight(some, config))
    assert_rows_depend_on_themselves(rows, lambda some: twilight(some, config))  # each rank reads its own heads' offsets


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no readable safetensors file"),
        ({}, r"has no tensor 'model.layers.0.key_offset'; docs/methods says"),
        ({"model.layers.0.key_offset": torch.zeros(4, 32)}, r"has shape \[4, 32\], but this model needs \[4, 64\]"),
        ({"model.layers.0.key_offset": torch.zeros(2, 64)}, r"has shape \[2, 64\], but this model needs \[4, 64\]"),
        ({"model.layers.0.key_offset": torch.zeros(8, 64)}, r"has shape \[8, 64\], but .* \[4, 64\]; is it another model's"),
    ],
)
def test_a_wrong_offset_file_is_refused(tmp_path: Path, content: dict[str, torch.Tensor] | None, message: str) -> None:
    path = tmp_path / "offset.safetensors"
    path.write_bytes(b"no safetensors")
    if content is not None:
        save_file({"other": torch.zeros(1), **content}, path)
    with pytest.raises(ValueError, match=message):
        rows_of(TwilightConfig(key_offset=str(path)), [20])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"p": 0.0}, "sparse.p=0.0 must be finite, > 0 and <= 1; 0.95 suits"),
        ({"p": 1.01}, "sparse.p=1.01 must be finite, > 0 and <= 1"),
        ({"p": float("nan")}, "sparse.p=nan must be finite"),
        ({"p": "high"}, "sparse: .*float.*p"),
        (
            {"selector": "window"},
            "sparse.selector='window' is not known; use one of 'hash', 'oracle', 'quest', 'sketch', 'full'",
        ),
        ({"candidate_fraction": 0.0}, "sparse.candidate_fraction=0.0 must be finite, > 0 and <= 1; give the share"),
        ({"candidate_fraction": 2.0}, "sparse.candidate_fraction=2.0"),
        ({"min_candidates": 0}, "sparse.min_candidates=0 must be >= 1"),
        ({"key_bits": 3}, "sparse.key_bits=3 has no kernel; use 2, 4 or 8"),
        ({"selector": "hash"}, "needs learned weights: set sparse.hash_weights"),
        ({"token_budget": 64}, "sparse: unknown key 'token_budget'"),
        ({"layers": [{"range": "2", "p": 7.0}]}, "sparse.p=7.0"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_sparse_config({"method": "twilight", **settings})


# ---- a trace


def test_a_trace_says_what_was_offered_and_what_each_head_kept() -> None:
    config = TwilightConfig(**SETTINGS)
    rows = rows_of(config).with_batch(trace=True)
    selection = rows.select(twilight(rows, config))
    own = eager(config)
    assert set(selection.details) == {"candidates", "candidate_mass", "kept"}
    for row in range(len(CONTEXTS)):
        for i in range(8):
            queries, keys = rows.q[row, 2 * (i // 2) : 2 * (i // 2) + 2].double(), rows.keys[row][i // 2].double()
            candidates = own.candidates(0, i // 2, queries, keys)
            mass = (keys @ rows.q[row, i].double() / 8).softmax(0)[candidates].sum()
            kept = own.top_p(rows.q[row, i].double() @ own.decoded(keys[candidates]).T / 8).sum()
            assert selection.details["candidates"][row, i // 2] == len(candidates)
            assert abs(selection.details["candidate_mass"][row, i] - mass) < 1e-4
            assert selection.details["kept"][row, i] == kept
    everything = TwilightConfig(**{**SETTINGS, "p": 1.0})
    details = rows.select(twilight(rows, everything)).details
    assert torch.equal(details["kept"], details["candidates"].repeat_interleave(2, 1))


# ---- promise A


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [{}, {"selector": "full", "key_bits": 8}, {"selector": "oracle", "p": 0.99}, {"selector": "hash", "min_context": 65}],
)
def test_a_row_depends_on_itself_alone(tmp_path: Path, settings: dict[str, Any], dtype: torch.dtype) -> None:
    weights = random_hash_weights(tmp_path / "hash.safetensors", range(2), 8, 64)
    config = TwilightConfig(**{**SETTINGS, **settings}, hash_weights=weights)
    rows = rows_of(config, [333, 5, 64, 65, 200, 1, 700], dtype=dtype, layer=1)
    assert_rows_depend_on_themselves(rows, lambda some: twilight(some, config))
