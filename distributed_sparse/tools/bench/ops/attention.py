"""attention: attend over whole contexts, over pages, over single tokens; and a prompt chunk's causal attention."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from distributed_sparse.kernels.attend.attend import attend
from distributed_sparse.kernels.attend.prefill_attend import prefill_attend
from distributed_sparse.kernels.reference import attend_reference, prefill_attend_reference
from distributed_sparse.tools.bench import peers
from distributed_sparse.tools.bench.accuracy import MAX_ERROR, check_close
from distributed_sparse.tools.bench.layer import Inputs
from distributed_sparse.tools.bench.ops.base import Op, Peer, Row, physical, random_pages

CHECKED_QUERIES = 16
"""Of a chunk's first and last queries, so many are compared with the reference."""


class _Attend(Op):
    def run(self, arguments: dict[str, Any]) -> Tensor:
        return attend(**arguments)

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

    def check(self, data: Inputs, arguments: dict[str, Any], result: Tensor, rows: list[Row]) -> None:
        shape, lists = self.shape, arguments
        for row in rows:
            where = (row.b, row.h)
            pages = row.local_pages(lists["pages"][where], int(lists["num_pages"][where]))
            tokens: dict[str, Any] = {}
            if "tokens" in lists:
                listed = row.local_slots(lists["tokens"][where], int(lists["num_tokens"][where]))
                tokens = {"tokens": listed, "num_tokens": torch.tensor([[listed.shape[2]]])}
            num_pages = torch.tensor([[pages.shape[2]]])
            expected, _ = attend_reference(
                row.q, row.k_pages, row.v_pages, pages, num_pages, row.last_page_len, shape.scale, **tokens
            )
            found = result[row.b, row.h * shape.group : (row.h + 1) * shape.group]
            check_close(self.name, found, expected[0], MAX_ERROR[shape.dtype])

    def _bytes(self, tokens: int, listed: int) -> tuple[int, int]:
        """K and V of so many tokens per row, the queries, and a list of so many int32 per row; the outputs."""
        shape = self.shape
        return shape.rows * (2 * tokens * shape.row_bytes + 4 * listed) + shape.query_bytes, shape.query_bytes


class AttendDense(_Attend):
    """Every row reads its whole context: the page table, expanded over the heads."""

    name: ClassVar[str] = "attend dense"
    axes = ("context", "batch", "page_size")

    def arguments(self, data: Inputs, generator: torch.Generator) -> dict[str, Any]:
        heads = self.shape.num_kv_heads
        pages = data.batch.page_table[:, None].expand(-1, heads, -1)
        return self._common(data, pages, data.batch.num_pages[:, None].expand(-1, heads))

    @property
    def num_bytes(self) -> tuple[int, int]:
        return self._bytes(self.shape.context, self.shape.pages)

    def peers(self, data: Inputs, arguments: dict[str, Any]) -> dict[str, Peer]:
        return {
            "sdpa": lambda: peers.sdpa_decode(data, self.shape),
            "flex_attention": lambda: peers.flex_decode(data, self.shape),
            "flashinfer/cuda cores": lambda: peers.flashinfer_decode(data, self.shape, use_tensor_cores=False),
            "flashinfer/tensor cores": lambda: peers.flashinfer_decode(data, self.shape, use_tensor_cores=True),
        }

    def check_peer(self, name: str, arguments: Any, result: Tensor, of_peer: Tensor) -> None:
        check_close(name, of_peer.reshape(result.shape), result, MAX_ERROR[self.shape.dtype], "this engine's result")


class AttendPages(_Attend):
    """Every row reads `token_budget` tokens in whole pages, as Quest lists them."""

    name: ClassVar[str] = "attend pages"
    axes = ("context", "batch", "token_budget", "page_size")

    def arguments(self, data: Inputs, generator: torch.Generator) -> dict[str, Any]:
        pages = physical(data, random_pages(data, self.shape.budget_pages, generator))
        return self._common(data, pages, torch.full_like(pages[..., 0], pages.shape[2]))

    @property
    def num_bytes(self) -> tuple[int, int]:
        pages = self.shape.budget_pages
        return self._bytes(min(pages * self.shape.page_size, self.shape.context), pages)


