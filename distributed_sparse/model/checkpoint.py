"""checkpoint: where a model's files are, which of them hold weights, and a fingerprint by which unequal copies are told."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

LOAD_FORMATS = ("auto", "dummy")

# What a hub id may look like: `name` or `organisation/name`. Anything else is meant as a path.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
_DESCRIPTION_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "tokenizer*"]
# `consolidated*` and `original/` repeat the same weights under other names.
_REPEATED_FILES = ["consolidated*", "original/*"]
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def absolute_path(name: str) -> str:
    """The absolute path of what lies on this node under `name`, with `~` expanded; `name` itself if nothing does (a hub id).

    Other processes have another working directory, and this one may change its own.
    """
    path = Path(os.path.expanduser(name))
    return str(path.absolute()) if path.exists() else name


def resolve_checkpoint(model: str, load_format: str = "auto") -> Path:
    """The local directory of a checkpoint, downloaded first where ``model`` is a Hugging Face hub id.

    Args:
        model: a directory, or a hub id such as ``Qwen/Qwen3-0.6B``. Of a hub repository only ``*.safetensors``, JSON and
            tokenizer files are fetched.
        load_format: ``auto``, or ``dummy``, which needs config.json but no weights.

    Raises:
        ValueError: no such directory or hub repository (names this node, since each node needs the files); no config.json;
            weights only as pickles.
    """
    if load_format not in LOAD_FORMATS:
        raise ValueError(f"load_format={load_format!r} is unknown; use one of {', '.join(LOAD_FORMATS)}")
    path = Path(os.path.expanduser(model))
    if not path.is_dir():
        path = _download(model, path, load_format)
    if not (path / "config.json").is_file():
        raise ValueError(
            f"no config.json in {path} on node {socket.gethostname()}; give the folder of a Hugging Face checkpoint"
        )
    if load_format == "auto" and not _has_any(path, "*.safetensors") and _has_any(path, *_PICKLES):
        raise ValueError(
            f"only safetensors are read, and {path} holds pickled weights alone; convert it with "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    return path


def _download(model: str, path: Path, load_format: str) -> Path:
    node = socket.gethostname()
    if path.exists():
        raise ValueError(f"{path} on node {node} is a file; give the folder of a Hugging Face checkpoint")
    if not _HUB_ID.fullmatch(model):
        raise ValueError(f"no folder {path} on node {node}; every node needs the checkpoint at the same path")
    patterns = _DESCRIPTION_FILES + (["*.safetensors"] if load_format == "auto" else [])
    try:
        return Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns=_REPEATED_FILES))
    except Exception as error:
        # The hub client has a dozen unrelated exception classes; the user's question is the same for each.
        raise ValueError(
            f"{model!r} is no folder on node {node}, and the Hugging Face hub did not give it: {type(error).__name__}: {error}"
        ) from error


def _has_any(path: Path, *patterns: str) -> bool:
    return any(True for pattern in patterns for _ in path.glob(pattern))


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that hold the model: model.safetensors, else those of the index, else all that there are.

    Raises:
        ValueError: there is none, or the index names one that is absent (node and path are named).
    """
    whole = path / "model.safetensors"
    index = path / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        try:
            files = sorted({path / name for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{index} is no index of safetensors: {type(error).__name__}: {error}") from error
        for file in files:
            if not file.is_file():
                raise ValueError(f"{index.name} names {file.name}, which is absent on node {socket.gethostname()}: {file}")
        return files
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"no *.safetensors in {path} on node {socket.gethostname()}; "
            "download them, or use load_format='dummy' for random weights"
        )
    return files


class TensorFiles:
    """The tensors of a checkpoint, by name, across its safetensors files. A context manager: it holds the files open."""

    def __init__(self, path: Path) -> None:
        self.file_of: dict[str, Path] = {}
        """Tensor name -> the file that holds it."""
        self._open: dict[Path, Any] = {}
        with ExitStack() as stack:
            for file in weight_files(path):
                try:
                    self._open[file] = stack.enter_context(safe_open(file, framework="pt"))
                except (SafetensorError, OSError) as error:
                    raise ValueError(f"{file} cannot be read as safetensors: {error}") from error
                for name in self._open[file].keys():  # noqa: SIM118 - a safe_open, not a dict
                    self.file_of[name] = file
            self._stack = stack.pop_all()

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def tensor(self, name: str) -> Any:
        """The lazy slice of a tensor: get_shape(), get_dtype(), and indexing, which reads only what is asked for."""
        return self._open[self.file_of[name]].get_slice(name)

    def headers(self) -> Iterator[tuple[str, str, tuple[int, ...], str]]:
        """(name, safetensors dtype, shape, file name) of every tensor, sorted by name; no weights are read."""
        for name in sorted(self.file_of):
            tensor = self.tensor(name)
            yield name, tensor.get_dtype(), tuple(tensor.get_shape()), self.file_of[name].name


def weights_fingerprint(path: Path, load_format: str = "auto") -> str:
    """A hash of config.json, of the weights' names, dtypes and shapes, and of the files' sizes.

    Cheap: headers only. Ranks whose fingerprints differ read different checkpoints and must not be joined.

    Returns:
        64 hexadecimal digits. With ``load_format="dummy"`` only config.json counts.
    """
    digest = hashlib.sha256()
    digest.update((path / "config.json").read_bytes())
    if load_format == "auto":
        with TensorFiles(path) as tensors:
            for header in tensors.headers():
                digest.update(repr(header).encode())
            for file in sorted(set(tensors.file_of.values())):
                digest.update(f"{file.name} {file.stat().st_size}".encode())
    return digest.hexdigest()
