"""base: the contract of a kernel that is timed, and the shape of what it is timed on.

Legend: B batch, H KV heads, Hq query heads, G = Hq / H, d head_dim, n context, S page_size, P pages of a context.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from distributed_sparse.tools.bench.layer import Inputs

Peer = Callable[[], Callable[[Any], Any]]
"""Makes a function of an op's arguments, whose result `Op.check_peer` understands; raises `Unavailable` where it cannot."""


@dataclass(frozen=True)
class Shape:
    """One point of the grid."""

    context: int
    batch: int
    token_budget: int
    page_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    prefill_tokens: int
    """Tokens of a prompt chunk, the last ones of its context."""
    dtype: torch.dtype
    device: torch.device

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def pages(self) -> int:
        return -(-self.context // self.page_size)

    @property
    def budget_pages(self) -> int:
        return min(-(-self.token_budget // self.page_size), self.pages)

    @property
    def rows(self) -> int:
        """(sequence, KV head) pairs."""
        return self.batch * self.num_kv_heads

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    @property
    def row_bytes(self) -> int:
        """One token's key, or value, of one KV head."""
        return self.head_dim * self.dtype.itemsize

    @property
    def query_bytes(self) -> int:
        """The queries of a decode step, and as many bytes its outputs."""
        return self.batch * self.num_heads * self.head_dim * self.dtype.itemsize


class Row(NamedTuple):
    """One (sequence, KV head) row on its own, for a reference: its pages renumbered 0, 1, ... in logical order, on the CPU."""

    b: int
    h: int
    q: Tensor
    """[1, G, d]"""
    k_pages: Tensor
    """[P, 1, S, d]"""
    v_pages: Tensor
    last_page_len: Tensor
    """int32 [1]"""
    logical: Tensor
    """int64 [num_pages]: physical page -> its place in this row's table."""

    @property
    def page_table(self) -> Tensor:
        return torch.arange(len(self.k_pages), dtype=torch.int32)[None]

    @property
    def num_pages(self) -> Tensor:
        return torch.tensor([len(self.k_pages)], dtype=torch.int32)

    def local_pages(self, pages: Tensor, count: int) -> Tensor:
        """A list of physical pages by their place in the table: int32 [1, 1, count]."""
        return self.logical[pages[:count].long().cpu()].int()[None, None]

    def local_slots(self, slots: Tensor, count: int) -> Tensor:
        """The same of token slots."""
        slots, size = slots[:count].long().cpu(), self.k_pages.shape[2]
        return (self.logical[slots // size] * size + slots % size).int()[None, None]


class Op(ABC):
    """One kernel at one shape."""

    name: ClassVar[str]
    axes: ClassVar[tuple[str, ...]]
    """What of the grid (context, batch, token_budget, page_size) its time depends on; along the rest it is timed once."""
    checks_whole: ClassVar[bool] = False
    """Whether `check` looks at everything, and not at some rows alone."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    @abstractmethod
    def arguments(self, data: Inputs, generator: torch.Generator) -> Any:
        """What `run` takes, made of one cache's contents and of what is drawn."""

    @abstractmethod
    def run(self, arguments: Any) -> Any:
        """The kernel."""

    @property
    @abstractmethod
    def num_bytes(self) -> tuple[int, int]:
        """Bytes that must be read, and that must be written."""

    @property
    def num_operations(self) -> int | None:
        """Floating-point operations, where they and not the bytes are the limit."""
        return None

    @abstractmethod
    def check(self, data: Inputs, arguments: Any, result: Any, rows: list[Row]) -> None:
        """Compare with the reference in `rows`, or as a whole.

        Raises:
            WrongResult: it is wrong.
        """

    def compared(self, num_rows: int) -> str:
        """How much of its result `check` looks at, given so many rows."""
        return "all" if self.checks_whole or num_rows == self.shape.rows else f"{num_rows} of {self.shape.rows} rows"

    def peers(self, data: Inputs, arguments: Any) -> dict[str, Peer]:
        """What other libraries can do of the same, by name."""
        return {}

    def check_peer(self, name: str, arguments: Any, result: Any, of_peer: Any) -> None:
        """Compare a peer's result with the op's own, once that has been checked. Raises `WrongResult`."""
        raise NotImplementedError(f"{self.name} has no peers")

    def before_check(self, arguments: Any) -> None:  # noqa: B027
        """Called before the run that `check` looks at: an op that writes in place spoils what it is to write."""


def row_of(data: Inputs, b: int, h: int) -> Row:
    """One row's queries, keys and values."""
    group = data.q.shape[1] // data.cache.k_pages.shape[1]
    pages = data.batch.page_table[b].long()
    logical = torch.full((len(data.cache.k_pages),), -1, dtype=torch.int64)
    logical[pages.cpu()] = torch.arange(len(pages))
    k_pages, v_pages = (cache[pages, h][:, None].cpu() for cache in (data.cache.k_pages, data.cache.v_pages))
    q = data.q[b : b + 1, h * group : (h + 1) * group].cpu()
    return Row(b, h, q, k_pages, v_pages, data.batch.last_page_len[b : b + 1].cpu(), logical)


def random_pages(data: Inputs, count: int, generator: torch.Generator) -> Tensor:
    """Lists as Quest makes them: `count` pages of each row, ascending in logical order, first and newest included.

    Returns:
        int32 [B, H, count] logical page indices.
    """
    batch, pages = data.batch.page_table.shape
    heads = data.cache.k_pages.shape[1]
    scores = torch.rand(batch, heads, pages, generator=generator, device=data.q.device)
    scores[..., 0], scores[..., -1] = 2.0, 3.0
    return scores.topk(count, dim=-1).indices.sort(dim=-1).values.int()


def physical(data: Inputs, logical: Tensor) -> Tensor:
    """Logical page indices [B, H, K] as physical pages, int32."""
    table = data.batch.page_table[:, None].expand(-1, logical.shape[1], -1)
    return table.gather(2, logical.long())
