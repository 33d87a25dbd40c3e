"""PagedCache: this rank's pages of K and V in every layer, with the metadata that each layer's method asked for."""

from __future__ import annotations

import torch

from distributed_sparse.selection.base import Geometry, LayerCache, Policy


class PagedCache:
    """Pages of all layers. Which sequence holds which page is the Driver's affair; page 0 is the null page."""

    def __init__(self, num_pages: int, geometry: Geometry, policies: list[Policy]) -> None:
        shape = (num_pages, geometry.num_kv_heads, geometry.page_size, geometry.head_dim)
        self.num_pages = num_pages
        self.layers = [
            LayerCache(
                k_pages=torch.zeros(shape, dtype=geometry.dtype, device=geometry.device),
                v_pages=torch.zeros(shape, dtype=geometry.dtype, device=geometry.device),
                metadata={kind: kind.allocate(num_pages, geometry) for kind in policy.metadata},
            )
            for policy in policies
        ]

    @staticmethod
    def page_bytes(geometry: Geometry, policies: list[Policy]) -> tuple[int, int]:
        """Bytes of one page over all layers: (K and V, metadata)."""
        tokens = geometry.num_kv_heads * geometry.page_size * geometry.head_dim
        metadata = sum(kind.bytes_per_page(geometry) for policy in policies for kind in policy.metadata)
        return len(policies) * 2 * tokens * geometry.dtype.itemsize, metadata

    def copy_pages(self, copies: list[tuple[int, int]]) -> None:
        """Copy whole pages (from, to) with their metadata, in every layer. All are read before any is written."""
        if not copies:
            return
        device = self.layers[0].k_pages.device
        source, target = torch.tensor(copies, device=device).unbind(1)
        for layer in self.layers:
            for pages in (layer.k_pages, layer.v_pages, *layer.metadata.values()):
                pages[target] = pages[source]
