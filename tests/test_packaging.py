"""What the repository is to others: an import of its own, a wheel, and a tree whose parts import what they may and no more."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import distributed_sparse
from distributed_sparse.cli import COMMANDS
from tests.support.patience import WAIT_S

ROOT = Path(__file__).resolve().parents[1]
ENGINE = "distributed_sparse"
NO_EDITABLE_INSTALL = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
"""


def run_python(*arguments: str, cwd: Path = ROOT, path: str | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = path
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=WAIT_S
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- from the repository's root


def test_the_folder_kernels_does_not_pass_for_the_package_that_transformers_uses() -> None:
    """A package of that name is imported by transformers if there is one; a folder without `__init__.py` gives way to it."""
    code = "import importlib.util, transformers; from transformers import LlamaForCausalLM; "
    code += "print(importlib.util.find_spec('kernels').origin)"
    (origin,) = run_python("-c", code).split()
    assert origin == "None" or not Path(origin).is_relative_to(ROOT / "kernels")


def test_the_command_line_explains_itself_from_the_repositorys_root() -> None:
    assert "usage: python -m launch.generate" in run_python("-m", "launch.generate", "--help")


# ---- the wheel


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel holds, built from a copy of the sources: a build writes beside what it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        sources.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, sources)
    for name in ("kernels", "configs", ENGINE):
        shutil.copytree(ROOT / name, sources / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
    if importlib.util.find_spec("setuptools") is not None:
        build.append("--no-build-isolation")
    run_python(*build, str(sources))
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_imports_from_an_empty_folder_with_its_kernels(site: Path, tmp_path: Path) -> None:
    code = f"""{NO_EDITABLE_INSTALL}
import distributed_sparse.kernels.attend.attend as attend
from distributed_sparse import LLM
from distributed_sparse.selection import POLICIES
print(sys.modules["distributed_sparse"].__file__, attend.__file__, *POLICIES, sep="\\n")
"""
    package, kernels, *policies = run_python("-c", code, cwd=tmp_path, path=str(site)).split()
    assert Path(package).is_relative_to(site) and Path(kernels).is_relative_to(site)
    assert {"dense", "quest", "window"} <= set(policies)


def test_the_wheel_holds_every_module_and_nothing_beside_the_package(site: Path) -> None:
    packed = {str(file.relative_to(site)) for file in site.rglob("*.py")}
    here = {str(file.relative_to(ROOT)) for file in python_files(ENGINE)}
    kernels = {str(ENGINE / file.relative_to(ROOT)) for file in python_files("kernels")}
    assert packed == here | kernels
    here, packed = (
        {file.relative_to(root) for end in ("cpp", "h") for file in root.rglob(f"*.{end}")}
        for root in (ROOT / "kernels", site / ENGINE / "kernels")
    )
    assert packed == here and Path("vectors.h") in packed and Path("attend/attend.cpp") in packed
    assert {entry.name for entry in site.iterdir()} - {ENGINE} == {entry.name for entry in site.glob("*.dist-info")}


@pytest.fixture
def installed(site: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the console script that the wheel names, from an empty folder, with nothing of this checkout on the path."""
    points = importlib.metadata.Distribution.at(next(site.glob("*.dist-info"))).entry_points
    (script,) = points.select(group="console_scripts")
    assert script.name == "distributed-sparse"
    code = f"{NO_EDITABLE_INSTALL}from {script.module} import {script.attr}\nsys.exit({script.attr}())"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(site)}
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)

    return run


def test_the_console_script_of_the_wheel_names_its_commands_and_version(installed: Any) -> None:
    assert set(re.findall(r"^  (\w+) +\w", installed("--help").stdout.partition("commands:")[2], re.MULTILINE)) == set(COMMANDS)
    assert installed("--version").stdout == f"distributed-sparse {distributed_sparse.__version__}\n"
    wrong = installed("genrate")
    assert wrong.returncode == 2 and "invalid choice: 'genrate' (choose from" in wrong.stderr


def test_a_command_of_the_wheel_runs_from_an_empty_folder(installed: Any, tmp_path: Path) -> None:
    shape = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 99}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    planned = installed("plan", "--model", "config.json", "--gpu", "h100", "--context", "4096")
    assert planned.returncode == 0, planned.stderr
    assert "quest" in planned.stdout and "speedup" in planned.stdout


def test_the_wheel_says_that_it_is_typed_and_brings_the_demos_config(site: Path) -> None:
    assert (site / ENGINE / "py.typed").is_file()
    assert (site / ENGINE / "commands" / "demo.yaml").read_text() == (ROOT / "configs" / "demo.yaml").read_text()
    metadata = importlib.metadata.Distribution.at(next(site.glob("*.dist-info"))).metadata
    assert metadata["Version"] == distributed_sparse.__version__
    assert "Typing :: Typed" in metadata.get_all("Classifier")


# ---- what an import costs, told by what it imports

HEAVY = ("torch", "transformers", "ray", "tokenizers", "huggingface_hub", "matplotlib", "triton")


def imported_by(code: str) -> set[str]:
    return set(run_python("-c", f"import sys\n{code}\nprint('modules:', *sys.modules)").rpartition("modules:")[2].split())


def test_importing_the_package_imports_nothing_else_until_a_name_is_used() -> None:
    modules = imported_by("import distributed_sparse; assert distributed_sparse.__version__")
    assert {module for module in modules if module.startswith(ENGINE)} == {ENGINE}
    names = "EngineConfig, EngineError, RequestOutput, SamplingParams, TokensPrompt"
    assert not imported_by(f"from distributed_sparse import {names}") & set(HEAVY)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_nothing_heavy(command: str) -> None:
    code = f"""
from distributed_sparse.cli import main
try:
    main([*{[command] if command else []}, "--help"])
except SystemExit as end:
    assert end.code == 0
"""
    assert not imported_by(code) & set(HEAVY)


def test_every_public_name_is_there() -> None:
    for name in distributed_sparse.__all__:
        assert getattr(distributed_sparse, name).__name__ == name
    assert set(distributed_sparse.__all__) <= set(dir(distributed_sparse))
    with pytest.raises(AttributeError, match="has no attribute 'LLMs'"):
        _ = distributed_sparse.LLMs


def test_every_command_has_a_module_and_a_main_in_launch() -> None:
    modules = {file.stem for file in (ROOT / ENGINE / "commands").glob("*.py")}
    mains = {file.stem for file in (ROOT / "launch").glob("*.py")}
    assert set(COMMANDS) <= modules and set(COMMANDS) <= mains


# ---- who may import whom


def python_files(*folders: str) -> list[Path]:
    """Files of the repository; `kernels/` once, though it can be reached in two ways."""
    found = [file for folder in folders for file in (ROOT / folder).rglob("*.py") if not is_below_a_link(file)]
    assert found, f"no files in {folders}"
    return sorted(found)


def is_below_a_link(file: Path) -> bool:
    return any(parent.is_symlink() for parent in file.parents if parent.is_relative_to(ROOT))


def test_imports_keep_to_the_layers_of_pyproject() -> None:
    """Arrows point down, tools are imported by commands alone, and Ray by `ray_backend` alone."""
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stdout


def test_kernels_import_nothing_of_the_engine() -> None:
    """The layers' graph does not reach `kernels/`, which lies behind a symlink."""
    for file in python_files("kernels"):
        names = re.findall(r"^\s*(?:from|import) (distributed_sparse[\w.]*)", file.read_text(encoding="utf-8"), re.MULTILINE)
        assert all(f"{name}.".startswith(f"{ENGINE}.kernels.") for name in names), file


def test_one_rank_imports_no_ray() -> None:
    code = "import distributed_sparse.llm, distributed_sparse.ranks.in_process, distributed_sparse.commands.generate"
    assert "ray" not in imported_by(code)