class AttendTokens(_Attend):
    """Every row reads `token_budget` single tokens, as Twilight and vAttention list them."""

    name: ClassVar[str] = "attend tokens"
    axes = ("context", "batch", "token_budget")

    def arguments(self, data: Inputs, generator: torch.Generator) -> dict[str, Any]:
        shape = self.shape
        count, table = min(shape.token_budget, shape.context), data.batch.page_table
        draws = torch.rand(shape.batch, shape.num_kv_heads, shape.context, generator=generator, device=shape.device)
        positions = draws.topk(count, dim=-1).indices.sort(dim=-1).values
        pages = table[:, None].expand(-1, shape.num_kv_heads, -1).gather(2, positions // shape.page_size)
        none = torch.zeros(shape.batch, shape.num_kv_heads, dtype=torch.int32, device=shape.device)
        return {
            **self._common(data, table[:, None].expand(-1, shape.num_kv_heads, -1), none),
            "tokens": (pages * shape.page_size + positions % shape.page_size).int(),
            "num_tokens": none + count,
        }

    @property
    def num_bytes(self) -> tuple[int, int]:
        tokens = min(self.shape.token_budget, self.shape.context)
        return self._bytes(tokens, tokens)


class PrefillAttend(Op):
    """One prompt chunk, the last `prefill_tokens` of its context, at batch 1: limited by operations."""

    name: ClassVar[str] = "prefill_attend"
    axes = ("context", "page_size")

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

    def run(self, arguments: dict[str, Any]) -> Tensor:
        return prefill_attend(**arguments)

    @property
    def num_bytes(self) -> tuple[int, int]:
        shape = self.shape
        queries = shape.prefill_tokens * shape.num_heads * shape.row_bytes
        return 2 * shape.context * shape.num_kv_heads * shape.row_bytes + queries, queries

    @property
    def num_operations(self) -> int:
        """Two products of 2 d operations for every pair of a query and a key that it sees."""
        shape = self.shape
        before = shape.context - shape.prefill_tokens
        pairs = shape.prefill_tokens * before + shape.prefill_tokens * (shape.prefill_tokens + 1) // 2
        return 4 * shape.head_dim * shape.num_heads * pairs

    def compared(self, num_rows: int) -> str:
        """Of the rows' KV heads, the first and the last queries."""
        return f"{min(2 * CHECKED_QUERIES, self.shape.prefill_tokens)} of {self.shape.prefill_tokens} queries"

    def check(self, data: Inputs, arguments: dict[str, Any], result: Tensor, rows: list[Row]) -> None:
        shape = self.shape
        few = min(CHECKED_QUERIES, shape.prefill_tokens)
        for row in rows:
            if row.b:
                continue
            heads = slice(row.h * shape.group, (row.h + 1) * shape.group)
            for first in {0, shape.prefill_tokens - few}:
                seen = torch.tensor([shape.context - shape.prefill_tokens + first + few], dtype=torch.int32)
                q = arguments["q"][first : first + few, heads].cpu()
                start = torch.tensor([0, few], dtype=torch.int32)
                expected = prefill_attend_reference(q, row.k_pages, row.v_pages, row.page_table, start, seen, shape.scale)
                check_close(self.name, result[first : first + few, heads], expected, MAX_ERROR[shape.dtype])

    def peers(self, data: Inputs, arguments: dict[str, Any]) -> dict[str, Peer]:
        return {
            "sdpa": lambda: peers.sdpa_prefill(data, self.shape),
            "flashinfer": lambda: peers.flashinfer_prefill(data, self.shape),
        }

    def check_peer(self, name: str, arguments: Any, result: Tensor, of_peer: Tensor) -> None:
        check_close(name, of_peer.reshape(result.shape), result, MAX_ERROR[self.shape.dtype], "this engine's result")
