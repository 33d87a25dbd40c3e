"""rows: one (sequence, KV head) row of a kernel's arguments and results on the CPU, for a comparison with its reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distributed_sparse.selection.base import DecodeBatch

PER_PAGE = ("k_pages", "v_pages", "page_min_max", "key_codes", "key_scales", "signatures")
"""Names of arguments [num_pages, H_kv, ...], of which a row needs its own pages alone."""


class Row:
    """One (sequence, KV head) row, cut from arguments and results of a whole batch by their names and shapes.

    Args:
        batch: the decode batch.
        b, h: the sequence and the KV head.
        num_kv_heads: KV heads of the whole batch.
    """

    def __init__(self, batch: DecodeBatch, b: int, h: int, num_kv_heads: int) -> None:
        self.b, self.h = b, h
        self._num_kv_heads, self._page_size = num_kv_heads, batch.page_size
        self._pages = batch.page_table[b].long()
        pages = self._pages.cpu()
        self._place = torch.zeros(int(pages.max()) + 1, dtype=torch.int32)
        self._place[pages] = torch.arange(len(pages), dtype=torch.int32)

    def arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """The row's part of every argument.

        Where one of `PER_PAGE` is among them, the row's pages are renumbered 0, 1, ... in logical order everywhere.
        """
        renumbered = any(name in PER_PAGE for name in given)
        return {name: self._part(name, value, renumbered) for name, value in given.items()}

    def part(self, x: Tensor) -> Tensor:
        """The row of a tensor [B], [B, H_kv, ...] or [B, H_q, ...], which keeps its number of dimensions."""
        x = x[self.b : self.b + 1]
        if x.dim() > 1:
            group = x.shape[1] // self._num_kv_heads
            x = x[:, self.h * group : (self.h + 1) * group]
        return x.cpu()

    def _part(self, name: str, value: Any, renumbered: bool) -> Any:
        if isinstance(value, tuple):
            return tuple(self._part("", each, renumbered) for each in value)
        if name == "first_kv_head":
            return value + self.h
        if not isinstance(value, Tensor):
            return value
        if name in PER_PAGE:
            return value[self._pages, self.h : self.h + 1].cpu()
        if name == "random_key":  # [4, B]
            return value[:, self.b : self.b + 1].cpu()
        if name == "page_table":  # [B, P], shared by all KV heads
            table = value[self.b : self.b + 1].cpu()
            return self._renumbered(table) if renumbered else table
        x = self.part(value)
        if renumbered and name == "pages":
            return self._renumbered(x)
        if renumbered and name == "tokens":
            return self._renumbered(x // self._page_size) * self._page_size + x % self._page_size
        return x

    def _renumbered(self, pages: Tensor) -> Tensor:
        """Physical pages as places in the row's table; entries past a list's count may hold anything."""
        return self._place[pages.long().clamp(0, len(self._place) - 1)]
