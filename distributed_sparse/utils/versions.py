"""versions: the packages whose versions must be equal on all ranks."""

from __future__ import annotations

import importlib.metadata
import platform

COMPARED_PACKAGES = ("distributed-sparse", "torch", "triton")


def versions() -> dict[str, str]:
    """Return the Python version and the version of each package in `COMPARED_PACKAGES`."""
    found = {"python": platform.python_version()}
    for package in COMPARED_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
