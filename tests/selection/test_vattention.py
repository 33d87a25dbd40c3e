"""vAttention reads what matters and a weighted sample of the rest, as many tokens as its formula asks for, or all of them.

That the sample keeps its promise, `test_vattention_statistics.py` shows over thousands of draws.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed_sparse.selection import resolve_sparse_config
from distributed_sparse.selection.base import Selection, dense_selection
from distributed_sparse.selection.vattention import VAttentionConfig, VAttentionPolicy
from tests.support.decode_rows import DecodeRows, positions_read, rows_for
from tests.support.eager_methods import EagerVAttention
from tests.support.hash_weights import random_hash_weights
from tests.support.promise_a import assert_rows_depend_on_themselves, row_bits

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.each_value]  # on CPU, equal bits are promised at one thread

CONTEXTS = [1500, 5, 1100, 64, 2003, 512]
SPARSE = [0, 2, 4]
"""The sequences that are long enough to be sampled."""
SETTINGS: dict[str, Any] = {"sink_tokens": 16, "window_tokens": 16, "epsilon": 0.2, "delta": 0.2}
SHAPE: dict[str, Any] = {"value_mean": 1.0, "head_dim": 32}
"""Values with a mean: the output's norm is known, and a sample pays."""


def rows_of(config: VAttentionConfig, contexts: list[int] = CONTEXTS, **shape: Any) -> DecodeRows:
    return rows_for(VAttentionPolicy, config, contexts, **{**SHAPE, **shape})


def vattention(rows: DecodeRows, config: VAttentionConfig) -> VAttentionPolicy:
    policy = rows.policy(VAttentionPolicy, config)
    assert isinstance(policy, VAttentionPolicy)
    return policy


def settings_of(**settings: Any) -> VAttentionConfig:
    return VAttentionConfig(**{**SETTINGS, **settings})


def eager(rows: DecodeRows, config: VAttentionConfig, row: int) -> EagerVAttention:
    """The definition, for one sequence of the rows: sample index 0."""
    names = ("epsilon", "delta", "guarantee", "selector", "top_k_fraction", "sink_tokens", "window_tokens", "base_fraction")
    more = ("max_sample", "hash_weights", "min_context", "sink_pages", "recent_pages")
    low, high = rows.batch.random_key[:2, row].tolist()
    settings = {name: getattr(config, name) for name in (*names, *more)}
    return EagerVAttention(dense_layers=0, seed=low | high << 32, page_size=rows.batch.page_size, **settings)


def first_samples(rows: DecodeRows) -> DecodeRows:
    """As `score` and greedy requests have it: sample index 0, and a seed of 63 bits."""
    key = rows.batch.random_key.clone()
    key[1] = 77 * key[1] + 5
    key[2] = 0
    return rows.with_batch(random_key=key)


def sampled(rows: DecodeRows, selection: Selection, row: int, head: int) -> tuple[list[int], list[int]]:
    """(chosen, sampled) positions of a sparse row."""
    assert selection.partial_selection is not None and selection.num_tokens is not None
    assert selection.num_pages[row, head] == 0
    count = int(selection.num_tokens[row, head])
    read = positions_read(rows, selection, row, head)
    return read[count:], read[:count]


def is_sparse(rows: DecodeRows, selection: Selection) -> Tensor:
    """bool [B, H_kv]."""
    return selection.attended(rows.batch.last_page_len, rows.batch.page_size) < rows.batch.context_lens[:, None]


