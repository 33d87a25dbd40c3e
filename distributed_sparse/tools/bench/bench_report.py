"""bench_report: a benchmark's rows as a printed table and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distributed_sparse.tools.common.environment import environment
from distributed_sparse.tools.common.results import plain


def print_table(rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    """Print rows as a table; `columns` maps keys to formats ("{:.2f}"), in the order of the columns."""
    cells = [[fmt.format(row[key]) if row.get(key) is not None else "" for key, fmt in columns.items()] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(columns)]
    print("  ".join(name.rjust(width) for name, width in zip(columns, widths)))
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))


def write_json(path: str | Path, benchmark: str, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write a benchmark's rows with the settings and environment that are needed to repeat it."""
    result = {"benchmark": benchmark, "settings": settings, "environment": environment(), "rows": rows}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain(result, digits=None), indent=2, allow_nan=False)
    Path(path).write_text(text + "\n", encoding="utf-8")
