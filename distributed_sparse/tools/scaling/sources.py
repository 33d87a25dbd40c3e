"""sources: a hash of a package's source code."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def source_hash(package: Path) -> str:
    """Hash of the paths and contents of all Python files below a folder and its symlinked folders: 12 hex digits."""
    names = (Path(folder) / name for folder, _, files in os.walk(package, followlinks=True) for name in files)
    digest = hashlib.sha256()
    for path in sorted(name for name in names if name.suffix == ".py"):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12]
