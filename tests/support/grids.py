"""Grids of parameters whose corners run by default, and whose rest runs with `-m slow`."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def corners(values: Iterable[Any], kept: Container[Any]) -> list[Any]:
    """The values as parameters of a test (a tuple gives several); those that are not in `kept` are slow."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=() if value in kept else pytest.mark.slow)
        for value in values
    ]
