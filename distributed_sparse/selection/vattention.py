"""vattention: sinks, window and top-k exactly, and a random sample of the rest with an error bound (arXiv 2510.05688)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from distributed_sparse.cache import Geometry, LayerCache
from distributed_sparse.kernels.vattention.residual_statistics import ResidualStatistics, residual_statistics
from distributed_sparse.kernels.vattention.sample_plan import GUARANTEES, MIN_PILOT, SamplePlan, plan_pilot, plan_samples
from distributed_sparse.kernels.vattention.sample_residual import PILOT, SAMPLE, sample_residual
from distributed_sparse.selection.base import (
    DecodeBatch,
    Policy,
    Selection,
    SparseConfig,
    attend_partially,
    dense_selection,
    slots_of,
)
from distributed_sparse.selection.top_k import scorer_class, top_k_logical
from distributed_sparse.utils.validation import check_choice, check_float, check_int


@dataclass(frozen=True, kw_only=True)
class VAttentionConfig(SparseConfig):
    """Settings of vAttention.

    epsilon: bound of the relative L2 error of what `guarantee` names.
    delta: probability that the bound is exceeded.
    """

    method: ClassVar[str] = "vattention"
    epsilon: float = 0.1
    delta: float = 0.1
    guarantee: str = "output"
    selector: str = "quest"
    top_k_fraction: float = 0.05
    sink_tokens: int = 128
    window_tokens: int = 128
    base_fraction: float = 0.02
    max_sample: int | None = None
    hash_weights: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epsilon", "delta"):
            value = check_float(f"sparse.{name}", getattr(self, name), 0.0, 1.0, low_excluded=True, remedy="0.1 is usual")
            if value == 1:
                raise ValueError(f"sparse.{name}=1 bounds nothing; 0.1 is usual")
        check_choice("sparse.guarantee", self.guarantee, GUARANTEES)
        if self.guarantee == "numerator_denominator" and self.delta > 0.2:
            raise ValueError(
                f"sparse.delta={self.delta} is over 0.2, the limit of guarantee='numerator_denominator'; set it to 0.2 or less"
            )
        scorer_class(self.selector).check_config(self)
        remedy = "give a share of the context, 0 to 1"
        check_float("sparse.top_k_fraction", self.top_k_fraction, 0.0, 1.0, remedy=remedy)
        check_float("sparse.base_fraction", self.base_fraction, 0.0, 1.0, remedy=remedy)
        check_int("sparse.sink_tokens", self.sink_tokens, 0, remedy="give a number of tokens")
        check_int("sparse.window_tokens", self.window_tokens, 1, remedy="the newest token is always attended")
        if self.max_sample is not None:
            check_int("sparse.max_sample", self.max_sample, MIN_PILOT, remedy="rows that need more go dense")

    @cached_property
    def _chooses_tokens(self) -> bool:
        """Cached: `choice` is called for each layer in every step."""
        return scorer_class(self.selector).per_token

    def choice(self, page_size: int) -> tuple[int, int, int]:
        """(block, sinks, recent): tokens per block (a page, or one token), and blocks that are always chosen at each end."""
        block = 1 if self._chooses_tokens else page_size
        sinks = -(-max(self.sink_tokens, self.sink_pages * page_size) // block)
        # The newest page may be partial, so a window in pages needs one more page.
        window = max(self.window_tokens, self.recent_pages * page_size if block == 1 else 0)
        return block, sinks, max(-(-window // block) + (block > 1), self.recent_pages)

    def sparse_from(self, page_size: int) -> int:
        """Tokens of the shortest context that can be sparse. Shorter ones are not sampled, or their sample never pays."""
        block, sinks, recent = self.choice(page_size)
        chosen = (sinks + recent - 1) * block + 1  # at least, as the newest page may hold one token
        return max(self.min_context, 2 * (chosen + MIN_PILOT))

    def pilot_size(self, num_residual: int) -> int:
        """Tokens of a row's pilot sample, as computed by `plan_pilot`."""
        return min(max(math.ceil(num_residual * self.base_fraction), MIN_PILOT), num_residual)

    def attended_tokens(self, context_len: int, page_size: int) -> int | None:
        return context_len if context_len < self.sparse_from(page_size) else None

    def extra_tokens(self, context_len: int, page_size: int) -> int:
        """The pilot sample. A row that falls back to dense also reads its chosen tokens twice; that is not included."""
        if context_len < self.sparse_from(page_size):
            return 0
        block, sinks, recent = self.choice(page_size)
        blocks = -(-context_len // block)
        chosen = min(math.ceil(context_len * (self.top_k_fraction / block)) + sinks + recent, blocks)
        num_residual = (blocks - chosen) * block
        return self.pilot_size(num_residual) if num_residual >= 2 * MIN_PILOT else 0


class VAttentionPolicy(Policy):
    """Attends to sinks, window and predicted top-k with weight 1, and to a sample of the residual with weight n_s / b.

    n_s: tokens of the residual, which is all other tokens; b: tokens of the sample. The first part is attended here, as its
    result determines b (`kernels/vattention/sample_plan.py`), and passed on as `partial`. A row whose sample would be too large
    to pay is dense; a sample is never truncated.
    """

    config_class = VAttentionConfig
    graph_safe = True
    config: VAttentionConfig

    def __init__(self, config: SparseConfig, geometry: Geometry) -> None:
        super().__init__(config, geometry)
        self.selector = scorer_class(self.config.selector).from_config(self.config, geometry)
        self.metadata = self.selector.metadata
        self.graph_safe = self.selector.graph_safe
        # Chosen blocks, which are excluded from the residual, are pages or single tokens.
        self.block, self.sinks, self.recent = self.config.choice(geometry.page_size)

    def select(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Selection:
        if self.is_dense(batch.max_context_len):
            return dense_selection(batch, self.geometry.num_kv_heads)
        chosen, num_chosen = self.choose(q, cache, batch)
        first = self._as_selection(chosen, num_chosen, batch)
        with self.timer("attend_chosen"):
            partial = attend_partially(q, cache, batch, first, self.geometry.scale)
        n_s, m = plan_pilot(num_chosen, batch.context_lens, block_tokens=self.block, base_fraction=self.config.base_fraction)
        pilot = self.draw(chosen, num_chosen, m, cache, batch, PILOT, self._pilot_capacity(batch.max_context_len))
        statistics = self.estimate(q, cache, pilot, m, n_s, partial)
        plan = self.plan(statistics, partial[1], num_chosen, n_s, m, batch)
        most = self._sample_capacity(batch.max_context_len)
        tokens = self.draw(chosen, num_chosen, plan.num_samples, cache, batch, SAMPLE, most)
        in_pages = self.block > 1
        listed = replace(first, num_pages=plan.num_chosen) if in_pages else replace(first, num_tokens=plan.num_chosen)
        selection = Selection(
            dense_selection(batch, self.geometry.num_kv_heads).pages,
            plan.num_pages,
            tokens,
            plan.num_samples,
            log_weight=plan.log_weight,
            partial=(partial[0], plan.lse),
            partial_selection=listed,
            extra_tokens_read=plan.extra_tokens_read,
        )
        if batch.trace:
            selection.details = {
                "chosen": (batch.context_lens[:, None] - n_s).float(),
                "pilot": m.float(),
                "budget": plan.budget.float(),
                "is_dense": (plan.num_samples == 0).float(),
                **{name: value for name, value in statistics._asdict().items()},
            }
        return selection

    # ---- the parts of `select`, in order

    def choose(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> tuple[Tensor, Tensor]:
        """Sinks, window and predicted top-k: logical pages or positions int32 [B, H_kv, F] ascending; counts [B, H_kv]."""
        counts = batch.context_lens if self.block == 1 else batch.num_pages
        fraction = self.config.top_k_fraction / self.block
        forced = self.sinks + self.recent
        k = batch.cached_per_step(
            ("chosen", fraction, forced), lambda: (batch.context_lens.double() * fraction).ceil().to(torch.int32) + forced
        )
        capacity = math.ceil(batch.max_context_len * fraction) + forced
        with self.timer("score"):
            scores = self.selector.scores(q, cache, batch)
        capacity = min(capacity, scores.shape[2])
        with self.timer("top_k"):
            return top_k_logical(scores, counts, k, batch, sinks=self.sinks, recent=self.recent, capacity=capacity)

    def draw(
        self, chosen: Tensor, num_chosen: Tensor, count: Tensor, cache: LayerCache, batch: DecodeBatch, draw: int, capacity: int
    ) -> Tensor:
        """Draw `count` tokens of each row's residual: physical token slots int32 [B, H_kv, capacity]."""
        with self.timer("sample"):
            return sample_residual(
                chosen,
                num_chosen,
                batch.page_table,
                batch.context_lens,
                count,
                batch.random_key,
                block_tokens=self.block,
                page_size=batch.page_size,
                layer=cache.layer,
                first_kv_head=self.geometry.first_kv_head,
                draw=draw,
                capacity=capacity,
            )

    def estimate(
        self, q: Tensor, cache: LayerCache, pilot: Tensor, m: Tensor, n_s: Tensor, partial: tuple[Tensor, Tensor]
    ) -> ResidualStatistics:
        """Statistics of the residual, estimated from the pilot."""
        with self.timer("estimate"):
            return residual_statistics(
                q,
                cache.k_pages,
                cache.v_pages,
                pilot,
                m,
                n_s,
                partial,
                self.geometry.scale,
                centred=self.config.guarantee == "output",
            )

    def plan(
        self,
        statistics: ResidualStatistics,
        lse: Tensor,
        num_chosen: Tensor,
        num_residual: Tensor,
        num_pilot: Tensor,
        batch: DecodeBatch,
    ) -> SamplePlan:
        """Sample size of each row, and which rows go dense. lse: float32 [B, H_q] of the chosen part."""
        config = self.config
        return plan_samples(
            statistics,
            lse,
            num_chosen,
            num_residual,
            num_pilot,
            batch.num_pages,
            batch.context_lens,
            guarantee=config.guarantee,
            epsilon=config.epsilon,
            delta=config.delta,
            min_context=config.min_context,
            max_sample=config.max_sample,
        )

    # ---- widths and shortcuts, known on the host

    def is_dense(self, max_context_len: int) -> bool:
        """Whether every context up to this length is dense: too short to be sampled, or its sample could never pay."""
        return max_context_len < self.config.sparse_from(self.geometry.page_size)

    def _pilot_capacity(self, max_context_len: int) -> int:
        return min(max(MIN_PILOT, math.ceil(self.config.base_fraction * max_context_len)), max_context_len)

    def _sample_capacity(self, max_context_len: int) -> int:
        most = max_context_len // 2
        return most if self.config.max_sample is None else min(most, self.config.max_sample)

    def _as_selection(self, chosen: Tensor, counts: Tensor, batch: DecodeBatch) -> Selection:
        if self.block == 1:
            nothing = dense_selection(batch, counts.shape[1])
            return Selection(nothing.pages, torch.zeros_like(counts), slots_of(chosen, batch), counts)
        pages = chosen.clamp(0, batch.page_table.shape[1] - 1).long()
        table = batch.page_table[:, None].expand(-1, chosen.shape[1], -1)
        return Selection(table.gather(2, pages), counts)

    def bytes_scored(self, context_lens: list[int], max_context_len: int | None = None) -> int:
        return self.selector.bytes_scored(context_lens)
