"""tova: tokens that the newest queries attended most; a dropped token is never attended again (TOVA, arXiv 2401.06104).

The control for score-based eviction: does a later query need a token that an earlier one did not?
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from distributed_sparse.cache import AppendRuns, Geometry, LayerCache, Metadata
from distributed_sparse.kernels.huge_pages import zeros
from distributed_sparse.selection.base import DecodeBatch, Policy, Selection, SparseConfig, dense_selection


@dataclass(frozen=True, kw_only=True)
class TovaConfig(SparseConfig):
    """`token_budget` tokens stay visible per (sequence, KV head) row, the query's own included.

    No other token is forced to stay, nor are sinks (section 3): `sink_pages` is 0, and of `recent_pages: 1` only the query's
    own token is certain to stay. Contexts below `min_context` drop nothing.
    """

    method: ClassVar[str] = "tova"
    sink_pages: int = 0
    recent_pages: int = 1
    token_budget: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.token_budget < 1:
            raise ValueError(
                f"sparse.token_budget={self.token_budget} is below 1: the query's own token is always attended; set 1 or more"
            )
        for name, only in (("sink_pages", 0), ("recent_pages", 1)):
            if getattr(self, name) != only:
                raise ValueError(
                    f"sparse.{name}={getattr(self, name)}, but tova keeps tokens by their weight alone; leave it at {only}"
                )

    def drops(self, context_len: int) -> bool:
        """Whether a row with this context attends to less than all of it."""
        return context_len > self.token_budget and context_len >= self.min_context

    def attended_tokens(self, context_len: int, page_size: int) -> int:
        return self.token_budget if self.drops(context_len) else context_len


@dataclass(frozen=True)
class Visible(Metadata):
    """Which tokens are still visible: uint8 [num_pages, H_kv, page_size], set to 1 by the append, cleared by the policy.

    Unlike other metadata, not a function of the page's content: it depends on the queries of the sequence that holds the page.
    """

    changes_when_read = True

    def allocate(self, num_pages: int, geometry: Geometry) -> dict[str, Tensor]:
        shape = (num_pages, geometry.num_kv_heads, geometry.page_size)
        return {"visible": zeros(shape, torch.uint8, geometry.device)}

    def append(self, cache: LayerCache, k: Tensor, runs: AppendRuns) -> None:
        counts, num_tokens = runs.counts.long(), len(k)
        pages, offsets = (each.long().repeat_interleave(counts, output_size=num_tokens) for each in (runs.pages, runs.offsets))
        before = (counts.cumsum(0) - counts).repeat_interleave(counts, output_size=num_tokens)
        offsets = offsets + torch.arange(num_tokens, device=k.device) - before
        cache.metadata["visible"][pages, :, offsets] = 1


class TovaPolicy(Policy):
    """Drops, then attends: the newest query attends to the `token_budget` visible tokens with its largest weights.

    Weights are softmax probabilities per query head, averaged over the KV head's group; of equal weights the older token is
    dropped. The paper attends before it drops: each step would attend one token more than the budget, and the first step after
    a prefill the whole prompt. Here every step of a context beyond the budget attends exactly `token_budget` tokens.

    No memory is freed, as heads drop different tokens of the pages that they share. Samples of one request share no pages, as
    each drops its own tokens. Eager torch, one row at a time, so that a row's bits depend on the row alone.
    """

    config_class = TovaConfig
    config: TovaConfig
    metadata = (Visible(),)
    graph_safe = False

    def select(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Selection:
        num_kv_heads, budget = self.geometry.num_kv_heads, self.config.token_budget
        dense = dense_selection(batch, num_kv_heads)
        lengths = batch.context_lens.tolist()
        sparse_rows = [row for row, length in enumerate(lengths) if self.config.drops(length)]
        if not sparse_rows:
            return dense
        tokens = batch.page_table.new_zeros((len(lengths), num_kv_heads, budget))
        num_tokens = batch.num_pages.new_zeros((len(lengths), num_kv_heads))
        for row in sparse_rows:
            slots = self._slots(batch, row, lengths[row])
            group_queries = q[row].float().view(num_kv_heads, self.geometry.group_size, -1)
            for head in range(num_kv_heads):
                kept = self._drop(group_queries[head], cache, head, slots)
                tokens[row, head, : len(kept)], num_tokens[row, head] = kept.int(), len(kept)
        num_pages = dense.num_pages.where(num_tokens == 0, 0)
        return Selection(dense.pages, num_pages, tokens, num_tokens)

    @staticmethod
    def _slots(batch: DecodeBatch, row: int, context_len: int) -> Tensor:
        """The sequence's token slots, int64 [context_len], in logical order."""
        position = torch.arange(context_len, device=batch.page_table.device)
        pages = batch.page_table[row].long()[position // batch.page_size]
        return pages * batch.page_size + position % batch.page_size

    def _drop(self, queries: Tensor, cache: LayerCache, head: int, slots: Tensor) -> Tensor:
        """Hide all but `token_budget` of a row's visible tokens; return their slots, int64 [token_budget], by position.

        (Fewer only in the warm-up on the null page, most of whose tokens were never written.)

        Args:
            queries: float32 [G, d].
            slots: int64 [n], the newest token last.
        """
        budget, page_size = self.config.token_budget, self.geometry.page_size
        visible = cache.metadata["visible"]
        pages, offsets = slots // page_size, slots % page_size
        seen = visible[pages, head, offsets].nonzero().flatten()
        if len(seen) <= budget:
            return slots[seen]
        keys = cache.k_pages[pages[seen], head, offsets[seen]].float()
        weights = (queries @ keys.T * self.geometry.scale).softmax(dim=1).mean(dim=0)
        weights[-1] = torch.inf
        newest_first = weights.flip(0).sort(descending=True, stable=True).indices
        order = len(seen) - 1 - newest_first
        fallen, kept = slots[seen[order[budget:]]], slots[seen[order[:budget].sort().values]]
        visible[fallen // page_size, head, fallen % page_size] = 0
        return kept

    def bytes_scored(self, context_lens: list[int], max_context_len: int | None = None) -> int:
        """The visible flags, and the keys of visible tokens. A row's first sparse step reads all keys; that is not counted."""
        sparse = [length for length in context_lens if self.config.drops(length)]
        key_bytes = (self.config.token_budget + 1) * self.geometry.head_dim * self.geometry.dtype.itemsize
        return self.geometry.num_kv_heads * (sum(sparse) + len(sparse) * key_bytes)
