"""flashinfer_dense: dense decode by flashinfer's paged kernel inside this engine, a peer that differs in attention alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from distributed_sparse.cache import Geometry, LayerCache
from distributed_sparse.selection.base import DecodeBatch, Policy, Selection, SparseConfig, dense_selection
from distributed_sparse.tools.bench.peers import WORKSPACE_BYTES, import_peer

METHOD = f"{__name__}:FlashInferPolicy"
"""Its `sparse.method`."""


@dataclass(frozen=True, kw_only=True)
class FlashInferConfig(SparseConfig):
    """With `dense_layers: 0`, flashinfer runs every layer."""

    method: ClassVar[str] = "flashinfer"
    use_tensor_cores: bool = False
    """Use the kernel for large query groups instead of the one without tensor cores."""


class FlashInferPolicy(Policy):
    """flashinfer attends to every row's whole context and returns the result as `partial`, with an empty selection."""

    config: FlashInferConfig
    config_class = FlashInferConfig
    graph_safe = False  # flashinfer plans on the host, for the step's lengths

    def __init__(self, config: SparseConfig, geometry: Geometry) -> None:
        super().__init__(config, geometry)
        self._wrapper: Any = None  # made at the first step: cost models have no device
        self._planned: DecodeBatch | None = None

    def select(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Selection:
        if batch is not self._planned:  # once per step, as flashinfer recommends
            self._plan(batch, q.dtype)
            self._planned = batch
        out, log2_sum_exp = self._wrapper.run(q, (cache.k_pages, cache.v_pages), return_lse=True)
        dense = dense_selection(batch, self.geometry.num_kv_heads)
        return Selection(
            dense.pages,
            torch.zeros_like(dense.num_pages),
            partial=(out.float(), log2_sum_exp.float() * math.log(2)),
            partial_selection=dense,
        )

    def _plan(self, batch: DecodeBatch, dtype: torch.dtype) -> None:
        geometry = self.geometry
        if self._wrapper is None:
            workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=geometry.device)
            self._wrapper = import_peer("flashinfer").BatchDecodeWithPagedKVCacheWrapper(
                workspace, "HND", use_tensor_cores=self.config.use_tensor_cores
            )
        listed = torch.arange(batch.page_table.shape[1], device=batch.page_table.device) < batch.num_pages[:, None]
        indptr = torch.zeros(len(batch.num_pages) + 1, dtype=torch.int32, device=listed.device)
        indptr[1:] = batch.num_pages.cumsum(0)
        heads = geometry.num_kv_heads * geometry.group_size
        sizes = (heads, geometry.num_kv_heads, geometry.head_dim, geometry.page_size)
        self._wrapper.plan(
            indptr, batch.page_table[listed], batch.last_page_len, *sizes,
            q_data_type=dtype, kv_data_type=dtype, sm_scale=geometry.scale,
        )  # fmt: skip
