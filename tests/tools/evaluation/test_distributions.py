"""KL divergence against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from distributed_sparse.tools.evaluation.session import kl_divergence, table_bytes


def logs(*rows: list[float]) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.array(rows, dtype=np.float64))


def test_kl_of_known_distributions() -> None:
    reference, other = logs([0.5, 0.5, 0.0], [0.9, 0.1, 0.0]), logs([0.25, 0.5, 0.25], [0.9, 0.1, 0.0])
    assert kl_divergence(reference, other) == pytest.approx([0.5 * np.log(2), 0.0])


def test_kl_is_infinite_where_a_possible_token_is_excluded_and_not_the_other_way_round() -> None:
    assert kl_divergence(logs([0.5, 0.5]), logs([1.0, 0.0])) == pytest.approx([np.inf])
    assert kl_divergence(logs([1.0, 0.0]), logs([0.5, 0.5])) == pytest.approx([np.log(2)])


def test_kl_is_never_negative() -> None:
    same = logs([0.1, 0.2, 0.7]).astype(np.float32)
    assert (kl_divergence(same, same + 1e-7) >= 0).all()


def test_a_table_has_four_bytes_for_each_token_of_the_vocabulary() -> None:
    assert table_bytes(1000, 128256) == 513_024_000
