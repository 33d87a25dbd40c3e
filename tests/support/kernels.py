"""What the kernel tests share: the implementations of an op, NaN poison, error ratios, compilation without a GPU."""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import distributed_sparse.kernels as kernels
from distributed_sparse.kernels import scratch

SHARED_MEMORY_LIMIT = 99 * 1024
"""Bytes of shared memory that one block may use on every GPU aimed at (sm_86 and sm_89 have the least)."""

ARCHITECTURES = [90, pytest.param(80, marks=pytest.mark.slow)]
"""For ``@pytest.mark.parametrize("architecture", ARCHITECTURES)``: sm_90 always, sm_80 under ``-m slow``."""


@dataclass(frozen=True)
class Implementation:
    """One way to run an op: ``torch`` or ``native`` on CPU, Triton in the ``interpreter`` on CPU, or ``triton`` on CUDA."""

    name: str
    device: str

    @property
    def is_interpreter(self) -> bool:
        return self.name == "interpreter"

    def function(self, op: str, file: str | None = None) -> Callable[..., Any]:
        """The implementation's function of an op: ``append_torch`` of ``append_torch.py``, or of ``file``_torch.py."""
        suffix = self.name if self.name in ("torch", "native") else "triton"
        return getattr(importlib.import_module(kernel_modules()[f"{file or op}_{suffix}"]), f"{op}_{suffix}")


@functools.cache
def kernel_modules() -> dict[str, str]:
    """Name of a kernel's file -> its module."""
    root = Path(next(iter(kernels.__path__)))
    files = (file.relative_to(root).with_suffix("") for file in root.glob("*/*.py"))
    return {file.name: ".".join((kernels.__name__, *file.parts)) for file in files}


TORCH = Implementation("torch", "cpu")
NATIVE = Implementation("native", "cpu")
INTERPRETER = Implementation("interpreter", "cpu")
TRITON = Implementation("triton", "cuda")
IMPLEMENTATIONS = (TORCH, NATIVE, INTERPRETER, TRITON)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what torch allocates uninitialised with NaN (floats) or the least value (integers: no index that exists).

    What a thread keeps as scratch is given anew, and so poisoned, each time.
    """
    names = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")]
    originals = [getattr(owner, name) for owner, name in names]

    def poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: poison_(allocate(*args, **kwargs))

    try:
        for (owner, name), original in zip(names, originals):
            setattr(owner, name, poisoning(original))
        with patch.object(scratch._buffers, "by_name", _ForgetfulDict()):
            yield
    finally:
        for (owner, name), original in zip(names, originals):
            setattr(owner, name, original)


class _ForgetfulDict(dict):
    """Keeps nothing."""

    def __setitem__(self, key: object, value: object) -> None:
        pass


def poison_(tensor: Tensor) -> Tensor:
    """Overwrite a tensor with what must never be read: NaN, the least integer, or True. Returns it."""
    if tensor.is_meta:
        return tensor
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).min)


def error_ratio(result: Tensor, reference: Tensor) -> float:
    """RMS(result - reference) / RMS(reference) in float64.

    Infinities must stand at the same places with the same sign, and a NaN anywhere gives infinity. Where the reference
    is 0 throughout, the result's RMS itself.
    """
    assert result.shape == reference.shape, f"shape {tuple(result.shape)}, expected {tuple(reference.shape)}"
    got, want = result.detach().cpu().double(), reference.detach().cpu().double()
    if got.isnan().any() or want.isnan().any():
        return float("inf")
    infinite = got.isinf() | want.isinf()
    if not torch.equal(got[infinite], want[infinite]):
        return float("inf")
    got, want = got[~infinite], want[~infinite]
    if got.numel() == 0:
        return 0.0
    error, scale = (got - want).square().mean().sqrt(), want.square().mean().sqrt()
    return float(error / scale) if scale > 0 else float(error)


def assert_near(result: Tensor, reference: Tensor, ratio: float) -> None:
    """Fail when `error_ratio` exceeds ``ratio``."""
    measured = error_ratio(result, reference)
    assert measured <= ratio, f"error ratio {measured:.3g} > {ratio:.3g}"


TOLERANCE = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
"""Error ratio allowed to a result that is computed in float32 and rounded once or twice to this dtype (one unit, as RMS)."""


def bits(tensor: Tensor) -> Tensor:
    """The bit pattern of a tensor, for comparisons that tell -0.0 from +0.0 and one NaN from another."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


@dataclass(frozen=True)
class CompiledLaunch:
    """One compiled kernel and what ptxas says of it. Stack and local memory (bytes) are where spilled registers go."""

    kernel: str
    registers: int
    stack: int
    local: int
    shared: int
    ptx: str = field(repr=False)


def compile_launches(launcher: Callable[..., Any], *args: Any, architecture: int = 90, **kwargs: Any) -> list[CompiledLaunch]:
    """Call a Triton launcher with CPU tensors, but compile its kernels for sm_``architecture`` instead of running them.

    Signature, alignment, constants, warps and stages are those of the launch itself, so what is checked is what runs.
    No GPU is needed. What the launcher returns is undefined and is dropped.
    """
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled.append(run(self, *arguments, grid=grid, warmup=True, **options))
        return compiled[-1]

    target = GPUTarget("cuda", architecture, 32)
    without_a_gpu = SimpleNamespace(
        get_current_device=lambda: f"sm_{architecture}",  # keys the kernels' cache, so apart from real devices
        get_current_stream=lambda device: 0,
        get_current_target=lambda: target,
    )
    active = dict(vars(triton.runtime.driver))
    triton.runtime.driver.set_active(without_a_gpu)
    JITFunction.run = compile_only
    try:
        launcher(*args, **kwargs)
    finally:
        JITFunction.run = run
        vars(triton.runtime.driver).update(active)  # reset_active would look for a GPU
    return [_resource_usage(kernel) for kernel in compiled]


def assert_compiles(launcher: Callable[..., Any], *args: Any, architecture: int = 90, **kwargs: Any) -> None:
    """Fail unless every kernel of a launch compiles, spills no register, and fits in the shared memory of every GPU."""
    launches = compile_launches(launcher, *args, architecture=architecture, **kwargs)
    assert launches, "nothing was launched"
    for launch in launches:
        assert launch.stack == 0 and launch.local == 0, f"spills: {launch}"
        assert launch.shared < SHARED_MEMORY_LIMIT, f"too much shared memory: {launch}"


def _resource_usage(kernel: Any) -> CompiledLaunch:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", output)}
    shared, ptx = kernel.metadata.shared, kernel.asm["ptx"]
    return CompiledLaunch(kernel.metadata.name, usage["REG"], usage["STACK"], usage["LOCAL"], shared, ptx)
