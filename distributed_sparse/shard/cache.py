"""PagedCache: this rank's pages of K and V in every layer, with the metadata that each layer's method asked for."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from distributed_sparse.selection.base import Policy
from distributed_sparse.selection.metadata import Geometry, LayerCache


class PagedCache:
    """Pages of all layers. Which sequence holds which page is the Driver's affair; page 0 is the null page."""

    def __init__(self, num_pages: int, geometry: Geometry, policies: list[Policy]) -> None:
        self.num_pages = num_pages
        self.layers = [
            LayerCache.allocate(layer, num_pages, geometry, policy.metadata) for layer, policy in enumerate(policies)
        ]

    @staticmethod
    def page_bytes(geometry: Geometry, policies: list[Policy]) -> tuple[int, int]:
        """Bytes of one page over all layers: (K and V, metadata)."""
        tokens = geometry.num_kv_heads * geometry.page_size * geometry.head_dim
        on_paper = replace(geometry, device=torch.device("meta"))
        kept = [tensor for policy in policies for kind in policy.metadata for tensor in kind.allocate(1, on_paper).values()]
        metadata = sum(tensor.nbytes for tensor in kept)
        return len(policies) * 2 * tokens * geometry.dtype.itemsize, metadata

    def copy_pages(self, source: Tensor, target: Tensor) -> None:
        """Copy whole pages, int64 [C] both, with their metadata, in every layer. All are read before any is written."""
        for layer in self.layers:
            for pages in layer.pages:
                pages.index_copy_(0, target, pages.index_select(0, source))
