"""cache: one rank's paged KV cache: K and V of each layer, and the `Metadata` that each layer's method stores per page."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distributed_sparse.kernels.cache.append import append, rotary_append
from distributed_sparse.kernels.huge_pages import zeros


@dataclass(frozen=True)
class Geometry:
    """The shape of one rank's attention and cache."""

    num_kv_heads: int
    group_size: int
    head_dim: int
    page_size: int
    dtype: torch.dtype
    device: torch.device
    first_kv_head: int
    """Global index of this rank's first KV head. Random numbers are keyed by the global head."""
    model_kv_heads: int | None = None
    """KV heads of the whole model, to check the shape of a method's weight file; None: not checked."""

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)


class Metadata(ABC):
    """What a method stores per page beside K and V. Describes the tensors and how they are written; the `LayerCache` owns them.

    A page's metadata must be a pure function of the page's content: samples of one request share pages, pages are copied with
    their metadata, and a preempted sequence is computed again. Metadata that also depends on queries sets `changes_when_read`.
    """

    changes_when_read: ClassVar[bool] = False
    """True if a policy's `select` writes to it. Then samples of one request copy their pages instead of sharing them."""

    @abstractmethod
    def allocate(self, num_pages: int, geometry: Geometry) -> dict[str, Tensor]:
        """The tensors of one layer by name, each [num_pages, ...]. Also called on the meta device, to count their bytes."""

    def constants(self, layer: int, geometry: Geometry) -> dict[str, Tensor]:
        """Tensors that belong to the layer and not to a page, by name: learned weights, offsets.

        Raises:
            ValueError: a file named in the settings lacks them.
        """
        return {}

    def bytes_per_token(self, geometry: Geometry) -> int:
        """Bytes written per appended token and layer: a token's share of a page, unless an append rewrites more."""
        on_paper = self.allocate(1, replace(geometry, device=torch.device("meta")))
        return sum(tensor.nbytes for tensor in on_paper.values()) // geometry.page_size

    def append(self, cache: LayerCache, k: Tensor, runs: AppendRuns) -> None:  # noqa: B027
        """Update the metadata for new tokens; K and V are already in the pages.

        Pages are reused without clearing: a run with `offset == 0` starts its page anew and resets the page's metadata. A run
        of count 0 changes nothing. `PageMinMax` and `QuantizedKeys` do not override this: the append kernel writes them.

        Args:
            cache: the layer's cache; this metadata's tensors are in `cache.metadata`.
            k: [N, H_kv, d] post-RoPE keys of the batch.
            runs: the pages and offsets that the keys were written to.
        """


@dataclass(frozen=True)
class AppendRuns:
    """Where a batch's N tokens are written, as T runs of consecutive tokens: see `kernels/cache/append.py`. Each int32 [T].

    A run never crosses a page. No page occurs in two runs, except the null page 0, whose content is never used.
    """

    pages: Tensor
    """Physical page of each run."""
    starts: Tensor
    """Index of the run's first token in the batch; ascending."""
    offsets: Tensor
    """First offset written in the page; 0 resets the page's metadata."""
    counts: Tensor
    """Tokens of the run; 0 for a padded row."""

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In the order of the kernels' arguments."""
        return self.pages, self.starts, self.offsets, self.counts


@dataclass(frozen=True)
class PageMinMax(Metadata):
    """Channel-wise min and max of a page's keys: [num_pages, H_kv, 2, d] in the cache's dtype, so exact (Quest)."""

    def allocate(self, num_pages: int, geometry: Geometry) -> dict[str, Tensor]:
        shape = (num_pages, geometry.num_kv_heads, 2, geometry.head_dim)
        return {"page_min_max": zeros(shape, geometry.dtype, geometry.device)}

    def bytes_per_token(self, geometry: Geometry) -> int:
        return geometry.num_kv_heads * 2 * geometry.head_dim * geometry.dtype.itemsize


