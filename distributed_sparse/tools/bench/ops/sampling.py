"""sampling: vAttention's random sample, and the statistics of its pilot sample."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from distributed_sparse.kernels.reference import residual_statistics_reference, sample_residual_reference
from distributed_sparse.kernels.vattention.residual_statistics import ResidualStatistics, residual_statistics
from distributed_sparse.kernels.vattention.sample_residual import SAMPLE, sample_residual
from distributed_sparse.tools.bench.layer import Inputs
from distributed_sparse.tools.bench.ops.base import Op, random_pages, random_tokens, slots

SAMPLE_FRACTION, MIN_SAMPLE = 0.02, 256
"""vAttention's default pilot: share of the context, and least number of tokens."""

MAX_ERROR = 1e-3
"""Largest error of fourth powers that are summed in float32."""

STATISTICS = len(ResidualStatistics._fields)


def sample_size(op: Op) -> int:
    """Tokens that each row draws."""
    shape = op.shape
    residual = shape.context - shape.budget_pages * shape.page_size
    return max(0, min(max(int(SAMPLE_FRACTION * shape.context), MIN_SAMPLE), residual))


class SampleResidual(Op):
    """A random sample of the tokens outside the `token_budget` tokens in selected pages."""

    name: ClassVar[str] = "sample_residual"
    axes = ("context", "batch", "token_budget", "page_size")
    kernel = staticmethod(sample_residual)

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

    def reference(self, capacity: int, **arguments: Any) -> Tensor:
        return torch.tensor(sample_residual_reference(**arguments))

    def num_bytes(self) -> tuple[int, int]:
        """Read: the selected blocks, a page-table entry per drawn token. Written: the drawn slots. Bytes are not the limit."""
        drawn = sample_size(self)
        return 4 * self.shape.rows * (self.shape.budget_pages + drawn), 4 * self.shape.rows * drawn


class ResidualMoments(Op):
    """The pilot's statistics, from which the sample size follows."""

    name: ClassVar[str] = "residual_statistics"
    axes = ("context", "batch")
    kernel, reference = staticmethod(residual_statistics), staticmethod(residual_statistics_reference)
    max_error = MAX_ERROR

    def arguments(self, data: Inputs, generator: torch.Generator) -> dict[str, Any]:
        shape = self.shape
        count = max(2, sample_size(self))
        tokens = slots(data, random_tokens(data, count, generator))
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

    def num_bytes(self) -> tuple[int, int]:
        """Read: K, V and slots of the pilot, the queries, the partial result. Written: the statistics per query head."""
        shape, pilot = self.shape, max(2, sample_size(self))
        heads = shape.batch * shape.num_heads
        read = shape.rows * pilot * (2 * shape.row_bytes + 4) + shape.query_bytes + 4 * heads * (shape.head_dim + 1)
        return read, 4 * STATISTICS * heads


OPS: tuple[type[Op], ...] = (ResidualMoments, SampleResidual)
