"""PrefillStore: one rank's prefilled chunks on disk, which later engines read instead of computing them.

A chunk's file holds, per token, what the chunk appends to the cache with any method (K and V of this rank's heads, after the
rotary embedding) and the final hidden states, from which logits are computed. Appending K and V writes a method's metadata as
usual.

With a store, the decode rows and each chunk of a step run through the layers separately. The bits of a chunk then depend on its
own sequence alone, and the file's key covers all of that: a chunk read from a file equals the chunk computed.
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
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from distributed_sparse.cache import AppendRuns, Geometry, PagedCache
from distributed_sparse.kernels import native
from distributed_sparse.model.transformer import Transformer
from distributed_sparse.protocol.step import PrefillChunk, StepPlan, StepResult
from distributed_sparse.shard.batch import build_layout, make_batch
from distributed_sparse.utils.versions import versions

if TYPE_CHECKING:
    from distributed_sparse.shard.shard import Shard

logger = logging.getLogger(__name__)

FREE_SHARE = 0.01
"""Share of its file system that the store leaves free."""

Tensors = Mapping[str, Tensor]
"""Of a chunk: `keys`, `values` [layers, n, H_kv, d], `hidden` [n, D]."""


class PrefillStore:
    """One rank's files in a folder. Several processes may use the same folder at once.

    Args:
        folder: exists (`check_folder`).
        identity: the `fingerprint` of every rank, concatenated; equal on all ranks.
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
        self._prefixes: dict[int, tuple[int, bytes]] = {}  # slot -> tokens prefilled, digest of their chunks
        self._writes = True

    def key(self, chunk: PrefillChunk, prefill_length: int) -> str | None:
        """The file name of a chunk, the same on every rank. Call it for every chunk that runs, in order.

        It hashes the weights and everything else that decides the bits, all tokens up to the chunk's end, and the borders of
        their chunks. None if a token before the chunk was not prefilled in a chunk that has a key.

        Args:
            prefill_length: of the slot; matters only if the rotary embedding depends on it.
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
        """The chunk of a key, on the CPU; None if its file is missing or damaged."""
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
        """Write the file of a chunk that has just been computed. The first write error is logged and stops all further writes.

        Args:
            cache: holds the chunk's K and V.
            pages: the sequence's pages, in logical order.
            start: position of the chunk's first token.
            hidden: [n, D] the chunk's final hidden states.
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

    def forward(self, shard: Shard, plan: StepPlan, result: StepResult) -> Tensor:
        """Run the decode rows, then each prompt chunk separately; a chunk that all ranks have on disk is read instead.

        Returns:
            Hidden states [N, D] of the step plan's tokens, in its order.
        """
        page_size, slots, inputs = self._geometry.page_size, shard.slots, shard.inputs
        keys = [self.key(chunk, int(slots.prefill_length[chunk.slot])) for chunk in plan.prefill]
        stored = [self.find(key, chunk.num_tokens) for key, chunk in zip(keys, plan.prefill)]
        is_found = shard.collectives.agree([chunk is not None for chunk in stored])
        hidden = []
        if plan.decode:
            rows = StepPlan(plan.step, plan.generation, decode=plan.decode)
            layout = build_layout(rows, slots, page_size)
            hidden.append(shard.forward_eager(rows, layout, inputs.upload(layout.arrays), result))
        for index, chunk in enumerate(plan.prefill):
            alone = StepPlan(plan.step, plan.generation, prefill=[chunk])
            layout = build_layout(alone, slots, page_size)
            views = inputs.upload(layout.arrays)
            found = stored[index]
            if is_found[index] and found is not None:
                hidden.append(self.append(found, shard.cache, make_batch(layout, views, slots, page_size).runs))
                result.prefill_from_store += chunk.num_tokens
            else:
                hidden.append(shard.forward_eager(alone, layout, views, result))
                self.keep(keys[index], shard.cache, slots.host_page_table[chunk.slot], chunk.start, hidden[-1])
        return torch.cat(hidden)

    @staticmethod
    def append(chunk: Tensors, cache: PagedCache, runs: AppendRuns) -> Tensor:
        """Append a chunk's K and V in every layer, as computing it would; return its final hidden states, on the device."""
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
    """Create the folder if it is missing. Raises ValueError, naming the node, if it cannot be written to."""
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
    """32 bytes that identify what decides this rank's bits, tokens aside.

    Hashes every bit of its weights, the model's config, software versions, processor and threads.
    """
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
    """CRC-32 of a file's name and content."""
    found = zlib.crc32(name.encode())
    for tensor in (chunk[key] for key in sorted(chunk)):
        found = zlib.crc32(_bytes(tensor), found)
    return found


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).cpu().numpy().data