# ---- against the definition


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({}, {"group": 1}),
        ({}, {"group": 2}),
        ({"epsilon": 0.15}, {"group": 4, "page_size": 32}),
        ({"guarantee": "denominator", "epsilon": 0.1}, {"group": 2}),
        ({"guarantee": "numerator_denominator", "epsilon": 0.6, "delta": 0.2}, {"group": 2}),
        ({"selector": "oracle"}, {"group": 2}),
        ({"selector": "hash"}, {"group": 2}),
        ({"sink_tokens": 0, "window_tokens": 1, "sink_pages": 2, "recent_pages": 3, "top_k_fraction": 0.0}, {"group": 2}),
        ({"base_fraction": 0.2, "epsilon": 0.3}, {"group": 2}),
        ({"min_context": 1101}, {"group": 2}),
    ],
)
def test_a_row_reads_and_weighs_what_the_definition_says(
    tmp_path: Path, settings: dict[str, Any], shape: dict[str, Any]
) -> None:
    """Chosen set, pilot, statistics from explicit vectors, size, sample and weights; and the output in float64."""
    weights = random_hash_weights(tmp_path / "hash.safetensors", range(3, 4), 4 * shape["group"], 32)
    config = settings_of(**settings, hash_weights=weights)
    rows = first_samples(rows_of(config, layer=3, **shape))
    selection = rows.select(vattention(rows, config))
    found, group, sparse = rows.attend(selection).double(), rows.geometry.group_size, 0
    assert selection.log_weight is not None
    for row in range(len(CONTEXTS)):
        own = eager(rows, config, row)
        expected = own.log_weights(3, rows.q[row], rows.keys[row], rows.values[row])
        own.margins.assert_clear(sample_size=1e-5, probability=1e-5, signature=1e-12)
        for head in range(4):
            of_head = expected[head * group]
            assert sorted(positions_read(rows, selection, row, head)) == of_head.isfinite().nonzero()[:, 0].tolist()
            if of_head.isneginf().any():
                _, drawn = sampled(rows, selection, row, head)
                assert float(selection.log_weight[row, head]) == pytest.approx(float(of_head[drawn[0]]), rel=1e-6)
                assert (of_head[drawn] == of_head[drawn[0]]).all()
                sparse += 1
        for i in range(4 * group):
            keys, values = rows.keys[row][i // group].double(), rows.values[row][i // group].double()
            output = (keys @ rows.q[row, i].double() / 32**0.5 + expected[i]).softmax(0) @ values
            assert (found[row, i] - output).abs().max() <= 1e-4
    assert sparse > 0


def test_a_sample_is_disjoint_from_what_was_chosen_and_stands_for_the_rest() -> None:
    config = settings_of()
    rows = rows_of(config).with_batch(trace=True)
    selection = rows.select(vattention(rows, config))
    details = selection.details
    assert selection.log_weight is not None
    for row in SPARSE:
        n = CONTEXTS[row]
        for head in range(4):
            chosen, drawn = sampled(rows, selection, row, head)
            assert len(set(chosen)) == len(chosen) == details["chosen"][row, head]
            assert len(set(drawn)) == len(drawn) == details["budget"][row, head]
            assert not set(chosen) & set(drawn)
            assert set(range(16)) | set(range(n - 16, n)) <= set(chosen)
            assert float(selection.log_weight[row, head]) == pytest.approx(math.log((n - len(chosen)) / len(drawn)), rel=1e-6)
            assert details["pilot"][row, head] == 256 <= len(drawn)
            assert len(drawn) % 64 == 0
            assert 2 * (len(chosen) + len(drawn)) <= n
    assert is_sparse(rows, selection).tolist() == [[row in SPARSE] * 4 for row in range(len(CONTEXTS))]


def test_what_the_partial_read_counts_as_attended() -> None:
    config = settings_of()
    rows = rows_of(config)
    selection = rows.select(vattention(rows, config))
    attended = selection.attended(rows.batch.last_page_len, 16)
    for row, n in enumerate(CONTEXTS):
        for head in range(4):
            assert attended[row, head] == len(positions_read(rows, selection, row, head))
            assert (attended[row, head] < n) == (row in SPARSE)


def test_a_large_pilot_is_rounded_up_as_well() -> None:
    """300 pilot tokens and an easy row: the sample has 320, not 300."""
    config = settings_of(epsilon=0.9, delta=0.5, base_fraction=0.17)
    rows = rows_of(config, [2003]).with_batch(trace=True)
    details = rows.select(vattention(rows, config)).details
    for pilot, budget in zip(details["pilot"][0].tolist(), details["budget"][0].tolist()):
        assert 256 < pilot < budget == 64 * math.ceil(pilot / 64)


# ---- the size


def budgets(rows: DecodeRows, **settings: Any) -> Tensor:
    """float32 [B, H_kv]: b, also where it overflows."""
    rows = rows.with_batch(trace=True)
    return rows.select(vattention(rows, settings_of(**settings))).details["budget"]


@pytest.mark.parametrize("guarantee", ["output", "denominator", "numerator_denominator"])
def test_a_sample_grows_as_epsilon_or_delta_shrinks(guarantee: str) -> None:
    rows = rows_of(settings_of(), [6001])
    factor = 4 if guarantee == "numerator_denominator" else 1
    steps: dict[str, list[float]] = {"epsilon": [0.2 * factor, 0.08 * factor, 0.02 * factor], "delta": [0.2, 0.1, 0.01]}
    for name, values in steps.items():
        fixed = {"epsilon": 0.05 * factor, "delta": 0.1}
        sizes = [budgets(rows, guarantee=guarantee, **{**fixed, name: value}) for value in values]
        assert (sizes[0] <= sizes[1]).all() and (sizes[1] <= sizes[2]).all()
        assert (sizes[0] < sizes[2]).all(), name
        assert ((sizes[2] % 64 == 0) | (sizes[2] > 5000)).all()  # the residual itself is no multiple


def test_the_lemma_asks_for_more_than_the_denominator_alone() -> None:
    rows = rows_of(settings_of(), [6001])
    lemma, denominator = (
        budgets(rows, guarantee=guarantee, epsilon=0.2, delta=0.2) for guarantee in ("numerator_denominator", "denominator")
    )
    assert (denominator < lemma).all()


def test_a_residual_that_weighs_nothing_needs_the_pilots_size_alone() -> None:
    """One chosen key holds all but e^-30 of the softmax: squares of what is left underflow, and the row must not go dense."""
    config = settings_of()
    rows = rows_of(config, [2003], kv_heads=1, group=1)
    first = int(rows.batch.page_table[0, 0])
    rows.cache.k_pages[first, 0, 0] = rows.q[0, 0] * 40 * 32**0.5 / rows.q[0, 0].square().sum()
    for guarantee in ("output", "denominator", "numerator_denominator"):
        traced = rows.with_batch(trace=True)
        details = traced.select(vattention(traced, settings_of(guarantee=guarantee))).details
        assert details["budget"].tolist() == [[256]] and details["is_dense"].tolist() == [[0]]


def test_values_without_a_mean_go_dense_for_their_norm_is_unknown() -> None:
    config = settings_of(epsilon=0.5, delta=0.5)
    rows = rows_of(config, [2003], value_mean=0.0).with_batch(trace=True)
    selection = rows.select(vattention(rows, config))
    assert not is_sparse(rows, selection).any()
    assert (selection.details["budget"] + selection.details["chosen"] == 2003).all()  # no size would do


# ---- rows that go dense


def assert_bitwise_dense(rows: DecodeRows, selection: Selection, some: Tensor) -> None:
    """The rows of a bool [B, H_kv]: the identity list, no tokens, no partial, equal bits."""
    dense = dense_selection(rows.batch, some.shape[1])
    found, expected = (rows.attend(own).unflatten(1, (some.shape[1], -1)) for own in (selection, dense))
    assert torch.equal(found[some], expected[some])
    assert not (found[~some] == expected[~some]).all(-1).any()
    assert torch.equal((selection.num_pages * some), (dense.num_pages * some))
    assert selection.num_tokens is not None and (selection.num_tokens[some] == 0).all()


def test_rows_that_overflow_are_bitwise_dense_beside_rows_that_do_not() -> None:
    config = settings_of(epsilon=0.06)
    rows = rows_of(config, [*CONTEXTS, 900, 1300]).with_batch(trace=True)
    selection = rows.select(vattention(rows, config))
    dense = ~is_sparse(rows, selection)
    assert 0 < int(dense[SPARSE].sum()) < 12, "the settings are to let some of the long rows overflow, not all"
    assert_bitwise_dense(rows, selection, dense)
    details, n = selection.details, rows.batch.context_lens[:, None]
    residual = n - details["chosen"]
    overflow = (2 * (details["chosen"] + details["budget"]) > n) | (residual < 512)
    assert torch.equal(dense, overflow)
    assert torch.equal(details["is_dense"].bool(), dense)


def test_a_sample_beyond_max_sample_is_never_truncated() -> None:
    free = settings_of(epsilon=0.1)
    rows = rows_of(free, [2003, 1501]).with_batch(trace=True)
    unlimited = rows.select(vattention(rows, free))
    sizes, fits = unlimited.details["budget"], is_sparse(rows, unlimited)
    assert sizes[fits].unique().numel() > 1, "the rows are to need different sizes"
    limit = int(sizes[fits].max()) - 1
    capped = settings_of(epsilon=0.1, max_sample=limit)
    selection = rows.select(vattention(rows, capped))
    assert selection.num_tokens is not None
    kept = fits & (sizes <= limit)
    assert torch.equal(is_sparse(rows, selection), kept)
    assert torch.equal(selection.num_tokens[kept].float(), sizes[kept])
    assert_bitwise_dense(rows, selection, ~kept)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"selector": "oracle"},
        {"selector": "oracle", "top_k_fraction": 0.0},
        {"sink_tokens": 100, "window_tokens": 33, "top_k_fraction": 0.0},
        {"min_context": 700},
        {"sink_tokens": 0, "sink_pages": 0, "window_tokens": 1},
    ],
)
def test_the_host_calls_no_context_dense_that_the_device_would_sample(settings: dict[str, Any]) -> None:
    """Row by row, with the shortcut taken away: what the host may skip is what the device finds dense, to the bit."""

    class Unasked(VAttentionPolicy):
        def is_dense(self, max_context_len: int) -> bool:
            return False

    config = settings_of(**{"epsilon": 0.9, "delta": 0.5, **settings})
    contexts = [1, 300, 511, 512, 543, 544, 575, 576, 577, 592, 608, 640, 699, 700, 777, 849, 1000, 1300]
    rows = rows_of(config, contexts, kv_heads=2)
    selection = rows.select(rows.policy(Unasked, config))
    dense = ~is_sparse(rows, selection)
    assert_bitwise_dense(rows, selection, dense)
    policy = vattention(rows, config)
    skipped = torch.tensor([policy.is_dense(n) for n in contexts])
    assert dense[skipped].all() and skipped.any() and not dense[~skipped].all()
    for row in range(len(contexts)):
        alone = rows.of_sequences([row])
        own = alone.select(policy)
        assert own.is_dense == bool(skipped[row])
        assert torch.equal(alone.attend(own)[0], rows.attend(selection)[row])


