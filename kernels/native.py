"""native: C++ kernels for CPUs, compiled on first use with the machine's C++ compiler and cached on disk.

Without a compiler the torch implementations of the same ops run instead: same results, slower.
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
"""Time limit for compiling one file."""
LOCK_TIMEOUT_S = 900.0
"""How long to wait for another process that compiles the same library."""
DIGEST_BYTES = 32
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None if they cannot be built (logs one warning).

    DISTRIBUTED_SPARSE_NATIVE=0 disables them.
    """
    if os.environ.get("DISTRIBUTED_SPARSE_NATIVE", "1") == "0":
        return None
    problem: Exception | None = None
    try:
        recipe = _Recipe.of_this_machine()
        for folder in _cache_folders():
            try:
                return _whole(folder / recipe.name) or _built(recipe, folder)
            except (OSError, subprocess.SubprocessError) as error:  # not writable, full, or mounted noexec
                problem = error
    except (OSError, subprocess.SubprocessError) as error:
        problem = error
    reason = problem.stderr.strip() if isinstance(problem, subprocess.CalledProcessError) else problem
    logger.warning("the C++ CPU kernels could not be built; using the slower torch implementations: %s", reason)
    return None


def serves(x: Tensor) -> bool:
    """Whether the C++ kernels take this tensor: on the CPU, last dimension a multiple of 16.

    Always False on processors without AVX-512, where compilers spill vectors of 16 floats to memory and torch is faster.
    """
    return x.shape[-1] % 16 == 0 and has_wide_vectors() and available(x)


def available(x: Tensor) -> bool:
    """Whether the C++ kernels that use no float vectors take this tensor: it is on the CPU."""
    return x.device.type == "cpu" and library() is not None


@functools.cache
def has_wide_vectors() -> bool:
    """Whether a register holds 16 floats (AVX-512). DISTRIBUTED_SPARSE_NATIVE=1 forces True."""
    return os.environ.get("DISTRIBUTED_SPARSE_NATIVE") == "1" or "avx512f" in _processor().split()


def listed(entries: Tensor) -> Tensor:
    """int32 with stride 1 in the last dimension, as the kernels expect of a list; the other strides are free."""
    return entries.int() if entries.stride(-1) == 1 else entries.int().contiguous()


def run(name: str, *arguments: Tensor | int | float | None) -> None:
    """Call a C++ kernel. Passes a tensor as its address, None as a null pointer, int as int64_t, float as float.

    Appends torch's number of threads as the last argument.
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
    """How to build the library. Its name is a hash of the sources, the compiler, the flags and the processor."""

    name: str
    compiler: list[str]
    sources: list[Path]
    runtime: Path | None

    @classmethod
    def of_this_machine(cls) -> _Recipe:
        """Raises FileNotFoundError without a compiler, subprocess.SubprocessError if `compiler --version` fails."""
        compiler = shlex.split(os.environ.get("CXX", "")) or [_compiler()]
        # the processor is part of the hash: -march=native, and machines with different processors may share a home directory
        version = _output_of([*compiler, "--version"])
        runtime = _openmp_runtime()
        sources = sorted(SOURCES.rglob("*.cpp"))
        texts = [file.read_text() for file in (*sources, *sorted(SOURCES.rglob("*.h")))]
        parts = (*texts, *compiler, version, *FLAGS, str(runtime), platform.machine(), _processor())
        digest = hashlib.sha256(chr(0).join(parts).encode()).hexdigest()
        return cls(f"native-{digest[:16]}.so", compiler, sources, runtime)

    def build(self, folder: Path) -> Path:
        """Compile in `folder` and append the SHA-256 digest that `_whole` verifies."""
        compiled, linked = [folder / f"{source.stem}.o" for source in self.sources], folder / self.name
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads only wait for compiler processes
            command = [*self.compiler, *FLAGS, "-c"]
            list(pool.map(_output_of, ([*command, str(source), "-o", str(out)] for source, out in zip(self.sources, compiled))))
        openmp = str(self.runtime) if self.runtime else "-fopenmp"
        _output_of([*self.compiler, "-shared", *map(str, compiled), "-o", str(linked), openmp])
        content = linked.read_bytes()
        linked.write_bytes(content + hashlib.sha256(content).digest())
        return linked


def _built(recipe: _Recipe, folder: Path) -> ctypes.CDLL:
    """Compile into `folder`, replacing a damaged file of the same name. Concurrent processes build it only once.

    The finished library is renamed into place atomically.

    Raises:
        OSError: the folder cannot be written, or the library cannot be loaded from it.
        subprocess.SubprocessError: the compiler failed.
    """
    path = folder / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    with _lock_on(folder) as locked:
        if locked:
            for left in folder.glob("building-*"):  # left by killed processes
                shutil.rmtree(left, ignore_errors=True)
        if (found := _whole(path)) is not None:  # built by another process in the meantime
            return found
        with tempfile.TemporaryDirectory(dir=folder, prefix="building-") as building:
            linked = recipe.build(Path(building))
            if path.is_dir() and not path.is_symlink():
                path.rename(Path(building, "displaced"))
            linked.replace(path)
    return ctypes.CDLL(str(path))


def _whole(path: Path) -> ctypes.CDLL | None:
    """The library at `path`, or None if it is unreadable or its digest is wrong (a truncated library may load and crash later).

    Raises:
        OSError: the file is intact but cannot be loaded; rebuilding would not help.
    """
    try:
        content = path.read_bytes()
    except OSError:
        return None
    whole = hashlib.sha256(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]
    return ctypes.CDLL(str(path)) if whole else None


@contextmanager
def _lock_on(folder: Path) -> Iterator[bool]:
    """Lock a folder against other processes; yields whether the lock was taken.

    False after LOCK_TIMEOUT_S (its holder may be stopped), or on a file system without locks (some network file systems).
    Building without the lock is safe, only redundant. The kernel releases the lock of a killed process.
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
    """Candidate folders for the library, preferred first; they need not exist.

    $XDG_CACHE_HOME/distributed_sparse or ~/.cache/distributed_sparse; then, for a user without a writable home directory, a
    per-user folder under the system's temporary directory.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if home.is_absolute():
        yield home / "distributed_sparse"
    shared = Path(tempfile.gettempdir(), f"distributed_sparse-{os.getuid()}")
    with suppress(FileExistsError):
        shared.mkdir(mode=0o700)
    found = shared.lstat()
    # files there are loaded into this process, so nobody else may have write access
    private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    yield shared if private else Path(tempfile.mkdtemp(prefix="distributed_sparse-"))


def _openmp_runtime() -> Path | None:
    """The OpenMP library that torch has loaded. A second one would start its own threads, which compete for the cores."""
    try:
        mapped = Path("/proc/self/maps").read_text().split()
    except OSError:
        return None
    found = (
        Path(name) for name in mapped if name.startswith("/") and Path(name).name.startswith(("libgomp", "libiomp5", "libomp"))
    )
    return next(found, None)


def _processor() -> str:
    """The CPU flags of the first core in /proc/cpuinfo, which identify the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
