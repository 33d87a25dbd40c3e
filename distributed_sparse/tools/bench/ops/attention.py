"""attention: decode attention over whole contexts, pages or single tokens, and a prompt chunk's causal attention."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from distributed_sparse.kernels.attend.attend import attend
from distributed_sparse.kernels.attend.prefill_attend import prefill_attend
from distributed_sparse.kernels.reference import attend_reference, prefill_attend_reference
from distributed_sparse.tools.bench import peers
from distributed_sparse.tools.bench.accuracy import check_close
from distributed_sparse.tools.bench.layer import Inputs
from distributed_sparse.tools.bench.ops.base import Op, Peer, physical, random_pages, random_tokens, slots
from distributed_sparse.tools.bench.rows import Row

CHECKED_QUERIES = 16
"""So many of a chunk's first queries, and of its last ones, are compared with the reference."""


class _Attend(Op):
    kernel = staticmethod(attend)

    def reference(self, **arguments: Any) -> Tensor:
        return attend_reference(**arguments)[0]

    def _common(self, data: Inputs, pages: Tensor, num_pages: Tensor) -> dict[str, Any]:
        return {
            "q": data.q,
            "k_pages": data.cache.k_pages,
            "v_pages": data.cache.v_pages,
            "pages": pages,
            "num_pages": num_pages,
            "last_page_len": data.batch.last_page_len,
            "scale": self.shape.scale,
        }

    def _bytes(self, tokens: int, listed: int) -> tuple[int, int]:
        """Read: K and V of `tokens` per row, a list of `listed` int32 per row, the queries. Written: the outputs."""
        shape = self.shape
        return shape.rows * (2 * tokens * shape.row_bytes + 4 * listed) + shape.query_bytes, shape.query_bytes


class AttendDense(_Attend):
    """Every row reads its whole context, listed by the page table expanded over the heads."""

    name: ClassVar[str] = "attend dense"
    axes = ("context", "batch", "page_size")

    def arguments(self, data: Inputs, generator: torch.Generator) -> dict[str, Any]:
        heads = self.shape.num_kv_heads
        pages = data.batch.page_table[:, None].expand(-1, heads, -1)
        return self._common(data, pages, data.batch.num_pages[:, None].expand(-1, heads))

    def num_bytes(self) -> tuple[int, int]:
        return self._bytes(self.shape.context, self.shape.pages)

    def peers(self, data: Inputs, arguments: dict[str, Any]) -> dict[str, Peer]:
        return {
            "sdpa": lambda: peers.sdpa_decode(data, self.shape),
            "flex_attention": lambda: peers.flex_decode(data, self.shape),
            "flashinfer/cuda cores": lambda: peers.flashinfer_decode(data, self.shape, use_tensor_cores=False),
            "flashinfer/tensor cores": lambda: peers.flashinfer_decode(data, self.shape, use_tensor_cores=True),
        }


class AttendPages(_Attend):
    """Every row reads `token_budget` tokens in whole pages, as Quest lists them."""

    name: ClassVar[str] = "attend pages"
    axes = ("context", "batch", "token_budget", "page_size")

    def arguments(self, data: Inputs, generator: torch.Generator) -> dict[str, Any]:
        pages = physical(data, random_pages(data, self.shape.budget_pages, generator))
        return self._common(data, pages, torch.full_like(pages[..., 0], pages.shape[2]))

    def num_bytes(self) -> tuple[int, int]:
        pages = self.shape.budget_pages
        return self._bytes(min(pages * self.shape.page_size, self.shape.context), pages)


class AttendTokens(_Attend):
    """Every row reads `token_budget` single tokens, as Twilight and vAttention list them."""

    name: ClassVar[str] = "attend tokens"
    axes = ("context", "batch", "token_budget")

    def arguments(self, data: Inputs, generator: torch.Generator) -> dict[str, Any]:
        count = min(self.shape.token_budget, self.shape.context)
        positions = random_tokens(data, count, generator).sort(dim=-1).values
        pages = data.batch.page_table[:, None].expand(-1, self.shape.num_kv_heads, -1)
        no_pages = torch.zeros_like(pages[..., 0])
        return {
            **self._common(data, pages, no_pages),
            "tokens": slots(data, positions),
            "num_tokens": no_pages + count,
        }

    def num_bytes(self) -> tuple[int, int]:
        tokens = min(self.shape.token_budget, self.shape.context)
        return self._bytes(tokens, tokens)


class PrefillAttend(Op):
    """One prompt chunk, the last `prefill_tokens` of its context, at batch 1. Operations limit it."""

    name: ClassVar[str] = "prefill_attend"
    axes = ("context", "page_size")
    kernel = staticmethod(prefill_attend)

    def arguments(self, data: Inputs, generator: torch.Generator) -> dict[str, Any]:
        shape = self.shape
        q = torch.randn(shape.prefill_tokens, shape.num_heads, shape.head_dim, generator=generator, device=shape.device)
        ints: dict[str, Any] = {"dtype": torch.int32, "device": shape.device}
        return {
            "q": q.to(shape.dtype),
            "k_pages": data.cache.k_pages,
            "v_pages": data.cache.v_pages,
            "page_table": data.batch.page_table[:1],
            "query_start": torch.tensor([0, shape.prefill_tokens], **ints),
            "context_lens": torch.tensor([shape.context], **ints),
            "scale": shape.scale,
            "max_query_len": shape.prefill_tokens,
        }

    def num_bytes(self) -> tuple[int, int]:
        shape = self.shape
        queries = shape.prefill_tokens * shape.num_heads * shape.row_bytes
        return 2 * shape.context * shape.num_kv_heads * shape.row_bytes + queries, queries

    def num_operations(self) -> int:
        """Two products of 2 d operations each for every pair of a query and a key that it may attend to."""
        shape = self.shape
        before = shape.context - shape.prefill_tokens
        pairs = shape.prefill_tokens * before + shape.prefill_tokens * (shape.prefill_tokens + 1) // 2
        return 4 * shape.head_dim * shape.num_heads * pairs

    def compared(self, num_rows: int) -> str:
        return f"{min(2 * CHECKED_QUERIES, self.shape.prefill_tokens)} of {self.shape.prefill_tokens} queries"

    def check(self, arguments: dict[str, Any], result: Tensor, rows: list[Row]) -> None:
        """Compare the first and the last queries in the KV heads of `rows` that are of the first sequence."""
        shape = self.shape
        few = min(CHECKED_QUERIES, shape.prefill_tokens)
        for row in (row for row in rows if row.b == 0):
            cache = row.arguments({name: arguments[name] for name in ("k_pages", "v_pages", "page_table")})
            heads = slice(row.h * shape.group, (row.h + 1) * shape.group)
            for first in {0, shape.prefill_tokens - few}:
                expected = prefill_attend_reference(
                    arguments["q"][first : first + few, heads].cpu(),
                    **cache,
                    query_start=torch.tensor([0, few]),
                    context_lens=torch.tensor([shape.context - shape.prefill_tokens + first + few]),
                    scale=shape.scale,
                )
                check_close(self.name, result[first : first + few, heads], expected, self.max_error)

    def peers(self, data: Inputs, arguments: dict[str, Any]) -> dict[str, Peer]:
        return {
            "sdpa": lambda: peers.sdpa_prefill(data, self.shape),
            "flashinfer": lambda: peers.flashinfer_prefill(data, self.shape),
        }


OPS: tuple[type[Op], ...] = (AttendDense, AttendPages, AttendTokens, PrefillAttend)
