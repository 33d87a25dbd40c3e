"""Runs one test body on every implementation of an op: torch, C++ where it has the op, Triton interpreted and on CUDA.

A test that takes ``implementation`` runs on all of them; ``@pytest.mark.implementations("interpreter", "triton")`` narrows
that. The interpreter needs TRITON_INTERPRET=1 before triton is imported, so it has a process of its own, which runs
nothing else: ``TRITON_INTERPRET=1 pytest tests/kernels``. Shapes too large for it are marked ``not_interpreted``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.interpreter import INTERPRETED
from tests.support.kernels import IMPLEMENTATIONS, Implementation, kernel_modules, poisoned_memory

FILES = {"rotary_append": "append"}
"""Ops that lie in another one's file."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "implementations(*names): run on these implementations alone")
    config.addinivalue_line("markers", "not_interpreted: too large for the Triton interpreter")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "implementation" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("implementations")
    names = marker.args if marker else [implementation.name for implementation in IMPLEMENTATIONS]
    op = metafunc.module.__name__.rpartition(".test_")[2]
    if f"{FILES.get(op, op)}_native" not in kernel_modules():
        names = [name for name in names if name != "native"]
    on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    parameters = [
        pytest.param(implementation, id=implementation.name, marks=on_gpu if implementation.device == "cuda" else ())
        for implementation in IMPLEMENTATIONS
        if implementation.name in names
    ]
    metafunc.parametrize("implementation", parameters)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    deselected = [item for item in items if here in item.path.parents and not _runs_here(item)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in set(deselected)]


def _runs_here(item: pytest.Item) -> bool:
    """Whether an item belongs to this process: the interpreter's tests to the one, all others to the other."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    implementation = parameters.get("implementation")
    if not (isinstance(implementation, Implementation) and implementation.is_interpreter):
        return not INTERPRETED
    if item.get_closest_marker("not_interpreted") or any(value is torch.bfloat16 for value in parameters.values()):
        return False  # the interpreter computes bfloat16 wrongly
    return INTERPRETED


@pytest.fixture(autouse=True)
def uninitialised_memory_is_poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield
