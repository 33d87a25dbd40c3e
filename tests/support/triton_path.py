"""triton_path: the engine on a CPU, its ops run by Triton in the interpreter instead of torch."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from distributed_sparse.kernels import native
from tests.support.kernels import kernel_modules


@contextmanager
def triton_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, every op that has a Triton kernel runs by it. The process must have been started with TRITON_INTERPRET=1."""
    with monkeypatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        for file, module in kernel_modules().items():
            if not file.endswith("_triton"):
                continue
            on_triton = vars(importlib.import_module(module))
            on_torch = importlib.import_module(module.removesuffix("_triton") + "_torch")
            for name in on_triton:
                if name.endswith("_triton"):  # `dispatch` looks its function up in each call
                    patch.setattr(on_torch, f"{name.removesuffix('_triton')}_torch", on_triton[name])
        yield
