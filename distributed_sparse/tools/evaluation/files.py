"""files: read the files that options name, with errors that say what to give, and hash them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def read_text(option: str, path: str | Path, wanted: str) -> str:
    """The UTF-8 text of a file.

    Args:
        option: names the path in the error.
        wanted: what to give instead.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{option}={str(path)!r} cannot be read ({error}); give {wanted}") from None


def read_json(option: str, path: str | Path, wanted: str) -> Any:
    """The content of a JSON file. Arguments and errors as in `read_text`."""
    text = read_text(option, path, wanted)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{option}={str(path)!r} is not JSON ({error}); give {wanted}") from None


def digest(path: Path) -> str | None:
    """The SHA-256 of a file's bytes in hex; None if there is no such file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
