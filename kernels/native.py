"""native: the CPU kernels of `native.cpp`, compiled on first use by the machine's own C++ compiler, and kept on disk.

Where there is no compiler, the torch formulations of the same ops do the work: the same results, more slowly.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp", "-Wno-psabi")
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}

_POINTER, _INTEGER, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_ATTEND: list[Any] = [
    _POINTER, _POINTER, _POINTER, _INTEGER, _INTEGER,  # q, k, v and their strides
    _POINTER, _INTEGER, _INTEGER, _POINTER, _INTEGER, _INTEGER, _POINTER,  # pages, their numbers, tokens in the last
    _POINTER, _INTEGER, _INTEGER, _POINTER, _INTEGER, _INTEGER, _POINTER,  # tokens, their numbers, log weight
    _POINTER, _POINTER, *[_INTEGER] * 5, _POINTER, _POINTER, _INT,  # partial, sizes, out, log-sum-exp, threads
]  # fmt: skip
_PAGE_SCORES: list[Any] = [
    _POINTER, _POINTER, _INTEGER, _INTEGER, _POINTER, _INTEGER, _POINTER, _INT, *[_INTEGER] * 5, _POINTER, _INT
]  # fmt: skip
_LINEAR: list[Any] = [_POINTER, _POINTER, _INTEGER, _INTEGER, _INTEGER, _POINTER, _INT]
_ROTARY_APPEND: list[Any] = [
    *[_POINTER, _INTEGER] * 3, *[_POINTER] * 6, *[_INTEGER] * 6, *[_POINTER] * 4, _INT  # q, k, v; angles, runs; sizes; pages
]  # fmt: skip
_ADD_RMS_NORM: list[Any] = [_POINTER, _POINTER, _POINTER, ctypes.c_float, _INTEGER, _INTEGER, _POINTER, _POINTER]
_TOP_K_PAGES: list[Any] = [_POINTER, _POINTER, _INTEGER, _POINTER, _POINTER, *[_INTEGER] * 6, _POINTER, _POINTER, _INT]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels of this machine, or None where they cannot be built (said once, as a warning).

    Set DISTRIBUTED_SPARSE_NATIVE=0 to do without them.
    """
    if os.environ.get("DISTRIBUTED_SPARSE_NATIVE", "1") == "0":
        return None
    try:
        loaded = ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError) as error:
        said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        logger.warning("the CPU kernels could not be built, and torch's formulations, which are slower, are used: %s", said)
        return None
    for name in DTYPES.values():
        for function, arguments in (
            (f"attend_{name}", _ATTEND),
            (f"page_scores_{name}", _PAGE_SCORES),
        ):
            getattr(loaded, function).argtypes = arguments
            getattr(loaded, function).restype = None
    for function, arguments in (
        ("linear_float32", _LINEAR),
        ("rotary_append_float32", _ROTARY_APPEND),
        ("add_rms_norm_float32", _ADD_RMS_NORM),
        ("top_k_pages_float32", _TOP_K_PAGES),
        ("top_k_pages_int32", _TOP_K_PAGES),
    ):
        getattr(loaded, function).argtypes, getattr(loaded, function).restype = arguments, None
    loaded.meet.argtypes, loaded.meet.restype = [_POINTER, _INT, _INT, _INTEGER, _INTEGER], _INT
    return loaded


def serves(x: Tensor) -> bool:
    """Whether the kernels of `native.cpp` take a tensor: it lies on the CPU, and its rows are of a multiple of 16 elements."""
    return x.device.type == "cpu" and x.shape[-1] % 16 == 0 and library() is not None


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's elements begin; None is a null pointer."""
    return None if tensor is None else tensor.data_ptr()


def _built() -> Path:
    """The path of the shared library; compiled unless this source, compiler and processor have been met before.

    It appears under its name at once and whole, so any number of processes may build it side by side.

    Raises:
        FileNotFoundError: there is no compiler.
        subprocess.CalledProcessError: it failed.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or [_compiler()]
    # -march=native: a home directory may be shared by machines with different processors
    told = _run([*compiler, "--version"])
    runtime = _openmp_runtime()
    parts = (SOURCE.read_text(), *compiler, told, *FLAGS, str(runtime), platform.machine(), _processor())
    name = f"native-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
    folder = _cache_folder()
    if (path := folder / name).exists():
        return path
    with tempfile.TemporaryDirectory(dir=folder, prefix="building-") as building:
        compiled, linked = Path(building, "native.o"), Path(building, name)
        _run([*compiler, *FLAGS, "-c", str(SOURCE), "-o", str(compiled)])
        _run([*compiler, "-shared", str(compiled), "-o", str(linked), str(runtime) if runtime else "-fopenmp"])
        return linked.replace(path)


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout


def _compiler() -> str:
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return found
    raise FileNotFoundError("no C++ compiler (c++, g++ or clang++) is on the PATH; install one, or name it in CXX")


def _cache_folder() -> Path:
    """~/.cache/distributed_sparse (XDG_CACHE_HOME goes first), or a folder for temporary files where that cannot be written."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        (folder := home / "distributed_sparse").mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="distributed_sparse-"))


def _openmp_runtime() -> Path | None:
    """The OpenMP library that torch has loaded: a second one would bring threads of its own, which fight for the cores."""
    try:
        mapped = Path("/proc/self/maps").read_text().split()
    except OSError:
        return None
    found = (
        Path(name) for name in mapped if name.startswith("/") and Path(name).name.startswith(("libgomp", "libiomp5", "libomp"))
    )
    return next(found, None)


def _processor() -> str:
    """What distinguishes processors: the flags of the first one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
