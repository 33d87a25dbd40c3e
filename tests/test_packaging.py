"""What the repository is to others: an import of its own, a wheel, and a tree whose parts import what they may and no more."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import distributed_sparse
from distributed_sparse.cli import COMMANDS
from tests.support.patience import WAIT_S

ROOT = Path(__file__).resolve().parents[1]
ENGINE = "distributed_sparse"
IMPORT_RAY = {
    f"{ENGINE}/{name}.py"
    for name in ("driver/actor", "driver/group", "driver/placement", "driver/exporter", "driver/ray_session", "shard/actor")
}
ABOVE = {
    "kernels": ("selection", "model", "shard", "driver", "llm", "client", "evaluation", "bench", "chaos"),
    "selection": ("model", "shard", "driver", "llm", "client", "evaluation", "bench", "chaos"),
    "model": ("selection", "shard", "driver", "llm", "client", "evaluation", "bench", "chaos"),
    "shard": ("driver", "llm", "client", "evaluation", "bench", "chaos"),
    "driver": ("llm", "client", "evaluation", "bench", "chaos"),
}
NO_EDITABLE_INSTALL = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
"""
SPOKEN_BY_BOTH = (f"{ENGINE}.driver.messages", f"{ENGINE}.driver.channel")
"""What the driver and a shard say to each other, and over what; neither imports anything else of the driver."""


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
import distributed_sparse.kernels.attend as attend
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
    sources = {file.name for file in site.glob(f"{ENGINE}/kernels/cpp/*")}
    assert sources == {file.name for file in (ROOT / "kernels" / "cpp").iterdir()} and "vectors.h" in sources
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


# ---- who imports whom


def python_files(*folders: str) -> list[Path]:
    """Files of the repository; `kernels/` once, though it can be reached in two ways."""
    found = [file for folder in folders for file in (ROOT / folder).rglob("*.py") if not is_below_a_link(file)]
    assert found, f"no files in {folders}"
    return sorted(found)


def is_below_a_link(file: Path) -> bool:
    return any(parent.is_symlink() for parent in file.parents if parent.is_relative_to(ROOT))


def imports(file: Path) -> Iterator[str]:
    """Full names of all modules that a file imports, wherever in it."""
    return imported(ast.parse(file.read_text(encoding="utf-8")), file)


def imported(tree: ast.Module, file: Path) -> Iterator[str]:
    package = ".".join(file.relative_to(ROOT).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
            assert base is not None
            yield from (f"{base}.{alias.name}" for alias in node.names)


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def offenders(files: list[Path], package: str) -> set[str]:
    """Those of the files that import a package, or anything in it."""
    return {str(file.relative_to(ROOT)) for file in files if any(is_in(module, package) for module in imports(file))}


def test_only_the_actors_and_the_group_import_ray() -> None:
    of_the_soak = {f"{ENGINE}/commands/chaos.py"}  # it starts a cluster, and takes nodes from it
    assert offenders(python_files(ENGINE, "kernels", "launch"), "ray") == IMPORT_RAY | of_the_soak


def test_what_imports_ray_is_imported_when_it_is_called_for() -> None:
    """One rank needs no Ray: outside of functions only these files themselves may import each other."""
    modules = [file.removesuffix(".py").replace("/", ".") for file in IMPORT_RAY]
    others = [file for file in python_files(ENGINE, "launch") if str(file.relative_to(ROOT)) not in IMPORT_RAY]
    for file in others:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not [name for name in imported(tree, file) if any(is_in(name, module) for module in modules)], file


def test_nothing_imports_the_kernels_under_their_other_name() -> None:
    """It would be a second copy of each module, with a second set of compiled kernels."""
    assert not offenders(python_files(ENGINE, "kernels", "launch", "tests"), "kernels")


def test_kernels_import_nothing_of_the_engine() -> None:
    kernels = f"{ENGINE}.kernels"
    for file in python_files("kernels"):
        assert not [name for name in imports(file) if is_in(name, ENGINE) and not is_in(name, kernels)], file


@pytest.mark.parametrize("folder", ABOVE)
def test_nothing_imports_upwards(folder: str) -> None:
    for file in python_files("kernels" if folder == "kernels" else f"{ENGINE}/{folder}"):
        for name in imports(file):
            if not any(is_in(name, module) for module in SPOKEN_BY_BOTH):
                assert not [above for above in ABOVE[folder] if is_in(name, f"{ENGINE}.{above}")], (file, name)


def test_the_driver_imports_no_kernel_and_of_torch_the_rendezvous_store_alone() -> None:
    driver = python_files(f"{ENGINE}/driver")
    assert not offenders(driver, f"{ENGINE}.kernels")
    assert offenders(driver, "torch") == {f"{ENGINE}/driver/remote_group.py"}


def test_what_is_spoken_by_both_imports_nothing_of_either() -> None:
    for module in SPOKEN_BY_BOTH:
        file = ROOT / f"{module.replace('.', '/')}.py"
        own = {name for name in imports(file) if is_in(name, f"{ENGINE}.driver") or is_in(name, f"{ENGINE}.shard")}
        assert not [name for name in own if not any(is_in(name, allowed) for allowed in SPOKEN_BY_BOTH)]


def test_the_engine_does_not_import_its_launchers_or_tests() -> None:
    for package in ("launch", "tests"):
        assert not offenders(python_files(ENGINE, "kernels"), package)


def test_nothing_but_the_command_lines_imports_the_command_lines() -> None:
    files = python_files(ENGINE, "kernels")
    importers = offenders(files, f"{ENGINE}.commands") | offenders(files, f"{ENGINE}.cli")
    assert {str(Path(file).parent) for file in importers} == {f"{ENGINE}/commands"}
