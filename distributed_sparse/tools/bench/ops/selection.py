"""selection: the kernels that choose: page scores, top-k, the low-bit estimate, top-p, hash signatures."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from distributed_sparse.kernels.hash.hamming_scores import hamming_scores
from distributed_sparse.kernels.quest.page_scores import page_scores
from distributed_sparse.kernels.quest.top_k_pages import top_k_pages
from distributed_sparse.kernels.reference import (
    hamming_scores_reference,
    int4_logits_reference,
    page_scores_reference,
    top_k_pages_reference,
    top_p_reference,
)
from distributed_sparse.kernels.twilight.int4_logits import int4_logits
from distributed_sparse.kernels.twilight.top_p import top_p
from distributed_sparse.tools.bench import peers
from distributed_sparse.tools.bench.accuracy import WrongResult, check_close, check_equal
from distributed_sparse.tools.bench.layer import Inputs
from distributed_sparse.tools.bench.ops.base import Op, Peer, Row, physical, random_pages

EXACT = 1e-5
"""Of what is computed in float32 from equal bits."""

CANDIDATE_FRACTION, MIN_CANDIDATES, P = 0.25, 1024, 0.95
"""Twilight's defaults: its candidates' share of the context, their least number, and the mass to keep."""

SINK_PAGES, RECENT_PAGES = 1, 2

HASH_BITS = 32


def candidate_pages(op: Op) -> int:
    """Pages that Twilight's selector hands to its pruner."""
    shape = op.shape
    tokens = max(int(CANDIDATE_FRACTION * shape.context), min(MIN_CANDIDATES, shape.context))
    return min(-(-tokens // shape.page_size), shape.pages)


class PageScores(Op):
    """Quest's bound of every page."""

    name: ClassVar[str] = "page_scores"
    axes = ("context", "batch", "page_size")

    def arguments(self, data: Inputs, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return data.q, data.cache.metadata["page_min_max"], data.batch.page_table, data.batch.num_pages

    def run(self, arguments: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        return page_scores(*arguments)

    @property
    def num_bytes(self) -> tuple[int, int]:
        """A minimum and a maximum per page and row, the queries, the page table; a float32 score each."""
        shape = self.shape
        read = shape.rows * shape.pages * 2 * shape.row_bytes + shape.query_bytes + 4 * shape.batch * shape.pages
        return read, 4 * shape.rows * shape.pages

    def check(self, data: Inputs, arguments: tuple[Tensor, ...], result: Tensor, rows: list[Row]) -> None:
        bounds = data.cache.metadata["page_min_max"]
        for row in rows:
            own = bounds[data.batch.page_table[row.b].long(), row.h][:, None].cpu()
            expected = page_scores_reference(row.q, own, row.page_table, row.num_pages)
            check_close(self.name, result[row.b, row.h], expected[0, 0], EXACT)


class TopKPages(Op):
    """The best `token_budget` tokens' worth of pages, the first and the newest forced."""

    name: ClassVar[str] = "top_k_pages"
    axes = ("context", "batch", "token_budget", "page_size")

    def arguments(self, data: Inputs, generator: torch.Generator) -> dict[str, Any]:
        shape = self.shape
        scores = torch.randn(shape.batch, shape.num_kv_heads, shape.pages, generator=generator, device=shape.device)
        scores[..., :SINK_PAGES] = scores[..., -RECENT_PAGES:] = 100.0  # forced: a peer without forced pages finds the same
        return {
            "scores": scores,
            "page_table": data.batch.page_table,
            "num_pages": data.batch.num_pages,
            "k": torch.full_like(data.batch.num_pages, shape.budget_pages),
            "sink_pages": SINK_PAGES,
            "recent_pages": RECENT_PAGES,
            "capacity": shape.budget_pages,
        }

    def run(self, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return top_k_pages(**arguments)

    @property
    def num_bytes(self) -> tuple[int, int]:
        """A float32 score per page and row, the page table; an int32 page each, and a count."""
        shape = self.shape
        return 4 * shape.pages * (shape.rows + shape.batch), 4 * shape.rows * (shape.budget_pages + 1)

    def check(self, data: Inputs, arguments: dict[str, Any], result: tuple[Tensor, Tensor], rows: list[Row]) -> None:
        pages, counts = result
        for row in rows:
            own = {name: arguments[name][row.b : row.b + 1].cpu() for name in ("page_table", "num_pages", "k")}
            scores = arguments["scores"][row.b : row.b + 1, row.h : row.h + 1].cpu()
            expected = top_k_pages_reference(scores, **own, sink_pages=SINK_PAGES, recent_pages=RECENT_PAGES)[0][0]
            check_equal(self.name, pages[row.b, row.h, : int(counts[row.b, row.h])].tolist(), expected)

    def peers(self, data: Inputs, arguments: dict[str, Any]) -> dict[str, Peer]:
        return {"torch.topk": lambda: peers.torch_topk(self.shape), "flashinfer": lambda: peers.flashinfer_topk(self.shape)}

    def check_peer(self, name: str, arguments: dict[str, Any], result: Any, of_peer: Tensor) -> None:
        """The pages that are chosen, whatever their order."""
        logical = of_peer.long().sort(dim=-1).values
        table = arguments["page_table"][:, None].expand(-1, logical.shape[1], -1)
        check_equal(name, table.gather(2, logical), result[0])


class Int4Logits(Op):
    """Twilight's estimate of the candidates' logits from the 4-bit keys."""

    name: ClassVar[str] = "int4_logits"
    axes = ("context", "batch", "page_size")

    def arguments(self, data: Inputs, generator: torch.Generator) -> dict[str, Any]:
        pages = physical(data, random_pages(data, candidate_pages(self), generator))
        return {
            "q": data.q,
            "key_codes": data.cache.metadata["key_codes"],
            "key_scales": data.cache.metadata["key_scales"],
            "pages": pages,
            "num_pages": torch.full_like(pages[..., 0], pages.shape[2]),
            "last_page_len": data.batch.last_page_len,
            "scale": self.shape.scale,
        }

    def run(self, arguments: dict[str, Any]) -> Tensor:
        return int4_logits(**arguments)

    @property
    def num_bytes(self) -> tuple[int, int]:
        """Half a byte per channel, two fp16 and a share of the list per candidate; a float32 logit per query head."""
        shape, tokens = self.shape, candidate_pages(self) * self.shape.page_size
        read = shape.rows * (tokens * (shape.head_dim // 2 + 4) + 4 * candidate_pages(self)) + shape.query_bytes
        return read, 4 * shape.batch * shape.num_heads * tokens

    def check(self, data: Inputs, arguments: dict[str, Any], result: Tensor, rows: list[Row]) -> None:
        shape = self.shape
        for row in rows:
            table = data.batch.page_table[row.b].long()
            codes, scales = (arguments[name][table, row.h][:, None].cpu() for name in ("key_codes", "key_scales"))
            pages = row.local_pages(arguments["pages"][row.b, row.h], arguments["pages"].shape[2])
            count = torch.tensor([[pages.shape[2]]])
            expected = int4_logits_reference(row.q, codes, scales, pages, count, row.last_page_len, shape.scale)
            found = result[row.b, row.h * shape.group : (row.h + 1) * shape.group]
            check_close(self.name, found, expected[0], EXACT)


class TopP(Op):
    """Twilight's pruning of its candidates."""

    name: ClassVar[str] = "top_p"
    axes = ("context", "batch", "page_size")

    def arguments(self, data: Inputs, generator: torch.Generator) -> dict[str, Any]:
        estimate = Int4Logits(self.shape)
        candidates = estimate.arguments(data, generator)
        lists = {name: candidates[name] for name in ("pages", "num_pages", "last_page_len")}
        forced = {"sink_pages": SINK_PAGES, "recent_pages": RECENT_PAGES}
        return {"logits": estimate.run(candidates), **lists, "p": P, "page_size": self.shape.page_size, **forced}

    def run(self, arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        return top_p(**arguments)

    @property
    def num_bytes(self) -> tuple[int, int]:
        """A float32 logit per candidate and query head, the lists; a threshold per query head and a count per row. (The kept
        tokens' slots, which the data decides, are not counted.)"""
        shape, pages = self.shape, candidate_pages(self)
        read = 4 * shape.batch * shape.num_heads * pages * shape.page_size + 4 * shape.rows * pages
        return read, 4 * (shape.batch * shape.num_heads + shape.rows)

    def check(self, data: Inputs, arguments: dict[str, Any], result: tuple[Tensor, ...], rows: list[Row]) -> None:
        tokens, counts, _ = result
        shape, size = self.shape, self.shape.page_size
        for row in rows:
            pages, listed = arguments["pages"][row.b, row.h].cpu(), arguments["pages"].shape[2] * size
            held = listed - size + int(arguments["last_page_len"][row.b])
            logits = arguments["logits"][row.b, row.h * shape.group : (row.h + 1) * shape.group, :held].cpu()
            kept = torch.zeros(held, dtype=torch.bool)
            kept[: SINK_PAGES * size], kept[listed - RECENT_PAGES * size :] = True, True
            exact = kept.clone()
            doubtful = torch.zeros(held, dtype=torch.bool)
            for own in logits:
                inner, outer = top_p_reference(own, P - 1e-6), top_p_reference(own, P + 1e-6)
                exact |= inner
                doubtful |= outer & ~inner  # the float32 sum of the mass may stand on either side of p
            position = torch.arange(held)
            slots = pages[position // size] * size + position % size
            found = set(tokens[row.b, row.h, : int(counts[row.b, row.h])].tolist())
            least = set(slots[exact].tolist())
            if not (least <= found <= least | set(slots[doubtful].tolist())):
                raise WrongResult(f"{self.name}: {len(found)} tokens are kept, and other ones than the {len(least)} of float64")


class HammingScores(Op):
    """HashAttention's scores of every token, from signatures of 32 bits per query head."""

    name: ClassVar[str] = "hamming_scores"
    axes = ("context", "batch", "page_size")

    def arguments(self, data: Inputs, generator: torch.Generator) -> tuple[Tensor, ...]:
        shape, words = self.shape, HASH_BITS // 32
        num_pages = len(data.cache.k_pages)

        def random(*sizes: int) -> Tensor:
            bounds = (-(2**31), 2**31)
            return torch.randint(*bounds, sizes, generator=generator, device=shape.device, dtype=torch.int64).int()

        signatures = random(num_pages, shape.num_kv_heads, shape.page_size, shape.group, words)
        queries = random(shape.batch, shape.num_heads, words)
        return queries, signatures, data.batch.page_table, data.batch.context_lens

    def run(self, arguments: tuple[Tensor, ...]) -> Tensor:
        return hamming_scores(*arguments)

    @property
    def num_bytes(self) -> tuple[int, int]:
        """A signature per token and query head, those of the queries, the page table; an int32 score per token and row."""
        shape = self.shape
        signature = HASH_BITS // 8
        read = shape.batch * shape.num_heads * (shape.context + 1) * signature + 4 * shape.batch * shape.pages
        return read, 4 * shape.rows * shape.context

    def check(self, data: Inputs, arguments: tuple[Tensor, ...], result: Tensor, rows: list[Row]) -> None:
        queries, signatures, table, lengths = arguments
        group = self.shape.group
        for row in rows:
            own = signatures[table[row.b].long(), row.h][:, None].cpu()
            q = queries[row.b : row.b + 1, row.h * group : (row.h + 1) * group].cpu()
            expected = hamming_scores_reference(q, own, row.page_table, lengths[row.b : row.b + 1].cpu())
            check_equal(self.name, result[row.b, row.h].cpu(), expected[0, 0])
