"""checkpoint: finds or downloads a model's files, reads tensors from them, and fingerprints them to compare copies."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from distributed_sparse.utils.validation import shown

LOAD_FORMATS = ("auto", "dummy")

# A hub id: `name` or `organisation/name`. Anything else is a path.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
_DESCRIPTION_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "tokenizer*"]
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Never read: the same weights under other names (Mistral's format), and adapters (LoRA).
_OTHER_WEIGHTS = ("consolidated*", "adapter_model*")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def absolute_path(name: str) -> str:
    """The absolute path of `name` on this node, with `~` expanded; `name` itself if there is no such path (a hub id).

    Absolute, as other processes have other working directories, and this one may change its own.
    """
    path = Path(os.path.expanduser(name))
    return str(path.absolute()) if path.exists() else name


def resolve_checkpoint(model: str, load_format: str = "auto") -> Path:
    """The local directory of a checkpoint; downloads it first if ``model`` is a Hugging Face hub id.

    Args:
        model: a directory, or a hub id such as ``Qwen/Qwen3-0.6B``. From a hub repository, only JSON and tokenizer files and
            the safetensors files that `TensorFiles` reads are downloaded.
        load_format: ``auto``, or ``dummy``, which needs config.json but no weights.

    Raises:
        ValueError: no such directory or hub repository (names this node, as every node needs the files); no config.json;
            weights only as pickles.
    """
    if load_format not in LOAD_FORMATS:
        raise ValueError(f"load_format={load_format!r} is unknown; use one of {', '.join(LOAD_FORMATS)}")
    path = Path(os.path.expanduser(model))
    if not path.is_dir():
        path = _download(model, path, load_format)
    if not (path / "config.json").is_file():
        raise ValueError(f"no config.json in {path} on node {platform.node()}; give the folder of a Hugging Face checkpoint")
    if load_format == "auto" and not _has_any(path, "*.safetensors") and _has_any(path, *_PICKLES):
        raise ValueError(
            f"{path} holds only pickled weights, but only safetensors are supported; convert it with "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    return path


def _download(model: str, path: Path, load_format: str) -> Path:
    node = platform.node()
    if path.exists():
        raise ValueError(f"{path} on node {node} is a file; give the folder of a Hugging Face checkpoint")
    if not _HUB_ID.fullmatch(model):
        raise ValueError(f"no folder {path} on node {node}; every node needs the checkpoint at the same path")
    folder = _snapshot(model, _DESCRIPTION_FILES)
    if load_format == "dummy":
        return folder
    revision = folder.name  # a snapshot's folder is named by its commit; take the weights from the same commit
    if weight_map := _weight_map(folder):
        return _snapshot(model, sorted(set(weight_map.values())), revision, ignored=[])
    folder = _snapshot(model, [_WHOLE], revision)
    return folder if (folder / _WHOLE).is_file() else _snapshot(model, ["*.safetensors"], revision)


def _snapshot(
    model: str, patterns: list[str], revision: str | None = None, ignored: Sequence[str] = ("*/*", *_OTHER_WEIGHTS)
) -> Path:
    """Download files of a hub repository; by default only top-level ones, as folders repeat the weights in other formats."""
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=list(ignored)))
    except Exception as error:
        # The hub client raises a dozen unrelated exception classes.
        raise ValueError(
            f"{model!r} is not a folder on node {platform.node()}, and downloading it from the Hugging Face hub failed: "
            f"{type(error).__name__}: {error}"
        ) from error


def _has_any(path: Path, *patterns: str) -> bool:
    return any(True for pattern in patterns for _ in path.glob(pattern))


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ValueError: it is not valid JSON, or not an object; names the file.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not an object")
    return content


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> file name relative to `path`, from the index file; empty without one."""
    file = path / _INDEX
    if not file.is_file():
        return {}
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{file}: weight_map={shown(weight_map)} must be an object of tensor names and file names")
    for name, value in weight_map.items():
        if not isinstance(value, str) or not value or PurePosixPath(value).is_absolute() or ".." in PurePosixPath(value).parts:
            raise ValueError(f"{file}: weight_map: {name}={shown(value)} must be the name of a file in {path}")
    return weight_map


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of the model: those in the index; without one, all but consolidated and adapter files.

    Raises:
        ValueError: there is none, or one in the index is absent (names node and path).
    """
    files = sorted({path / name for name in _weight_map(path).values()})
    for file in files:
        if not file.is_file():
            whole = (path / _WHOLE).is_file()
            remedy = f"delete the index if {_WHOLE} holds the whole model" if whole else "download it again"
            raise ValueError(
                f"{_INDEX} names {file.relative_to(path)}, which is absent on node {platform.node()}: {file}; {remedy}"
            )
    files = files or sorted(
        file for file in path.glob("*.safetensors") if not any(file.match(other) for other in _OTHER_WEIGHTS)
    )
    if not files:
        raise ValueError(
            f"no *.safetensors in {path} on node {platform.node()}; "
            f"download them, or use load_format='dummy' for random weights ({' and '.join(_OTHER_WEIGHTS)} are not read)"
        )
    return files


class TensorFiles:
    """The tensors of a checkpoint, by name, across its safetensors files. A context manager that keeps the files open.

    A tensor is read from the file that the index names; without an index, only from model.safetensors, as in transformers; with
    neither, from the one file that holds it.

    Raises:
        ValueError: two files hold a tensor and there is no index; the index names a file that is absent, or one that lacks the
            tensor; a file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.file_of: dict[str, Path] = {}
        """Tensor name -> the file that holds it."""
        self._open: dict[Path, Any] = {}
        weight_map = {name: path / file for name, file in _weight_map(path).items()}
        with ExitStack() as stack:
            for file in weight_files(path):
                try:
                    self._open[file] = stack.enter_context(safe_open(file, framework="pt"))
                except (SafetensorError, OSError) as error:
                    raise ValueError(f"{file} cannot be read as safetensors: {error}") from error
                for name in self._open[file].keys():  # noqa: SIM118 - a safe_open, not a dict
                    if weight_map.get(name, file) != file:
                        continue
                    if name in self.file_of:
                        raise ValueError(
                            f"tensor {name} is both in {self.file_of[name]} and in {file.name}; keep one of the two files, "
                            f"or add {_INDEX}, which names the file of each tensor"
                        )
                    self.file_of[name] = file
            self._stack = stack.pop_all()
        for name, file in weight_map.items():
            if name not in self.file_of:
                self._stack.close()
                raise ValueError(
                    f"{path / _INDEX} says that {file.name} holds tensor {name}, but it does not; download both again"
                )
        whole = path / _WHOLE
        if not weight_map and whole in self._open:
            self.file_of = {name: file for name, file in self.file_of.items() if file == whole}
        self.unread = whole if whole not in self._open and whole.is_file() else None
        """model.safetensors if it exists and is not in the index. transformers would read it instead of the index."""

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def tensor(self, name: str) -> Any:
        """A lazy slice of a tensor: get_shape(), get_dtype(), and indexing, which reads only the indexed part."""
        return self._open[self.file_of[name]].get_slice(name)

    def headers(self) -> Iterator[tuple[str, str, tuple[int, ...], str]]:
        """(name, safetensors dtype, shape, file name) of every tensor, sorted by name; reads no weights."""
        for name in sorted(self.file_of):
            tensor = self.tensor(name)
            yield name, tensor.get_dtype(), tuple(tensor.get_shape()), self.file_of[name].name


def weights_fingerprint(path: Path, load_format: str = "auto") -> str:
    """A hash of config.json, of the weights' names, dtypes and shapes, and of the files' sizes.

    Cheap, as it reads headers only. Ranks with different fingerprints have different checkpoints and must not form a group.

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
