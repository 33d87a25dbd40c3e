"""Progress of an evaluation on standard error: a bar on a terminal, else a line for each unit of work."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm


class Progress:
    """Counts units of work. `total` may grow."""

    def __init__(self) -> None:
        self._bar = tqdm(unit="unit", disable=None)
        self._started, self._done, self._label = time.monotonic(), 0, ""
        self.total = 0

    def begin(self, label: str, done: int) -> None:
        """Start a run, of which `done` units were finished earlier."""
        self._label, self._bar.total = label, self.total
        self._bar.set_description(label)
        self._done += done
        self._bar.update(done)

    def unit(self, what: str) -> None:
        """One more unit is finished."""
        self._done += 1
        self._bar.update()
        if self._bar.disable:
            minutes = (time.monotonic() - self._started) / 60
            print(f"{self._done}/{self.total} units, {minutes:.1f} min: {self._label}, {what}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self._bar.close()
