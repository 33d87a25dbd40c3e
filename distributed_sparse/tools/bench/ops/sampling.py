"""sampling: what vAttention draws, and what it learns from its pilot."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from distributed_sparse.kernels.reference import residual_statistics_reference, sample_residual_reference
from distributed_sparse.kernels.vattention.residual_statistics import ResidualStatistics, residual_statistics
from distributed_sparse.kernels.vattention.sample_residual import SAMPLE, sample_residual
from distributed_sparse.tools.bench.accuracy import check_close, check_equal
from distributed_sparse.tools.bench.layer import Inputs
from distributed_sparse.tools.bench.ops.base import Op, Row, random_pages

SAMPLE_FRACTION, MIN_SAMPLE = 0.02, 256
"""vAttention's default pilot: share of the context, and least number of tokens."""

MAX_ERROR = 1e-3
"""Of squares of squares that are summed in float32."""

STATISTICS = len(ResidualStatistics._fields)


def sample_size(op: Op) -> int:
    """Tokens that each row draws."""
    shape = op.shape
    residual = shape.context - shape.budget_pages * shape.page_size
    return max(0, min(max(int(SAMPLE_FRACTION * shape.context), MIN_SAMPLE), residual))


class SampleResidual(Op):
    """A sample of what `token_budget` tokens in pages leave over."""

    name: ClassVar[str] = "sample_residual"
    axes = ("context", "batch", "token_budget", "page_size")

    def arguments(self, data: Inputs, generator: torch.Generator) -> dict[str, Any]:
        shape, batch = self.shape, data.batch
        chosen = random_pages(data, shape.budget_pages, generator)
        counts = torch.full_like(chosen[..., 0], chosen.shape[2])
        return {
            "chosen": chosen,
            "num_chosen": counts,
            "page_table": batch.page_table,
            "context_lens": batch.context_lens,
            "num_samples": torch.full_like(counts, sample_size(self)),
            "random_key": batch.random_key,
            "block_tokens": shape.page_size,
            "page_size": shape.page_size,
            "layer": 2,
            "first_kv_head": 0,
            "draw": SAMPLE,
            "capacity": sample_size(self),
        }

    def run(self, arguments: dict[str, Any]) -> Tensor:
        return sample_residual(**arguments)

    @property
    def num_bytes(self) -> tuple[int, int]:
        """The chosen blocks and a page-table entry per drawn token; the drawn slots. Computing them is the work."""
        drawn = sample_size(self)
        return 4 * self.shape.rows * (self.shape.budget_pages + drawn), 4 * self.shape.rows * drawn

    def check(self, data: Inputs, arguments: dict[str, Any], result: Tensor, rows: list[Row]) -> None:
        for row in rows:
            b, h = slice(row.b, row.b + 1), slice(row.h, row.h + 1)
            per_row = {name: arguments[name][b, h].cpu() for name in ("chosen", "num_chosen", "num_samples")}
            expected = sample_residual_reference(
                **per_row,
                page_table=arguments["page_table"][b].cpu(),
                context_lens=arguments["context_lens"][b].cpu(),
                random_key=arguments["random_key"][:, b].cpu(),
                block_tokens=arguments["block_tokens"],
                page_size=arguments["page_size"],
                layer=arguments["layer"],
                first_kv_head=row.h,
                draw=arguments["draw"],
            )[0][0]
            check_equal(self.name, result[row.b, row.h, : len(expected)].tolist(), expected)


class ResidualMoments(Op):
    """The pilot's statistics, by which the sample is sized."""

    name: ClassVar[str] = "residual_statistics"
    axes = ("context", "batch")

    def arguments(self, data: Inputs, generator: torch.Generator) -> dict[str, Any]:
        shape = self.shape
        count = max(2, sample_size(self))
        draws = torch.rand(shape.batch, shape.num_kv_heads, shape.context, generator=generator, device=shape.device)
        positions = draws.topk(count, dim=-1).indices
        pages = data.batch.page_table[:, None].expand(-1, shape.num_kv_heads, -1).gather(2, positions // shape.page_size)
        tokens = (pages * shape.page_size + positions % shape.page_size).int()
        counts = torch.full_like(tokens[..., 0], count)
        out = torch.randn(shape.batch, shape.num_heads, shape.head_dim, generator=generator, device=shape.device)
        lse = torch.full_like(out[..., 0], math.log(shape.context))
        return {
            "q": data.q,
            "k_pages": data.cache.k_pages,
            "v_pages": data.cache.v_pages,
            "tokens": tokens,
            "num_tokens": counts,
            "num_residual": torch.full_like(counts, max(shape.context - shape.budget_pages * shape.page_size, count)),
            "partial": (out, lse),
            "scale": shape.scale,
            "centred": True,
        }

    def run(self, arguments: dict[str, Any]) -> ResidualStatistics:
        return residual_statistics(**arguments)

    @property
    def num_bytes(self) -> tuple[int, int]:
        """K and V of the pilot, its slots, the queries, the partial result; the statistics per query head."""
        shape, pilot = self.shape, max(2, sample_size(self))
        heads = shape.batch * shape.num_heads
        read = shape.rows * pilot * (2 * shape.row_bytes + 4) + shape.query_bytes + 4 * heads * (shape.head_dim + 1)
        return read, 4 * STATISTICS * heads

    def check(self, data: Inputs, arguments: dict[str, Any], result: ResidualStatistics, rows: list[Row]) -> None:
        group = self.shape.group
        for row in rows:
            heads = slice(row.h * group, (row.h + 1) * group)
            tokens = row.local_slots(arguments["tokens"][row.b, row.h], arguments["tokens"].shape[2])
            where = (slice(row.b, row.b + 1), slice(row.h, row.h + 1))
            num_tokens, num_residual = (arguments[name][where].cpu() for name in ("num_tokens", "num_residual"))
            out, lse = (x[row.b : row.b + 1, heads].cpu() for x in arguments["partial"])
            expected = residual_statistics_reference(
                row.q,
                row.k_pages,
                row.v_pages,
                tokens,
                num_tokens,
                num_residual,
                (out, lse),
                self.shape.scale,
                centred=arguments["centred"],
            )
            for name, found, exact in zip(ResidualStatistics._fields, result, expected):
                check_close(f"{self.name} ({name})", found[row.b, heads], exact[0], MAX_ERROR)
