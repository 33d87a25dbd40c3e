"""tables: Markdown tables, and the numbers in them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is aligned left, the others right."""
    rule = [":--", *("--:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in (head, rule, *rows))


def number(value: float, digits: int = 3) -> str:
    """A number with `digits` decimals; "-" for nan."""
    if math.isnan(value):
        return "-"
    return "inf" if math.isinf(value) else f"{value:.{digits}f}"


def small(value: float) -> str:
    """A number with four decimals, or in scientific notation if it is below 1e-3."""
    return number(value, 4) if math.isnan(value) or math.isinf(value) or value >= 1e-3 or value == 0 else f"{value:.1e}"


def megabytes(value: float) -> str:
    """Bytes as MB (10^6)."""
    return number(value / 1e6, 3 if value < 1e8 else 1)
