"""progress: progress on standard error, as tqdm's bar on a terminal and as plain lines elsewhere (a job's log, a pipe)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

LINE_INTERVAL_S = 10.0


class Progress(tqdm):
    """tqdm that prints one line per refresh if standard error is not a terminal.

    Args:
        line_interval_s: seconds between two lines; work that ends earlier prints no line. 0 prints a line for each update.
        kwargs: arguments of tqdm.
    """

    disable: bool

    def __init__(self, *, line_interval_s: float = LINE_INTERVAL_S, **kwargs: Any) -> None:
        self._prints_lines = not sys.stderr.isatty()
        if self._prints_lines:
            if kwargs.get("desc"):
                kwargs["desc"] += ": "
            kwargs |= {
                "mininterval": line_interval_s,
                "delay": max(line_interval_s, 1e-9),  # with 0, tqdm prints before the first update
                "miniters": 1,
                "bar_format": "{desc}{n_fmt}/{total_fmt} {unit}, {elapsed} elapsed, {remaining} left{postfix}",
            }
        super().__init__(**kwargs)

    def status_printer(self, file: TextIO) -> Callable[[str], None]:  # type: ignore[override]
        if self._prints_lines:
            return lambda line: print(line, file=file, flush=True)
        return tqdm.status_printer(file)

    def close(self) -> None:
        if not self._prints_lines or self.disable:
            super().close()
            return
        if self.n != self.last_print_n and self.last_print_t >= self.start_t + self.delay:  # skip if no line was shown before
            self.display()
        self.disable = True
        self._decr_instances(self)
