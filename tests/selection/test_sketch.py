"""sketch reads the tokens that its definition names, adds the tail, and depends on nothing but the row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distributed_sparse.selection import resolve_sparse_config
from distributed_sparse.selection.base import Policy
from distributed_sparse.selection.sketch import SketchConfig, SketchPolicy, sketch_bytes
from tests.support.decode_rows import DecodeRows, positions_read, rows_for
from tests.support.eager_methods import EagerSketch
from tests.support.promise_a import assert_rows_depend_on_themselves

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.each_value]  # on CPU, equal bits are promised at one thread

CONTEXTS = [333, 5, 64, 65, 17, 200, 1, 1100]


def sketch(rows: DecodeRows, config: SketchConfig) -> Policy:
    return rows.policy(SketchPolicy, config)


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({"min_tokens": 40}, {"group": 1}),
        ({"min_tokens": 1, "tau": 2.0}, {"group": 3}),
        ({"min_tokens": 100, "sink_pages": 0, "recent_pages": 1}, {"group": 8, "head_dim": 128}),
        ({"min_tokens": 64, "sink_pages": 2, "recent_pages": 3, "tau": 3.0}, {"page_size": 32}),
        ({"min_tokens": 32}, {"page_size": 64, "head_dim": 256, "group": 1, "seed": 2}),
        ({"min_tokens": 40, "min_context": 300}, {"group": 2}),
    ],
)
def test_tokens_are_those_of_the_definition_in_float64(settings: dict[str, Any], shape: dict[str, Any]) -> None:
    config = SketchConfig(**settings)
    rows = rows_for(SketchPolicy, config, CONTEXTS, **shape)
    selection, sparse = rows.select(sketch(rows, config)), 0
    own = EagerSketch(page_size=rows.batch.page_size, dense_layers=0, **settings)
    group = rows.geometry.group_size
    for row, n in enumerate(CONTEXTS):
        expected = own.log_weights(0, rows.q[row], rows.keys[row], rows.values[row])[::group]
        for head in range(4):
            found = positions_read(rows, selection, row, head)
            assert found == expected[head].isfinite().nonzero()[:, 0].tolist(), f"sequence {row}, head {head}"
            sparse += len(found) < n
    assert sparse >= 8
    own.margins.assert_clear(sign=2e-7, code=1e-6, probability=1e-6)


def test_the_tail_brings_the_output_nearer_to_dense_than_what_is_read_alone() -> None:
    """Random keys: half of the mass is in tokens that are not read; values have a mean, which the tail knows."""
    config = SketchConfig(min_tokens=64, tau=4.0)
    rows = rows_for(SketchPolicy, config, [1100, 700], group=4, value_mean=1.0)
    selection = rows.select(sketch(rows, config))
    assert selection.partial is not None
    errors = []
    for with_tail in (True, False):
        if not with_tail:
            selection.partial = None
        errors.append((rows.attend(selection) - dense(rows)).norm() / dense(rows).norm())
    assert errors[0] < 0.5 * errors[1], errors
    without = rows.select(sketch(rows, SketchConfig(min_tokens=64, tau=4.0, tail=False)))
    assert without.partial is None and torch.equal(rows.attend(without), rows.attend(selection))


def dense(rows: DecodeRows) -> Tensor:
    outputs = []
    for q, keys, values in zip(rows.q, rows.keys, rows.values):
        queries = q.view(keys.shape[0], -1, q.shape[1])
        outputs.append(((queries @ keys.mT * rows.geometry.scale).softmax(-1) @ values).flatten(0, 1))
    return torch.stack(outputs)


@pytest.mark.parametrize("settings", [{"min_tokens": 40}, {"min_tokens": 64, "tail": False, "min_context": 300}])
def test_a_row_is_the_same_wherever_it_is_computed(settings: dict[str, Any]) -> None:
    config = SketchConfig(**settings)
    rows = rows_for(SketchPolicy, config, [333, 64, 65, 900], group=2)
    assert_rows_depend_on_themselves(rows, lambda rows: sketch(rows, config))


def test_bytes_are_those_of_the_recipe() -> None:
    config = SketchConfig()
    rows = rows_for(SketchPolicy, config, [40])  # 4 KV heads, d 64, pages of 16
    assert sketch_bytes(rows.geometry) == 4 * (128 + 8 + 32 + 16 + 12)
    policy = sketch(rows, config)
    assert policy.bytes_scored([40, 15]) == 2 * 4 * 196
    assert sketch(rows, SketchConfig(tail=False)).bytes_scored([40]) == 2 * 4 * 180
    assert not policy.graph_safe


def test_wrong_settings_are_refused_by_name() -> None:
    for settings, message in (
        ({"tau": -1.0}, "sparse.tau=-1.0 must be finite, >= 0"),
        ({"min_tokens": 0}, "sparse.min_tokens=0 must be >= 1; 128 is usual"),
        ({"token_budget": 64}, "unknown key 'token_budget'"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve_sparse_config({"method": "sketch", **settings})
    with pytest.raises(ValueError, match="sketch needs a head dimension that is a multiple of 8, not 12"):
        rows_for(SketchPolicy, SketchConfig(), [5], head_dim=12)


@pytest.mark.parametrize("method", ["twilight", "vattention"])
def test_it_serves_as_a_selector(method: str) -> None:
    settings = {"twilight": {"min_candidates": 64}, "vattention": {"sink_tokens": 16, "window_tokens": 16, "epsilon": 0.5}}
    config = resolve_sparse_config({"method": method, "selector": "sketch", **settings[method]})
    from distributed_sparse.selection import policy_class

    rows = rows_for(policy_class(method), config, [1200, 300], value_mean=2.0)
    assert_rows_depend_on_themselves(rows, lambda rows: rows.policy(policy_class(method), config))
    selection = rows.select(rows.policy(policy_class(method), config))
    assert int(selection.attended(rows.batch.last_page_len, 16)[0].max()) < 1200