@dataclass(frozen=True)
class QuantizedKeys(Metadata):
    """A low-bit copy of every key: codes, and an fp16 scale and minimum per (token, KV head) (Twilight, section 4.2).

    bits: 2, 4 or 8 per channel.
    offsets: safetensors file with `model.layers.{i}.key_offset` [H_kv of the model, d], subtracted from the keys before they
        are quantised. It is the same for all keys of a row, so the softmax does not change. None: nothing is subtracted.
    """

    bits: int = 4
    offsets: str | None = None

    def allocate(self, num_pages: int, geometry: Geometry) -> dict[str, Tensor]:
        shape = (num_pages, geometry.num_kv_heads, geometry.page_size)
        return {
            "key_codes": zeros((*shape, geometry.head_dim * self.bits // 8), torch.uint8, geometry.device),
            "key_scales": zeros((*shape, 2), torch.float16, geometry.device),
        }

    def constants(self, layer: int, geometry: Geometry) -> dict[str, Tensor]:
        """key_offset: float32 [H_kv, d]."""
        if self.offsets is None:
            return {}
        heads = slice(geometry.first_kv_head, geometry.first_kv_head + geometry.num_kv_heads)
        name = f"model.layers.{layer}.key_offset"
        offset = read_tensor(self.offsets, name, heads, geometry.head_dim, num_heads=geometry.model_kv_heads)
        return {"key_offset": offset.to(geometry.device)}


@dataclass
class LayerCache:
    """One layer's cache on one rank: K and V [num_pages, H_kv, page_size, d] and the metadata of the layer's method.

    kinds:     the method's `Metadata` objects.
    metadata:  name -> [num_pages, ...]; copied with its page.
    constants: name -> tensor of the layer, see `Metadata.constants`.
    """

    layer: int
    k_pages: Tensor
    v_pages: Tensor
    kinds: tuple[Metadata, ...] = ()
    metadata: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def allocate(layer: int, num_pages: int, geometry: Geometry, kinds: tuple[Metadata, ...]) -> LayerCache:
        """An empty cache of one layer. Raises ValueError like `Metadata.constants`."""
        shape = (num_pages, geometry.num_kv_heads, geometry.page_size, geometry.head_dim)
        cache = LayerCache(
            layer,
            zeros(shape, geometry.dtype, geometry.device),
            zeros(shape, geometry.dtype, geometry.device),
            kinds,
        )
        for kind in kinds:
            cache.metadata |= kind.allocate(num_pages, geometry)
            cache.constants |= kind.constants(layer, geometry)
        return cache

    def append(self, k: Tensor, v: Tensor, runs: AppendRuns) -> None:
        """Write a batch's post-RoPE k and v [N, H_kv, d] into their pages, and update the metadata."""
        append(k, v, *runs.columns, self.k_pages, self.v_pages, *self._kernel_metadata)
        for kind in self.kinds:
            kind.append(self, k, runs)

    def rotary_append(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, runs: AppendRuns) -> Tensor:
        """Rotate a batch's q [N, H_q, d] and k [N, H_kv, d] by cos and sin (float32 [N, d/2]), then append as in `append`.

        Returns:
            Rotated q.
        """
        keepers = [kind for kind in self.kinds if type(kind).append is not Metadata.append]
        q, rotated = rotary_append(
            q,
            k,
            v,
            cos,
            sin,
            *runs.columns,
            self.k_pages,
            self.v_pages,
            *self._kernel_metadata,
            return_keys=bool(keepers),
        )
        for kind in keepers:
            assert rotated is not None
            kind.append(self, rotated, runs)
        return q

    def read(self, pages: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        """K and V [end - start, H_kv, d] of consecutive tokens.

        Args:
            pages: int64 [P], physical page ids in logical order.
            start, end: range of tokens, counted from the first one of pages[0].
        """
        k, v = (
            cached.index_select(0, pages).transpose(1, 2).flatten(0, 1)[start:end] for cached in (self.k_pages, self.v_pages)
        )
        return k, v

    @property
    def _kernel_metadata(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """The metadata arguments of the append kernels."""
        kept = self.metadata.get
        return kept("page_min_max"), kept("key_codes"), kept("key_scales"), self.constants.get("key_offset")

    @property
    def pages(self) -> list[Tensor]:
        """All tensors that are stored per page, each [num_pages, ...]."""
        return [self.k_pages, self.v_pages, *self.metadata.values()]


def read_tensor(path: str, name: str, heads: slice, *shape: int | None, num_heads: int | None) -> Tensor:
    """Some heads of a tensor [num_heads, *shape] in a safetensors file, as float32. None in the shape allows any size.

    Raises:
        ValueError: the file or the tensor is missing, or has another shape; names the file, the tensor and the shape.
    """
    try:
        with safe_open(path, framework="pt") as file:
            if name not in file.keys():  # noqa: SIM118
                raise ValueError(f"{path} has no tensor {name!r}; docs/methods describes the file")
            part = file.get_slice(name)
            found, wanted = part.get_shape(), (num_heads, *shape)
            fits = len(found) == len(wanted) and all(size in (None, own) for own, size in zip(found, wanted))
            if not fits or found[0] < heads.stop:
                sizes = ["any" if size is None else size for size in wanted]
                raise ValueError(f"{name!r} in {path} has shape {found}, but this model needs {sizes}; is it another model's?")
            return part[heads.start : heads.stop].float()
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


class PagedCache:
    """Pages of all layers of one rank. The Driver decides which sequence holds which page; page 0 is the null page.

    Args:
        kinds: the metadata of each layer's method.
    """

    def __init__(self, num_pages: int, geometry: Geometry, kinds: Sequence[tuple[Metadata, ...]]) -> None:
        self.num_pages = num_pages
        self.layers = [LayerCache.allocate(layer, num_pages, geometry, own) for layer, own in enumerate(kinds)]

    @staticmethod
    def page_bytes(geometry: Geometry, kinds: Sequence[tuple[Metadata, ...]]) -> tuple[int, int]:
        """Bytes of one page over all layers: (K and V, metadata)."""
        tokens = geometry.num_kv_heads * geometry.page_size * geometry.head_dim
        on_paper = replace(geometry, device=torch.device("meta"))
        kept = [tensor for own in kinds for kind in own for tensor in kind.allocate(1, on_paper).values()]
        metadata = sum(tensor.nbytes for tensor in kept)
        return len(kinds) * 2 * tokens * geometry.dtype.itemsize, metadata

    def copy_pages(self, source: Tensor, target: Tensor) -> None:
        """Copy whole pages, int64 [C] both, with their metadata, in every layer. All are read before any is written."""
        for layer in self.layers:
            for pages in layer.pages:
                pages.index_copy_(0, target, pages.index_select(0, source))
