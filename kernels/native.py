"""native: the C++ kernels for CPUs, compiled on first use by the machine's own C++ compiler, and kept on disk.

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
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp", "-Wno-psabi", f"-I{SOURCES}")
COMPILER_TIMEOUT_S = 300.0
"""How long the compiler may take for one file."""
LOCK_TIMEOUT_S = 900.0
"""How long to wait for another process that compiles the same."""
DIGEST_BYTES = 32
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels of this machine, or None where they cannot be built (said once, as a warning).

    DISTRIBUTED_SPARSE_NATIVE=0 does without them.
    """
    if os.environ.get("DISTRIBUTED_SPARSE_NATIVE", "1") == "0":
        return None
    problem: Exception | None = None
    try:
        recipe = _Recipe.of_this_machine()
        for folder in _cache_folders():
            try:
                return _whole(folder / recipe.name) or _built(recipe, folder)
            except (OSError, subprocess.SubprocessError) as error:  # it cannot be written, is full, or runs no programs
                problem = error
    except (OSError, subprocess.SubprocessError) as error:
        problem = error
    said = problem.stderr.strip() if isinstance(problem, subprocess.CalledProcessError) else problem
    logger.warning("the CPU kernels could not be built, and torch's formulations, which are slower, are used: %s", said)
    return None


def serves(x: Tensor) -> bool:
    """Whether the C++ kernels take a tensor: it lies on the CPU, and its rows are of a multiple of 16 elements.

    On processors without AVX-512 they do not: compilers take vectors of 16 floats through memory there, and torch is faster.
    """
    return x.shape[-1] % 16 == 0 and has_wide_vectors() and available(x)


def available(x: Tensor) -> bool:
    """Whether the C++ kernels without vectors of floats take a tensor: it lies on the CPU."""
    return x.device.type == "cpu" and library() is not None


@functools.cache
def has_wide_vectors() -> bool:
    """Whether a register of this processor holds 16 floats; or DISTRIBUTED_SPARSE_NATIVE=1 asks for the kernels anyway."""
    return os.environ.get("DISTRIBUTED_SPARSE_NATIVE") == "1" or "avx512f" in _processor().split()


def listed(entries: Tensor) -> Tensor:
    """int32 with consecutive entries side by side, as the kernels read a list; all other strides are free."""
    return entries.int() if entries.stride(-1) == 1 else entries.int().contiguous()


def run(name: str, *arguments: Tensor | int | float | None) -> None:
    """Call a C++ kernel with the addresses of tensors, a null pointer for None, int64_t for int, float for float.

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


@dataclass(frozen=True)
class _Recipe:
    """How the library of these sources, this compiler and this processor is built, and the name that tells it from others."""

    name: str
    compiler: list[str]
    sources: list[Path]
    runtime: Path | None

    @classmethod
    def of_this_machine(cls) -> _Recipe:
        """Raises FileNotFoundError without a compiler, subprocess.SubprocessError where it does not even tell its version."""
        compiler = shlex.split(os.environ.get("CXX", "")) or [_compiler()]
        # -march=native: a home directory may be shared by machines with different processors
        told = _output_of([*compiler, "--version"])
        runtime = _openmp_runtime()
        sources = sorted(SOURCES.rglob("*.cpp"))
        texts = [file.read_text() for file in (*sources, *sorted(SOURCES.rglob("*.h")))]
        parts = (*texts, *compiler, told, *FLAGS, str(runtime), platform.machine(), _processor())
        digest = hashlib.sha256(chr(0).join(parts).encode()).hexdigest()
        return cls(f"native-{digest[:16]}.so", compiler, sources, runtime)

    def build(self, folder: Path) -> Path:
        """Compile in `folder`, and append to the library the digest by which `_whole` knows it."""
        compiled, linked = [folder / f"{source.stem}.o" for source in self.sources], folder / self.name
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # of waiting: compilers are processes
            command = [*self.compiler, *FLAGS, "-c"]
            list(pool.map(_output_of, ([*command, str(source), "-o", str(out)] for source, out in zip(self.sources, compiled))))
        openmp = str(self.runtime) if self.runtime else "-fopenmp"
        _output_of([*self.compiler, "-shared", *map(str, compiled), "-o", str(linked), openmp])
        content = linked.read_bytes()
        linked.write_bytes(content + hashlib.sha256(content).digest())
        return linked


def _built(recipe: _Recipe, folder: Path) -> ctypes.CDLL:
    """Compile into `folder`, over what may lie there damaged. Of processes that want it at once one builds it.

    It appears under its name at once and whole.

    Raises:
        OSError: the folder cannot be written, or the library cannot be loaded from it.
        subprocess.SubprocessError: the compiler failed.
    """
    path = folder / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    with _lock_on(folder) as locked:
        if locked:
            for left in folder.glob("building-*"):  # by processes that were killed
                shutil.rmtree(left, ignore_errors=True)
        if (found := _whole(path)) is not None:  # by another process, meanwhile
            return found
        with tempfile.TemporaryDirectory(dir=folder, prefix="building-") as building:
            linked = recipe.build(Path(building))
            if path.is_dir() and not path.is_symlink():
                path.rename(Path(building, "displaced"))
            linked.replace(path)
    return ctypes.CDLL(str(path))


def _whole(path: Path) -> ctypes.CDLL | None:
    """The library at `path`, or None where none can be read, or its digest is wrong: a truncated one may load and crash later.

    Raises:
        OSError: it is whole, and cannot be loaded: another one could not either.
    """
    try:
        content = path.read_bytes()
    except OSError:
        return None
    whole = hashlib.sha256(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]
    return ctypes.CDLL(str(path)) if whole else None


@contextmanager
def _lock_on(folder: Path) -> Iterator[bool]:
    """Holds a lock that other processes wait for, or False: one has held it for LOCK_TIMEOUT_S and may have been stopped, or
    the file system has no locks (some networks' have none). Two that build do each other no harm.

    The kernel takes the lock from a process that is killed.
    """
    file = os.open(folder, os.O_RDONLY)
    locked, deadline = False, time.monotonic() + LOCK_TIMEOUT_S
    try:
        with suppress(OSError):
            while not locked and time.monotonic() < deadline:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    locked = True
                except BlockingIOError:
                    time.sleep(0.1)
        yield locked
    finally:
        os.close(file)


def _output_of(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILER_TIMEOUT_S).stdout


def _compiler() -> str:
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return found
    raise FileNotFoundError("no C++ compiler (c++, g++ or clang++) is on the PATH; install one, or name it in CXX")


def _cache_folders() -> Iterator[Path]:
    """Where the library may lie, the best place first; they need not exist.

    ~/.cache/distributed_sparse (XDG_CACHE_HOME goes first), and for who has no home, or one that cannot be written, this
    user's folder for temporary files.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if home.is_absolute():
        yield home / "distributed_sparse"
    shared = Path(tempfile.gettempdir(), f"distributed_sparse-{os.getuid()}")
    with suppress(FileExistsError):
        shared.mkdir(mode=0o700)
    found = shared.lstat()
    # what lies there is loaded into this process: nobody else may write it
    private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    yield shared if private else Path(tempfile.mkdtemp(prefix="distributed_sparse-"))


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
