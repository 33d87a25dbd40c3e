"""environment: the machine, package versions, commit and command recorded with a result."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """Machine, package versions, git commit and command, as plain JSON."""
    import torch

    program = Path(sys.argv[0]).stem
    return {
        "command": " ".join([program if program == "distributed-sparse" else f"python -m launch.{program}", *sys.argv[1:]]),
        "commit": git_commit(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "triton", "ray", "transformers", "numpy")},
    }


def git_commit() -> str | None:
    """The source tree's commit, with "+" if tracked files outside results/ and docs/ differ; None outside a checkout."""
    root = Path(__file__).resolve().parents[3]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no", "--", ":!results", ":!docs") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_name() -> str:
    """The processor's model name from /proc/cpuinfo."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
