"""Tracer: compares a traced decode row's attention with dense attention over the same cache, layer by layer, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from distributed_sparse.cache import Geometry, LayerCache
from distributed_sparse.protocol.step import DecodeRow, LayerTraceBlock, TraceBlock
from distributed_sparse.selection.base import DecodeBatch, Selection
from distributed_sparse.selection.exact import exact_head
from distributed_sparse.trace import MASSES


class Tracer:
    """The traces of one step: call `record` for every layer, then read `blocks`. Reads the whole cache and synchronises."""

    def __init__(self, geometry: Geometry, decode: list[DecodeRow]) -> None:
        self._geometry = geometry
        self._blocks = {
            row: TraceBlock(part.slot, part.position, geometry.num_kv_heads, [])
            for row, part in enumerate(decode)
            if part.trace
        }

    @property
    def blocks(self) -> list[TraceBlock]:
        """One per traced decode row, in the step plan's order."""
        return list(self._blocks.values())

    def record(self, q: Tensor, cache: LayerCache, batch: DecodeBatch, selection: Selection, out: Tensor) -> None:
        """Add one layer's queries and attention output, q, out: [B, H_q, d]."""
        for row, block in self._blocks.items():
            block.layers.append(self._compare(row, q, cache, batch, selection, out))

    def _compare(
        self, row: int, q: Tensor, cache: LayerCache, batch: DecodeBatch, selection: Selection, out: Tensor
    ) -> LayerTraceBlock:
        n = int(batch.context_lens[row])
        pages = batch.page_table[row, : int(batch.num_pages[row])]
        read = positions_read(selection, row, pages, batch, cache.k_pages.shape[0])
        group = self._geometry.group_size
        heads = []
        for head, index in enumerate(read):  # one head at a time, to bound the float64 copies
            own = slice(head * group, (head + 1) * group)
            weights, values = exact_head(
                q[row, own], cache, head, pages, n, self._geometry.scale, torch.float64
            )  # [G, n], [n, d]
            dense = weights @ values
            error = (out[row, own] - dense).norm(dim=-1) / dense.norm(dim=-1)
            best = weights.sort(-1, descending=True).values.cumsum(-1).contiguous()
            wanted = torch.tensor(MASSES, dtype=best.dtype, device=best.device).expand(group, -1).contiguous()
            needed = (torch.searchsorted(best, wanted) + 1).clamp_max(n)
            heads.append((weights[:, index].sum(-1), error, torch.special.entr(weights).sum(-1), needed))
        mass, error, entropy, needed = (torch.cat(part) for part in zip(*heads))
        partly = [index for index in read if len(index) < n]
        return LayerTraceBlock(
            captured_mass=_bytes(mass),
            relative_error=_bytes(error),
            entropy=_bytes(entropy),
            tokens_for_mass=_bytes(needed, torch.int32),
            counts=_bytes(torch.tensor([len(index) for index in read]), torch.int32),
            indices=_bytes(torch.cat(partly), torch.int32) if partly else b"",
            details={name: _bytes(value[row]) for name, value in selection.details.items()},
        )


def positions_read(selection: Selection, row: int, pages: Tensor, batch: DecodeBatch, num_pages: int) -> list[Tensor]:
    """Positions that each KV head of one sequence attends, those of a `partial` included: ascending int64, one tensor per head.

    Args:
        selection: of the batch.
        row: index of the sequence in the batch.
        pages: int32 [P] its physical pages in logical order.
        num_pages: pages of the cache.
    """
    size = batch.page_size
    logical = torch.zeros(num_pages, dtype=torch.int64, device=pages.device)
    logical[pages.long()] = torch.arange(len(pages), device=pages.device)
    n = int(batch.context_lens[row])
    found = []
    for head in range(selection.num_pages.shape[1]):
        slots = [pages[:0].long()]
        part: Selection | None = selection
        while part is not None:
            listed = part.pages[row, head, : int(part.num_pages[row, head])].long()
            slots.append((listed[:, None] * size + torch.arange(size, device=listed.device)).flatten())
            if part.tokens is not None and part.num_tokens is not None:
                slots.append(part.tokens[row, head, : int(part.num_tokens[row, head])].long())
            part = part.partial_selection
        slot = torch.cat(slots)
        position = logical[slot // size] * size + slot % size
        found.append(position[position < n].sort().values)  # the newest page may be partial
    return found


def _bytes(array: Tensor, dtype: torch.dtype = torch.float32) -> bytes:
    return array.to(dtype).contiguous().cpu().numpy().tobytes()
