"""native: the CPU kernels of `cpp/`, compiled on first use by the machine's own C++ compiler, and kept on disk.

Where there is no compiler, the torch formulations of the same ops do the work: the same results, more slowly.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp", "-Wno-psabi")
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels of this machine, or None where they cannot be built (said once, as a warning).

    DISTRIBUTED_SPARSE_NATIVE=0 does without them.
    """
    if os.environ.get("DISTRIBUTED_SPARSE_NATIVE", "1") == "0":
        return None
    try:
        return ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError) as error:
        said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        logger.warning("the CPU kernels could not be built, and torch's formulations, which are slower, are used: %s", said)
        return None


def serves(x: Tensor) -> bool:
    """Whether the kernels of `cpp/` take a tensor: it lies on the CPU, and its rows are of a multiple of 16 elements.

    On processors without AVX-512 they do not: compilers take vectors of 16 floats through memory there, and torch is faster.
    """
    return x.device.type == "cpu" and x.shape[-1] % 16 == 0 and has_wide_vectors() and library() is not None


@functools.cache
def has_wide_vectors() -> bool:
    """Whether a register of this processor holds 16 floats; or DISTRIBUTED_SPARSE_NATIVE=1 asks for the kernels anyway."""
    return os.environ.get("DISTRIBUTED_SPARSE_NATIVE") == "1" or "avx512f" in _processor().split()


def listed(entries: Tensor) -> Tensor:
    """int32 with consecutive entries side by side, as the kernels read a list; all other strides are free."""
    return entries.int() if entries.stride(-1) == 1 else entries.int().contiguous()


def run(name: str, *arguments: Tensor | int | float | None) -> None:
    """Call a kernel of `cpp/` with the addresses of tensors, a null pointer for None, int64_t for int, float for float.

    The number of threads comes last, from here.
    """
    loaded = library()
    assert loaded is not None
    getattr(loaded, name)(*map(_passed, arguments), ctypes.c_int64(torch.get_num_threads()))


def _passed(argument: Tensor | int | float | None) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if argument is None:
        return ctypes.c_void_p(None)
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


def _built() -> Path:
    """The path of the shared library; compiled unless this source, compiler and processor have been met before.

    Of processes that want it at once one builds it. It appears under its name at once and whole.

    Raises:
        FileNotFoundError: there is no compiler.
        subprocess.CalledProcessError: it failed.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or [_compiler()]
    # -march=native: a home directory may be shared by machines with different processors
    told = _output_of([*compiler, "--version"])
    runtime = _openmp_runtime()
    sources = sorted(SOURCES.glob("*.cpp"))
    texts = [file.read_text() for file in (*sources, *sorted(SOURCES.glob("*.h")))]
    parts = (*texts, *compiler, told, *FLAGS, str(runtime), platform.machine(), _processor())
    name = f"native-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
    folder = _cache_folder()
    if (path := folder / name).exists():
        return path
    with _alone_in(folder), tempfile.TemporaryDirectory(dir=folder, prefix="building-") as building:
        if path.exists():  # by another process, meanwhile
            return path
        compiled, linked = [Path(building, f"{source.stem}.o") for source in sources], Path(building, name)
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # of waiting: compilers are processes
            commands = ([*compiler, *FLAGS, "-c", str(source), "-o", str(out)] for source, out in zip(sources, compiled))
            list(pool.map(_output_of, commands))
        _output_of([*compiler, "-shared", *map(str, compiled), "-o", str(linked), str(runtime) if runtime else "-fopenmp"])
        return linked.replace(path)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Inside, no other process is; where the file system has no locks (some networks' have none) there is no such promise."""
    file = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _output_of(command: list[str]) -> str:
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