# ---- randomness


def draws(rows: DecodeRows, config: VAttentionConfig) -> list[list[int]]:
    """The sampled positions of the one sequence, per KV head, in the order drawn."""
    selection = rows.select(vattention(rows, config))
    return [sampled(rows, selection, 0, head)[1] for head in range(rows.geometry.num_kv_heads)]


def test_seeds_samples_positions_layers_and_heads_draw_differently_and_the_same_key_the_same() -> None:
    """One context whose heads are all alike, so that nothing but the key can tell them apart."""
    config = settings_of()
    rows = rows_of(config, [1500], kv_heads=4, group=1)
    for kept in rows.cache.pages:
        kept[:] = kept[:, :1].clone()
    rows.q[:] = rows.q[:, :1].clone()
    seen = draws(rows, config)
    assert draws(rows, config) == seen
    assert len({str(drawn) for drawn in seen}) == 4
    for word in range(4):
        key = rows.batch.random_key.clone()
        key[word] += 1
        changed = draws(rows.with_batch(random_key=key), config)
        assert all(own not in seen for own in changed), f"word {word} of the key changes nothing"
    rows.cache.layer = 9
    assert all(own not in seen for own in draws(rows, config))


def test_the_pilot_is_another_draw_than_the_sample() -> None:
    """A sample that began with the pilot's tokens would be no independent one."""
    config = settings_of()
    rows = rows_of(config, [1500])
    policy = vattention(rows, config)
    given: dict[int, Tensor] = {}
    draw = policy.draw

    def note(*arguments: Any) -> Tensor:
        given[arguments[5]] = draw(*arguments)
        return given[arguments[5]]

    policy.draw = note  # type: ignore[method-assign, assignment]
    rows.select(policy)
    assert set(given) == {0, 1}
    for head in range(4):
        sample, pilot = (set(given[kind][0, head, :256].tolist()) for kind in (0, 1))
        assert 0.05 < len(sample & pilot) / 256 < 0.5  # 256 of some 1,370 tokens meet 256 others by chance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings", [{}, {"selector": "oracle", "epsilon": 0.08}, {"selector": "hash", "guarantee": "denominator"}]
)
def test_a_row_depends_on_itself_alone(tmp_path: Path, settings: dict[str, Any], dtype: torch.dtype) -> None:
    weights = random_hash_weights(tmp_path / "hash.safetensors", range(6), 8, 32)
    config = settings_of(**settings, hash_weights=weights)
    rows = rows_of(config, [1500, 5, 1100, 1203], dtype=dtype, layer=5)
    assert is_sparse(rows, rows.select(vattention(rows, config))).any()
    assert_rows_depend_on_themselves(rows, lambda some: vattention(some, config))


