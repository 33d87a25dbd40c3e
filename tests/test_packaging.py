"""What the repository is to others: an import of its own, a wheel, and a tree whose parts import what they may and no more."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENGINE = ROOT / "distributed_sparse"
IMPORTS_RAY = {"distributed_sparse.driver.actor", "distributed_sparse.driver.group", "distributed_sparse.shard.actor"}
TORCH_FREE_DRIVER = ("distributed_sparse.driver.group", "distributed_sparse.driver.remote_group")
"""The rendezvous store is torch's."""


def run_python(*arguments: str, cwd: Path = ROOT) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- from the repository's root


def test_transformers_finds_no_package_kernels_in_the_repository() -> None:
    """`kernels` is a package that transformers uses if it is there: the folder of that name must not pass for it."""
    code = "from transformers.utils import import_utils, is_kernels_available; print(is_kernels_available(), MODULE)"
    code = code.replace("MODULE", "import_utils.__file__")
    available, file = run_python("-c", code).split()
    assert available == str(importlib.util.find_spec("kernels.layer") is not None)
    assert Path(file).name == "import_utils.py"


def test_the_command_line_explains_itself_from_the_repositorys_root() -> None:
    assert "usage: python -m launch.generate" in run_python("-m", "launch.generate", "--help")
