"""PrefillStore: the files in which a rank keeps what prefill chunks computed, and finds it again in a later engine.

A chunk's file holds, per token, what the chunk appends to the cache of any method (K and V of this rank's heads, after the
rotary embedding) and the final hidden states, which logits are made of. Appending K and V writes a method's metadata as ever.

With a store, a step's decode rows and each of its chunks run through the layers apart from each other. So the bits of a chunk
depend on its own sequence alone, all of which is in the file's key: a chunk that is found equals the chunk computed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import struct
import tempfile
import uuid
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from distributed_sparse.cache import AppendRuns, Geometry, PagedCache
from distributed_sparse.kernels import native
from distributed_sparse.model.transformer import Transformer
from distributed_sparse.protocol.step import PrefillChunk
from distributed_sparse.utils.versions import versions

logger = logging.getLogger(__name__)

FREE_SHARE = 0.01
"""Share of its file system that the store leaves free."""

Tensors = Mapping[str, Tensor]
"""A chunk: `keys`, `values` [layers, n, H_kv, d], `hidden` [n, D]."""


class PrefillStore:
    """One rank's files in the folder. Several processes may use a folder at once.

    Args:
        folder: exists (`check_folder`).
        identity: `fingerprint` of every rank, joined: equal on all ranks.
        model, geometry: this rank's.
        num_layers: of the cache.
    """

    def __init__(self, folder: str, identity: bytes, model: Transformer, geometry: Geometry, num_layers: int) -> None:
        self._folder = Path(folder)
        self._identity = identity
        self._geometry = geometry
        self._num_layers = num_layers
        self._hidden_size = model.config.hidden_size
        self._rope_uses_lengths = model.rope.uses_lengths
        shard = model.sizes.shard
        self._suffix = f"{shard.rank}-of-{shard.world_size}.safetensors"
        self._prefixes: dict[int, tuple[int, bytes]] = {}  # slot -> tokens prefilled, and the digest of all chunks of them
        self._writes = True

    def key(self, chunk: PrefillChunk, prefill_length: int) -> str | None:
        """The name of a chunk, the same on every rank. Every chunk that runs is to be named, in order.

        It stands for the weights and whatever else decides the bits, and for all tokens up to the chunk's end with the borders
        of their chunks. None: what comes before the chunk was not all prefilled in named chunks.

        Args:
            prefill_length: of the slot; counts where the rotary embedding depends on it.
        """
        end, prefix = self._prefixes.pop(chunk.slot, (0, b""))
        if chunk.start == 0:
            prefix = self._identity + struct.pack("<q", prefill_length if self._rope_uses_lengths else 0)
        elif chunk.start != end:
            return None
        tokens = np.array(chunk.tokens, dtype="<i8").tobytes()
        digest = hashlib.sha256(prefix + struct.pack("<qq", chunk.start, chunk.end) + tokens)
        self._prefixes[chunk.slot] = chunk.end, digest.digest()
        return digest.hexdigest()

    def find(self, key: str | None, num_tokens: int) -> Tensors | None:
        """The chunk of that key, on the CPU; None where there is no file of it, or one that is damaged."""
        if key is None:
            return None
        path = self._path(key)
        try:
            chunk = load(path.read_bytes())
            if int(chunk.pop("checksum")) == checksum(path.name, chunk) and self._fits(chunk, num_tokens):
                return chunk
            error: Any = "its checksum or its shapes are wrong"
        except FileNotFoundError:
            return None
        except Exception as raised:  # a damaged header makes the reader raise anything
            error = raised
        logger.warning("prefill_store: %s cannot be used, its chunk is computed again: %s", path, error)
        return None

    def keep(self, key: str | None, cache: PagedCache, pages: NDArray[np.int32], start: int, hidden: Tensor) -> None:
        """Write the file of a chunk that has just been computed. If it cannot be written, that is logged once and no more are.

        Args:
            cache: holds the chunk's K and V.
            pages: of its sequence, in logical order.
            start: position of its first token.
            hidden: [n, D] its final hidden states.
        """
        if key is None or not self._writes:
            return
        path = self._path(key)
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            chunk = self._computed(cache, pages, start, hidden)
            usage = shutil.disk_usage(self._folder)
            if usage.free - sum(tensor.nbytes for tensor in chunk.values()) < FREE_SHARE * usage.total:
                raise OSError(f"less than {FREE_SHARE:.0%} of its file system would be free")
            save_file({**chunk, "checksum": torch.tensor(checksum(path.name, chunk))}, temporary)
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            self._writes = False
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            logger.warning("prefill_store=%r: no more chunks are kept: %s", str(self._folder), error)

    @staticmethod
    def append(chunk: Tensors, cache: PagedCache, runs: AppendRuns) -> Tensor:
        """Append a chunk's K and V in every layer, as computing it would; its final hidden states, on the cache's device."""
        for layer, keys, values in zip(cache.layers, chunk["keys"], chunk["values"], strict=True):
            device = layer.k_pages.device
            layer.append(keys.to(device), values.to(device), runs)
        return chunk["hidden"].to(device)

    def _computed(self, cache: PagedCache, pages: NDArray[np.int32], start: int, hidden: Tensor) -> dict[str, Tensor]:
        page_size, count = self._geometry.page_size, len(hidden)
        first, offset = divmod(start, page_size)
        own = torch.from_numpy(pages[first : -(-(start + count) // page_size)].astype(np.int64)).to(hidden.device)
        shape, dtype = self._shapes(count)["keys"], self._geometry.dtype
        keys, values = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
        for index, layer in enumerate(cache.layers):
            k, v = layer.read(own, offset, offset + count)
            keys[index].copy_(k)
            values[index].copy_(v)
        return {"keys": keys, "values": values, "hidden": hidden.cpu()}

    def _fits(self, chunk: Tensors, num_tokens: int) -> bool:
        dtypes = {tensor.dtype for tensor in chunk.values()}
        return dtypes == {self._geometry.dtype} and {n: tuple(t.shape) for n, t in chunk.items()} == self._shapes(num_tokens)

    def _shapes(self, num_tokens: int) -> dict[str, tuple[int, ...]]:
        kept = (self._num_layers, num_tokens, self._geometry.num_kv_heads, self._geometry.head_dim)
        return {"keys": kept, "values": kept, "hidden": (num_tokens, self._hidden_size)}

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.{self._suffix}"


def check_folder(folder: str) -> None:
    """Make the folder if it is not there. Raises ValueError, with the node, where it cannot be written to."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"prefill_store={folder!r} cannot be written to on node {platform.node()}: {error}; "
            "name another folder, or leave it out to compute every prompt"
        ) from error


def fingerprint(model: Transformer, geometry: Geometry, load_format: str) -> bytes:
    """32 bytes for what decides the bits that this rank computes, beside tokens: every bit of its weights, the model's config,
    software, processor and threads."""
    device = geometry.device
    described = (
        model.config,
        model.sizes.shard,
        load_format,
        geometry.dtype,
        sorted(versions().items()),
        torch.get_float32_matmul_precision(),
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else (torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), native.library() is not None),
    )
    digest = hashlib.sha256(repr(described).encode())
    for tensor in model.weights.tensors():
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(_bytes(tensor))
    return digest.digest()


def checksum(name: str, chunk: Tensors) -> int:
    """CRC-32 of a file's name and of what it holds."""
    found = zlib.crc32(name.encode())
    for tensor in (chunk[key] for key in sorted(chunk)):
        found = zlib.crc32(_bytes(tensor), found)
    return found


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).cpu().numpy().data
