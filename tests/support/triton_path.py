"""triton_path: the engine on a CPU, its ops run by Triton in the interpreter instead of torch."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import distributed_sparse.kernels as kernels
from distributed_sparse.kernels import native


@contextmanager
def triton_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, every op that has a Triton kernel runs by it. The process must have been started with TRITON_INTERPRET=1."""
    with monkeypatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        for module in Path(next(iter(kernels.__path__))).glob("*_triton.py"):
            op = module.stem.removesuffix("_triton")
            on_torch, on_triton = (importlib.import_module(f"{kernels.__name__}.{op}_{kind}") for kind in ("torch", "triton"))
            for name in vars(on_triton):
                if name.endswith("_triton"):  # a dispatcher looks its implementation up as it is called
                    patch.setattr(on_torch, f"{name.removesuffix('_triton')}_torch", vars(on_triton)[name])
        yield
