"""The random control reads pages that nothing but the key of the row decides, each as often as any other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import chi2

from distributed_sparse.selection import resolve_sparse_config
from distributed_sparse.selection.base import Policy
from distributed_sparse.selection.random import RandomConfig, RandomPolicy
from tests.support.decode_rows import DecodeRows, decode_rows, lists, positions_read
from tests.support.eager_methods import EagerRandom
from tests.support.promise_a import assert_rows_depend_on_themselves

pytestmark = pytest.mark.usefixtures("one_thread")  # on CPU, equal bits are promised at one thread

CONTEXTS = [333, 5, 64, 65, 17, 200, 1, 700]


def random(rows: DecodeRows, **settings: Any) -> Policy:
    return rows.policy(RandomPolicy, RandomConfig(**settings))


def with_key(rows: DecodeRows, **words: int) -> DecodeRows:
    """Every row under the same seed, sample index and position, but for what is given."""
    names = ("seed_low", "seed_high", "sample_index", "position")
    key = torch.tensor([[words.get(name, 0)] * len(rows.keys) for name in names])
    return rows.with_batch(random_key=key)


@pytest.mark.parametrize("settings", [{"token_budget": 64}, {"token_budget": 90, "sink_pages": 2, "recent_pages": 2}])
def test_pages_are_those_of_the_documented_counters(settings: dict[str, Any]) -> None:
    rows = decode_rows(CONTEXTS, layer=11)
    key = rows.batch.random_key.clone()
    key[1], key[2] = 3 * key[1] + 1, 0
    rows = rows.with_batch(random_key=key)
    selection = rows.select(random(rows, **settings))
    for row in range(len(CONTEXTS)):
        own = EagerRandom(dense_layers=0, seed=int(key[0, row]) | int(key[1, row]) << 32, **settings)
        expected = own.log_weights(11, rows.q[row], rows.keys[row], rows.values[row])[::2]
        for head in range(4):
            assert positions_read(rows, selection, row, head) == expected[head].isfinite().nonzero()[:, 0].tolist()


def test_forced_pages_are_always_read_and_the_others_equally_often() -> None:
    """2,000 seeds over 22 pages of which 6 are read: 3 of the 19 that are not forced."""
    draws, rows = 2000, decode_rows([22 * 16], kv_heads=1)
    many = rows.of_sequences([0] * draws)
    key = torch.zeros(4, draws, dtype=torch.int64)
    key[0] = torch.arange(draws)
    many = many.with_batch(random_key=key)
    chosen = lists(many.select(random(many, token_budget=96)))
    logical = {page: place for place, page in enumerate(rows.batch.page_table[0].tolist())}
    counts = torch.zeros(22)
    for pages in chosen:
        assert len(set(pages[0])) == 6
        for page in pages[0]:
            counts[logical[page]] += 1
    assert counts[0] == counts[20] == counts[21] == draws
    expected = draws * 3 / 19
    # Drawn without replacement: the statistic is chi-square of 18 degrees, times the share that is not drawn.
    statistic = float(((counts[1:20] - expected) ** 2 / expected).sum()) / (1 - 3 / 19) * 18 / 19
    assert chi2.ppf(0.001, 18) < statistic < chi2.ppf(0.999, 18)


def test_seeds_samples_positions_layers_and_heads_differ_and_the_same_key_repeats() -> None:
    rows = with_key(decode_rows([700], layer=2))
    (seen,) = lists(rows.select(random(rows, token_budget=160)))
    assert lists(rows.select(random(rows, token_budget=160))) == [seen]
    assert len({str(pages) for pages in seen}) == 4
    for word in ("seed_low", "seed_high", "sample_index", "position"):
        other = with_key(rows, **{word: 1})
        (changed,) = lists(other.select(random(other, token_budget=160)))
        assert not any(pages in seen for pages in changed), word
    rows.cache.layer = 3
    (changed,) = lists(rows.select(random(rows, token_budget=160)))
    assert not any(pages in seen for pages in changed)


def test_what_the_pages_hold_says_nothing() -> None:
    rows = decode_rows([700])
    before = lists(rows.select(random(rows, token_budget=160)))
    rows.q.mul_(-3.0)
    rows.cache.k_pages.fill_(1.0)
    assert lists(rows.select(random(rows, token_budget=160))) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_depends_on_itself_alone(dtype: torch.dtype) -> None:
    rows = decode_rows(CONTEXTS, dtype=dtype, layer=7)
    assert_rows_depend_on_themselves(rows, lambda some: random(some, token_budget=64, min_context=65))


def test_nothing_is_scored_or_kept_for_it() -> None:
    rows = decode_rows(CONTEXTS)
    policy = random(rows)
    assert policy.metadata == () and policy.bytes_scored([100]) == 0
    with pytest.raises(ValueError, match="token_budget=20 is below the 4 forced pages"):
        RandomConfig(token_budget=20, sink_pages=2).check(16)
    with pytest.raises(ValueError, match="unknown key 'seed'"):
        resolve_sparse_config({"method": "random", "seed": 3})
