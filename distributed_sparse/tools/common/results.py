"""results: the finished units of a long run, one JSON line each, so that an interrupted run can continue."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from distributed_sparse.utils.validation import shown

logger = logging.getLogger(__name__)

RESULTS, CONFIGURATION, REFERENCES = "results.jsonl", "configuration.json", "reference"

Record = dict[str, Any]


class Results:
    """The directory of one run; `results.jsonl` in it is locked, so that one process at a time writes.

    Args:
        directory: created if it does not exist.
        configuration: everything that the numbers depend on, plain JSON; it must equal that of the existing directory.

    Raises:
        ValueError: the directory has another configuration, another process uses it, or a line is not JSON.
    """

    def __init__(self, directory: str | Path, configuration: dict[str, Any]) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._claim(configuration)
        path = self.directory / RESULTS
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ValueError(f"{path} is in use by another run; wait for it, or give another --output") from None
        self.records = {record["key"]: record for record in self._read()}

    def _claim(self, configuration: dict[str, Any]) -> None:
        path = self.directory / CONFIGURATION
        if not path.exists():
            if (self.directory / RESULTS).exists():
                raise ValueError(f"{self.directory} has a {RESULTS} but no {CONFIGURATION}; give another --output")
            written = path.with_suffix(".tmp")
            text = json.dumps(configuration, indent=2, sort_keys=True, allow_nan=False)
            written.write_text(text + "\n", encoding="utf-8")
            written.replace(path)
            return
        there, here = _flat(json.loads(path.read_text(encoding="utf-8"))), _flat(json.loads(json.dumps(configuration)))
        for name in sorted(there.keys() | here.keys()):
            if there.get(name) != here.get(name):
                raise ValueError(
                    f"{self.directory} holds results of {name}={shown(there.get(name))}, and this run has "
                    f"{name}={shown(here.get(name))}; give another --output, or the same settings to continue"
                )

    def _read(self) -> list[Record]:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            logger.warning("%s ends in half a line, which is dropped; its unit will be run again", self.directory / RESULTS)
            self._file.truncate(whole)
        records = []
        for number, line in enumerate(content[:whole].decode().splitlines(), 1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{self.directory / RESULTS}, line {number} is not JSON ({error}); remove the line") from None
        return records

    def __contains__(self, key: str) -> bool:
        return key in self.records

    def append(self, record: Record) -> None:
        """Write one finished unit, identified by its "key"; it is on disk when this returns."""
        line = json.dumps(plain(record), ensure_ascii=False, allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records[record["key"]] = json.loads(line)  # as a later run reads it

    def save_reference(self, key: str, logprobs: np.ndarray) -> None:
        """Write an array that later runs are compared with."""
        path = self._reference(key)
        path.parent.mkdir(exist_ok=True)
        written = path.with_suffix(".tmp")
        with written.open("wb") as file:
            np.save(file, logprobs)
        written.replace(path)

    def reference(self, key: str) -> np.ndarray | None:
        """Read the array of `save_reference`; None if there is none."""
        path = self._reference(key)
        return np.load(path, allow_pickle=False) if path.exists() else None

    def _reference(self, key: str) -> Path:
        return self.directory / REFERENCES / f"{key}.npy"

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Results:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def plain(value: Any, digits: int | None = 6) -> Any:
    """Convert a value to JSON types: arrays become lists, and nan and infinity None.

    Args:
        digits: significant digits of floats; None: all.
    """
    if isinstance(value, dict):
        return {str(key): plain(item, digits) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist(), digits)
    if isinstance(value, (list, tuple)):
        return [plain(item, digits) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item(), digits)
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if digits is None else float(f"{value:.{digits}g}")
    return value


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings; keys are joined by dots."""
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return found