def test_a_row_is_the_same_wherever_its_pages_lie() -> None:
    """A sample follows positions, not the ids of pages."""
    config = settings_of()
    rows, moved = rows_of(config, [1500]), rows_of(config, [1500])
    order = torch.randperm(moved.cache.k_pages.shape[0], generator=torch.Generator().manual_seed(8))
    for pages in moved.cache.pages:
        pages[order] = pages.clone()
    moved.batch.page_table[0] = order[moved.batch.page_table[0].long()]
    selections = [some.select(vattention(some, config)) for some in (rows, moved)]
    for head in range(4):
        assert positions_read(rows, selections[0], 0, head) == positions_read(moved, selections[1], 0, head)
        assert row_bits(rows, selections[0], 0, head)[-1] == row_bits(moved, selections[1], 0, head)[-1]


# ---- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": 0.0}, "sparse.epsilon=0.0 must be finite, > 0 and <= 1; 0.1 is usual"),
        ({"epsilon": 1.0}, "sparse.epsilon=1 bounds nothing; 0.1 is usual"),
        ({"delta": -0.1}, "sparse.delta=-0.1 must be finite, > 0"),
        ({"delta": 1.0}, "sparse.delta=1 bounds nothing"),
        ({"delta": 0.21, "guarantee": "numerator_denominator"}, "sparse.delta=0.21 is over 0.2, .* set it to 0.2 or less"),
        (
            {"guarantee": "all"},
            "sparse.guarantee='all' is not known; use one of 'output', 'denominator', 'numerator_denominator'",
        ),
        ({"selector": "full"}, "sparse.selector='full' is not known; use one of 'hash', 'oracle', 'quest', 'sketch'"),
        ({"selector": "hash"}, "needs learned weights: set sparse.hash_weights"),
        ({"top_k_fraction": 1.5}, "sparse.top_k_fraction=1.5 must be finite, >= 0 and <= 1; give a share"),
        ({"base_fraction": -1.0}, "sparse.base_fraction=-1.0"),
        ({"sink_tokens": -1}, "sparse.sink_tokens=-1 must be >= 0"),
        ({"window_tokens": 0}, "sparse.window_tokens=0 must be >= 1; the newest token is always attended"),
        ({"max_sample": 100}, "sparse.max_sample=100 must be >= 256; rows that need more go dense"),
        ({"p": 0.5}, "sparse: unknown key 'p'"),
        ({"layers": [{"range": "2", "epsilon": 0.0}]}, "sparse.epsilon=0.0"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_sparse_config({"method": "vattention", **settings})
