"""selection: the kernels that select: page scores, top-k, low-bit logits, top-p, Hamming scores of hash signatures."""

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
from distributed_sparse.tools.bench.accuracy import WrongResult, check_equal
from distributed_sparse.tools.bench.layer import Inputs
from distributed_sparse.tools.bench.ops.base import Op, Peer, physical, random_pages
from distributed_sparse.tools.bench.rows import Row

EXACT = 1e-5
"""Largest error of results that are computed in float32 from equal bits."""

CANDIDATE_FRACTION, MIN_CANDIDATES, P = 0.25, 1024, 0.95
"""Twilight's defaults: candidates as a share of the context, their least number, and the probability mass to keep."""

SINK_PAGES, RECENT_PAGES = 1, 2

HASH_BITS = 32


def candidate_pages(op: Op) -> int:
    """Candidate pages of Twilight's selector."""
    shape = op.shape
    tokens = max(int(CANDIDATE_FRACTION * shape.context), min(MIN_CANDIDATES, shape.context))
    return min(-(-tokens // shape.page_size), shape.pages)


class _Scores(Op):
    max_error = EXACT


class PageScores(_Scores):
    """Quest's upper bound of every page's logits."""

    name: ClassVar[str] = "page_scores"
    axes = ("context", "batch", "page_size")
    kernel, reference = staticmethod(page_scores), staticmethod(page_scores_reference)

    def arguments(self, data: Inputs, generator: torch.Generator) -> dict[str, Any]:
        return {
            "q": data.q,
            "page_min_max": data.cache.metadata["page_min_max"],
            "page_table": data.batch.page_table,
            "num_pages": data.batch.num_pages,
        }

    def num_bytes(self) -> tuple[int, int]:
        """Read: a minimum and a maximum per page and row, the queries, the page table. Written: a float32 score each."""
        shape = self.shape
        read = shape.rows * shape.pages * 2 * shape.row_bytes + shape.query_bytes + 4 * shape.batch * shape.pages
        return read, 4 * shape.rows * shape.pages


class TopKPages(Op):
    """The best pages for `token_budget` tokens; the first and the newest pages are forced."""

    name: ClassVar[str] = "top_k_pages"
    axes = ("context", "batch", "token_budget", "page_size")
    kernel = staticmethod(top_k_pages)

    def arguments(self, data: Inputs, generator: torch.Generator) -> dict[str, Any]:
        shape = self.shape
        scores = torch.randn(shape.batch, shape.num_kv_heads, shape.pages, generator=generator, device=shape.device)
        scores[..., :SINK_PAGES] = scores[..., -RECENT_PAGES:] = 100.0  # so that a peer without forced pages selects the same
        return {
            "scores": scores,
            "page_table": data.batch.page_table,
            "num_pages": data.batch.num_pages,
            "k": torch.full_like(data.batch.num_pages, shape.budget_pages),
            "sink_pages": SINK_PAGES,
            "recent_pages": RECENT_PAGES,
            "capacity": shape.budget_pages,
        }

    def num_bytes(self) -> tuple[int, int]:
        """Read: a float32 score per page and row, the page table. Written: an int32 per selected page, and a count per row."""
        shape = self.shape
        return 4 * shape.pages * (shape.rows + shape.batch), 4 * shape.rows * (shape.budget_pages + 1)

    def reference(self, capacity: int, **arguments: Any) -> tuple[Tensor, Tensor]:
        selected = top_k_pages_reference(**arguments)
        return torch.tensor(selected), torch.tensor([[len(pages) for pages in of_heads] for of_heads in selected])

    def peers(self, data: Inputs, arguments: dict[str, Any]) -> dict[str, Peer]:
        return {"torch.topk": lambda: peers.torch_topk(self.shape), "flashinfer": lambda: peers.flashinfer_topk(self.shape)}

    def check_peer(self, name: str, arguments: dict[str, Any], result: Any, of_peer: Tensor) -> None:
        """Compare the selected pages in any order."""
        logical = of_peer.long().sort(dim=-1).values
        table = arguments["page_table"][:, None].expand(-1, logical.shape[1], -1)
        check_equal(name, table.gather(2, logical), result[0])


class Int4Logits(_Scores):
    """Twilight's estimate of the candidates' logits from the 4-bit keys."""

    name: ClassVar[str] = "int4_logits"
    axes = ("context", "batch", "page_size")
    kernel, reference = staticmethod(int4_logits), staticmethod(int4_logits_reference)

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

    def num_bytes(self) -> tuple[int, int]:
        """Read: half a byte per channel and two fp16 per candidate, page list, queries. Written: a float32 per logit."""
        shape, tokens = self.shape, candidate_pages(self) * self.shape.page_size
        read = shape.rows * (tokens * (shape.head_dim // 2 + 4) + 4 * candidate_pages(self)) + shape.query_bytes
        return read, 4 * shape.batch * shape.num_heads * tokens


class TopP(Op):
    """Twilight's pruning of its candidates."""

    name: ClassVar[str] = "top_p"
    axes = ("context", "batch", "page_size")
    kernel = staticmethod(top_p)

    def arguments(self, data: Inputs, generator: torch.Generator) -> dict[str, Any]:
        estimate = Int4Logits(self.shape)
        candidates = estimate.arguments(data, generator)
        lists = {name: candidates[name] for name in ("pages", "num_pages", "last_page_len")}
        forced = {"sink_pages": SINK_PAGES, "recent_pages": RECENT_PAGES}
        return {"logits": estimate.run(candidates), **lists, "p": P, "page_size": self.shape.page_size, **forced}

    def num_bytes(self) -> tuple[int, int]:
        """Read: a float32 logit per candidate and query head, the page lists. Written: a threshold per query head and a count
        per row. The slots of the kept tokens depend on the data and are not counted."""
        shape, pages = self.shape, candidate_pages(self)
        read = 4 * shape.batch * shape.num_heads * pages * shape.page_size + 4 * shape.rows * pages
        return read, 4 * (shape.batch * shape.num_heads + shape.rows)

    def check(self, arguments: dict[str, Any], result: tuple[Tensor, ...], rows: list[Row]) -> None:
        size = self.shape.page_size
        for row in rows:
            given, tokens, count = row.arguments(arguments), row.part(result[0]), row.part(result[1])
            listed = given["pages"].shape[2] * size
            held = listed - size + int(given["last_page_len"])
            kept = torch.zeros(held, dtype=torch.bool)
            kept[: SINK_PAGES * size], kept[listed - RECENT_PAGES * size :] = True, True
            doubtful = torch.zeros_like(kept)
            for logits in given["logits"][0, :, :held]:
                inner, outer = top_p_reference(logits, P - 1e-6), top_p_reference(logits, P + 1e-6)
                kept |= inner
                doubtful |= outer & ~inner  # the float32 sum of the mass may round to either side of p
            position = torch.arange(held)
            slots = given["pages"][0, 0, position // size] * size + position % size
            found, least = set(tokens[0, 0, : int(count)].tolist()), set(slots[kept].tolist())
            if not (least <= found <= least | set(slots[doubtful].tolist())):
                raise WrongResult(f"{self.name}: kept {len(found)} tokens, which differ from the {len(least)} of float64")


class HammingScores(Op):
    """HashAttention's scores of every token, from 32-bit signatures per query head."""

    name: ClassVar[str] = "hamming_scores"
    axes = ("context", "batch", "page_size")
    kernel, reference = staticmethod(hamming_scores), staticmethod(hamming_scores_reference)

    def arguments(self, data: Inputs, generator: torch.Generator) -> dict[str, Any]:
        shape, words = self.shape, HASH_BITS // 32
        num_pages = len(data.cache.k_pages)

        def random(*sizes: int) -> Tensor:
            bounds = (-(2**31), 2**31)
            return torch.randint(*bounds, sizes, generator=generator, device=shape.device, dtype=torch.int64).int()

        return {
            "q_signatures": random(shape.batch, shape.num_heads, words),
            "signatures": random(num_pages, shape.num_kv_heads, shape.page_size, shape.group, words),
            "page_table": data.batch.page_table,
            "context_lens": data.batch.context_lens,
        }

    def num_bytes(self) -> tuple[int, int]:
        """Read: a signature per token and query head and per query, the page table. Written: an int32 per token and row."""
        shape = self.shape
        signature = HASH_BITS // 8
        read = shape.batch * shape.num_heads * (shape.context + 1) * signature + 4 * shape.batch * shape.pages
        return read, 4 * shape.rows * shape.context


OPS: tuple[type[Op], ...] = (PageScores, TopKPages, Int4Logits, TopP, HammingScores)
