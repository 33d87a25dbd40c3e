"""sketch: tokens that are likely by one sign per key channel, and an estimate of the attention over all other tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from distributed_sparse.cache import AppendRuns, Geometry, LayerCache, Metadata
from distributed_sparse.kernels.huge_pages import zeros
from distributed_sparse.kernels.sketch.sketch import (
    KEY_MEAN_BITS,
    MAGNITUDE_BITS,
    VALUE_MEAN_BITS,
    PageSketches,
    append_sketches,
    select_by_sketch,
    sketch_logits,
    sketch_probabilities,
)
from distributed_sparse.selection.base import (
    DecodeBatch,
    Policy,
    Selection,
    SparseConfig,
    dense_selection,
    slots_of,
    token_selection,
)
from distributed_sparse.selection.top_k import Scorer
from distributed_sparse.utils.validation import check_float, check_int

_NAMES = {field: f"sketch_{field}" for field in PageSketches._fields}


@dataclass(frozen=True)
class KeySketches(Metadata):
    """The `PageSketches` of a layer, one per full page."""

    def allocate(self, num_pages: int, geometry: Geometry) -> dict[str, Tensor]:
        head_dim, size = geometry.head_dim, geometry.page_size
        if head_dim % 8:
            raise ValueError(f"sketch needs a head dimension that is a multiple of 8, not {head_dim}; use another method")
        if geometry.device.type == "cuda":
            raise ValueError("sketch has no kernels for CUDA yet; use another method, or device=cpu")
        widths = {
            "signs": (size, head_dim // 8),
            "magnitudes": (size * MAGNITUDE_BITS // 8,),
            "key_means": (head_dim * KEY_MEAN_BITS // 8,),
            "value_means": (head_dim * VALUE_MEAN_BITS // 8,),
        }
        rows = (num_pages, geometry.num_kv_heads)
        kept = {_NAMES[field]: zeros((*rows, *width), torch.uint8, geometry.device) for field, width in widths.items()}
        return kept | {_NAMES["scales"]: zeros((*rows, 6), torch.float16, geometry.device)}

    def append(self, cache: LayerCache, k: Tensor, runs: AppendRuns) -> None:
        append_sketches(cache.k_pages, cache.v_pages, runs.pages, runs.offsets, runs.counts, sketches_of(cache))


def sketches_of(cache: LayerCache) -> PageSketches:
    return PageSketches(*(cache.metadata[_NAMES[field]] for field in PageSketches._fields))


def sketch_bytes(geometry: Geometry) -> int:
    """Bytes of the sketch of one page, over this rank's KV heads."""
    on_paper = KeySketches().allocate(1, replace(geometry, device=torch.device("meta")))
    return sum(tensor.nbytes for tensor in on_paper.values())


class SketchScorer(Scorer):
    """Scores every token by its estimated probability, averaged over the group. A token without a sketch scores 0."""

    selector = "sketch"
    per_token = True
    graph_safe = False
    metadata = (KeySketches(),)

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.page_bytes = sketch_bytes(geometry)
        self._tail_bytes = geometry.num_kv_heads * geometry.head_dim * VALUE_MEAN_BITS // 8

    def logits(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Tensor:
        """Estimated logits of the tokens; see `sketch_logits`."""
        table, counts, scale = batch.page_table, batch.num_pages, self.geometry.scale
        return sketch_logits(q, sketches_of(cache), table, counts, batch.last_page_len, scale)

    def scores(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Tensor:
        full = batch.context_lens // batch.page_size * batch.page_size
        return sketch_probabilities(self.logits(q, cache, batch), self.geometry.num_kv_heads, full)

    def bytes_scored(self, context_lens: list[int]) -> int:
        return sum(n // self.geometry.page_size for n in context_lens) * (self.page_bytes - self._tail_bytes)


@dataclass(frozen=True, kw_only=True)
class SketchConfig(SparseConfig):
    """Attends to tokens whose estimated probability is above `tau` / context, at least to the `min_tokens` most likely ones.

    The first layer is dense by default, as its attention spreads over the whole context.
    tail: add an estimate of the attention over the tokens that are not attended.
    """

    method: ClassVar[str] = "sketch"
    dense_layers: int = 1
    tau: float = 1.6
    min_tokens: int = 128
    tail: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_float("sparse.tau", self.tau, 0.0, remedy="1.6 is usual; a lower one attends more")
        check_int("sparse.min_tokens", self.min_tokens, 1, remedy="128 is usual")

    def keeps_all(self, context_len: int, page_size: int) -> bool:
        """Whether every row of such a context attends all of it, for any data."""
        scored = context_len // page_size * page_size
        return context_len < self.min_context or scored <= max(
            self.min_tokens, (self.sink_pages + self.recent_pages - 1) * page_size
        )

    def attended_tokens(self, context_len: int, page_size: int) -> int | None:
        return context_len if self.keeps_all(context_len, page_size) else None


class SketchPolicy(Policy):
    """Keeps tokens by their estimated probability, and passes on the estimate of all others as `partial`."""

    config_class = SketchConfig
    config: SketchConfig

    def __init__(self, config: SparseConfig, geometry: Geometry) -> None:
        super().__init__(config, geometry)
        self.scorer = SketchScorer(geometry)
        self.metadata = self.scorer.metadata

    def select(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Selection:
        config = self.config
        if config.keeps_all(batch.max_context_len, batch.page_size):
            return dense_selection(batch, self.geometry.num_kv_heads)
        with self.timer("score"):
            logits = self.scorer.logits(q, cache, batch)
        with self.timer("threshold"):
            found = select_by_sketch(
                logits,
                sketches_of(cache),
                batch.page_table,
                batch.num_pages,
                batch.context_lens,
                config.tau,
                min_tokens=config.min_tokens,
                sink_pages=config.sink_pages,
                recent_pages=config.recent_pages,
            )
        selection = token_selection(batch, slots_of(found.tokens, batch), found.num_tokens, config.min_context)
        if config.tail:
            lse = found.tail_lse
            if config.min_context > 0:
                whole = (selection.num_pages > 0).repeat_interleave(self.geometry.group_size, dim=1)
                lse = lse.masked_fill(whole, float("-inf"))  # a row below min_context is dense: no tail
            selection.partial = (found.tail_out, lse)
        return selection

    def bytes_scored(self, context_lens: list[int], max_context_len: int | None = None) -> int:
        if self.config.tail:
            return sum(n // self.geometry.page_size for n in context_lens) * self.scorer.page_bytes
        return self.scorer.bytes_scored(context_lens)
