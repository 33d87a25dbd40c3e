"""sample_plan on a CPU: `plan_samples` with `sample_plan.cpp` (one call instead of eighty), `plan_pilot` with torch."""

from __future__ import annotations

import torch

from distributed_sparse.kernels import native
from distributed_sparse.kernels.vattention.sample_plan import GUARANTEES, ROUND_TO, SamplePlan
from distributed_sparse.kernels.vattention.sample_plan_torch import bound_quantiles, plan_pilot_torch

plan_pilot_native = plan_pilot_torch


def plan_samples_native(
    statistics, lse, num_chosen, num_residual, num_pilot, num_pages, context_lens, *, guarantee, epsilon, delta, min_context,
    max_sample
):  # fmt: skip
    """See `plan_samples`."""
    batch, heads = num_residual.shape
    counts = torch.empty(5, batch, heads, dtype=torch.int32)
    log_weight, of_sparse = torch.empty(batch, heads), torch.empty(lse.shape)
    native.run(
        "plan_samples_float32", torch.stack(statistics), lse.contiguous(),
        *(x.int().contiguous() for x in (num_chosen, num_residual, num_pilot, num_pages, context_lens)), batch, heads,
        lse.shape[1] // heads, GUARANTEES.index(guarantee), float(epsilon), *bound_quantiles(guarantee, delta), ROUND_TO,
        min_context, torch.iinfo(torch.int32).max if max_sample is None else max_sample, counts, log_weight, of_sparse
    )  # fmt: skip
    budget, num_samples, of_pages, of_chosen, extra_tokens_read = counts.unbind(0)
    return SamplePlan(budget, num_samples, log_weight, of_pages, of_sparse, of_chosen, extra_tokens_read)
