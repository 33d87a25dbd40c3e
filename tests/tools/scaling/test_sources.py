"""The name of a package's sources changes with its code, and with nothing else: results of two codes are never mixed."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

import distributed_sparse
from distributed_sparse.tools.common.results import Results
from distributed_sparse.tools.scaling import run_grid as run
from distributed_sparse.tools.scaling.run_grid import source_hash


def package(folder: Path) -> Path:
    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels" / "op.py").write_text("x = 1\n")
    (folder / "engine").mkdir()
    (folder / "engine" / "step.py").write_text("y = 1\n")
    (folder / "engine" / "kernels").symlink_to("../kernels")
    return folder / "engine"


def test_a_changed_moved_or_added_source_is_another_name_also_behind_a_symlink(tmp_path: Path) -> None:
    names = {source_hash(package(tmp_path / "a"))}
    for number, change in enumerate(("step.py", "kernels/op.py", "new.py")):
        changed = package(tmp_path / str(number))
        (changed / change).write_text("z = 1\n")
        names.add(source_hash(changed))
    moved = package(tmp_path / "moved")
    (moved / "step.py").rename(moved / "steps.py")
    names.add(source_hash(moved))
    assert len(names) == 5


def test_where_the_package_stands_and_what_python_has_compiled_change_nothing(tmp_path: Path) -> None:
    here, there = package(tmp_path / "here"), package(tmp_path / "there")
    (there / "__pycache__").mkdir()
    (there / "__pycache__" / "step.cpython-311.pyc").write_bytes(b"compiled")
    assert source_hash(here) == source_hash(there)


@pytest.mark.parametrize("commit", [None, "c0ffee+"])
def test_a_directory_of_other_sources_is_refused_where_the_commit_cannot_tell(
    commit: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def environment() -> dict[str, Any]:
        return {"command": "python -m launch.scale", "commit": commit, "cores": 2}

    monkeypatch.setattr(run, "environment", environment)
    before = run.identity()
    assert before["commit"] == commit and "command" not in before
    with Results(tmp_path, before), monkeypatch.context() as patch:
        patch.setattr(run, "source_hash", lambda package: "0123456789ab")
        with pytest.raises(ValueError, match=r"holds results of sources=.*0123456789ab.*give another --output"):
            Results(tmp_path, run.identity())
    with Results(tmp_path, run.identity()):
        pass


def test_the_hash_is_of_the_package_itself() -> None:
    root = Path(distributed_sparse.__file__).parent
    assert run.identity()["sources"] == source_hash(root)
    listed = subprocess.run(["find", "-L", str(root), "-name", "*.py"], capture_output=True, text=True, check=True).stdout
    assert f"{root}/kernels/attend/attend.py" in listed.split()  # so the kernels are part of it
