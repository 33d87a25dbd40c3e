"""base: the contract of a timed kernel, and the shape at which it is timed.

Legend: B batch, H KV heads, Hq query heads, G = Hq / H, d head_dim, n context, S page_size, P pages of a context.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from distributed_sparse.tools.bench.accuracy import MAX_ERROR, check_close, check_equal
from distributed_sparse.tools.bench.layer import Inputs
from distributed_sparse.tools.bench.rows import Row

Peer = Callable[[], Callable[[Any], Any]]
"""Makes a function of an op's arguments, whose result goes to `Op.check_peer`; raises `Unavailable` where it cannot."""


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
        """(sequence, KV head) rows."""
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
        """The queries of a decode step; its outputs take as many bytes."""
        return self.batch * self.num_heads * self.row_bytes


class Op(ABC):
    """One kernel at one shape."""

    name: ClassVar[str]
    axes: ClassVar[tuple[str, ...]]
    """The grid's axes (context, batch, token_budget, page_size) on which the time depends; other axes are timed once."""
    kernel: ClassVar[Callable[..., Any]]
    reference: ClassVar[Callable[..., Any]]
    """The result in float64, or exact integers, from the kernel's arguments on the CPU; for ops that inherit `check`."""
    checks_whole: ClassVar[bool] = False
    """Whether `check` compares the whole result, not just some rows."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    @abstractmethod
    def arguments(self, data: Inputs, generator: torch.Generator) -> dict[str, Any]:
        """The kernel's arguments, from one cache's contents and random draws."""

    def run(self, arguments: dict[str, Any]) -> Any:
        return self.kernel(**arguments)

    @abstractmethod
    def num_bytes(self) -> tuple[int, int]:
        """Bytes that the kernel must read, and bytes that it must write."""

    def num_operations(self) -> int | None:
        """Floating-point operations, for kernels that they limit rather than bytes."""
        return None

    @property
    def max_error(self) -> float:
        """RMS error over RMS of the reference, above which a result is wrong."""
        return MAX_ERROR[self.shape.dtype]

    def check(self, arguments: dict[str, Any], result: Any, rows: list[Row]) -> None:
        """Compare with the reference in `rows`; without any, as a whole.

        Raises:
            WrongResult: the result is wrong.
        """
        results = (result,) if isinstance(result, Tensor) else result
        places: list[Row | None] = [*rows] or [None]
        for row in places:
            if row is None:
                given = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in arguments.items()}
            else:
                given = row.arguments(arguments)
            expected = self.reference(**given)
            for found, exact in zip(results, (expected,) if isinstance(expected, Tensor) else expected, strict=True):
                part = found.cpu() if row is None else row.part(found)
                if exact.is_floating_point():
                    check_close(self.name, part, exact, self.max_error)
                else:
                    check_equal(self.name, part.to(exact.dtype), exact)

    def compared(self, num_rows: int) -> str:
        """How much of the result `check` compares, given so many rows."""
        return "all" if self.checks_whole or num_rows == self.shape.rows else f"{num_rows} of {self.shape.rows} rows"

    def peers(self, data: Inputs, arguments: dict[str, Any]) -> dict[str, Peer]:
        """The same computation by other libraries, by name."""
        return {}

    def check_peer(self, name: str, arguments: dict[str, Any], result: Tensor, of_peer: Tensor) -> None:
        """Compare a peer's result with the op's own, which has been checked before. Raises `WrongResult`."""
        check_close(name, of_peer.reshape(result.shape), result, self.max_error, "this engine's result")

    def before_check(self, arguments: dict[str, Any]) -> None:  # noqa: B027
        """Called before the checked run: an op that writes in place first overwrites what the kernel has to write."""


def random_pages(data: Inputs, count: int, generator: torch.Generator) -> Tensor:
    """Page lists such as Quest's: `count` pages of each row, ascending in logical order, first and newest included.

    Returns:
        int32 [B, H, count] logical page indices.
    """
    batch, pages = data.batch.page_table.shape
    heads = data.cache.k_pages.shape[1]
    scores = torch.rand(batch, heads, pages, generator=generator, device=data.q.device)
    scores[..., 0], scores[..., -1] = 2.0, 3.0
    return scores.topk(count, dim=-1).indices.sort(dim=-1).values.int()


def random_tokens(data: Inputs, count: int, generator: torch.Generator) -> Tensor:
    """`count` distinct tokens of each row in random order: int64 [B, H, count] positions in the context."""
    batch, heads = len(data.q), data.cache.k_pages.shape[1]
    draws = torch.rand(batch, heads, data.batch.max_context_len, generator=generator, device=data.q.device)
    return draws.topk(count, dim=-1).indices


def physical(data: Inputs, logical: Tensor) -> Tensor:
    """Logical page indices [B, H, K] as physical pages, int32."""
    table = data.batch.page_table[:, None].expand(-1, logical.shape[1], -1)
    return table.gather(2, logical.long())


def slots(data: Inputs, positions: Tensor) -> Tensor:
    """Positions [B, H, K] in the context as token slots in the cache, int32."""
    size = data.batch.page_size
    return (physical(data, positions // size) * size + positions % size).int()
