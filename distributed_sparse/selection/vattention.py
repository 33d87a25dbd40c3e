"""vattention: the tokens that matter, exactly, and a sample of the rest that is large enough (vAttention, arXiv 2510.05688)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from distributed_sparse.kernels.residual_statistics import ResidualStatistics, residual_statistics
from distributed_sparse.kernels.sample_residual import PILOT, SAMPLE, sample_residual
from distributed_sparse.selection.base import (
    DecodeBatch,
    Policy,
    Selection,
    SparseConfig,
    attend_partially,
    dense_selection,
    slots_of,
    token_selection,
)
from distributed_sparse.selection.hash import check_hash_weights
from distributed_sparse.selection.metadata import Geometry, LayerCache
from distributed_sparse.selection.predictor import top_k_logical
from distributed_sparse.selection.sample_size import GUARANTEES, round_up, sample_size
from distributed_sparse.selection.selector import SELECTORS, is_per_token, make_selector
from distributed_sparse.validation import check_choice, check_float, check_int

MIN_PILOT = 256
"""Tokens of a pilot at least; a residual of fewer than twice as many is not sampled: the row is dense."""


@dataclass(frozen=True, kw_only=True)
class VAttentionConfig(SparseConfig):
    """`epsilon`: relative L2 error that `guarantee` speaks of; `delta`: how often it may be exceeded."""

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
                f"sparse.delta={self.delta} is beyond what guarantee='numerator_denominator' can promise; set it to 0.2 or less"
            )
        check_choice("sparse.selector", self.selector, SELECTORS)
        remedy = "give a share of the context, 0 to 1"
        check_float("sparse.top_k_fraction", self.top_k_fraction, 0.0, 1.0, remedy=remedy)
        check_float("sparse.base_fraction", self.base_fraction, 0.0, 1.0, remedy=remedy)
        check_int("sparse.sink_tokens", self.sink_tokens, 0, remedy="give a number of tokens")
        check_int("sparse.window_tokens", self.window_tokens, 1, remedy="the newest token is always attended")
        if self.max_sample is not None:
            check_int("sparse.max_sample", self.max_sample, MIN_PILOT, remedy="rows that need more go dense")
        if self.selector == "hash":
            check_hash_weights(self.hash_weights)

    def choice(self, page_size: int) -> tuple[int, int, int]:
        """(block, sinks, recent): tokens of what is chosen, pages or single tokens, and how many are always chosen."""
        block = 1 if is_per_token(self.selector) else page_size
        sinks = -(-max(self.sink_tokens, self.sink_pages * page_size) // block)
        # The newest page may be partial: one more page holds the window whole.
        window = max(self.window_tokens, self.recent_pages * page_size if block == 1 else 0)
        return block, sinks, max(-(-window // block) + (block > 1), self.recent_pages)

    def sparse_from(self, page_size: int) -> int:
        """Tokens of the shortest context that can be sparse: shorter ones are not sampled, or their sample never pays."""
        block, sinks, recent = self.choice(page_size)
        chosen = (sinks + recent - 1) * block + 1  # at least, as the newest page may hold one token
        return max(self.min_context, 2 * (chosen + MIN_PILOT))

    def pilot_size(self, num_residual: int) -> int:
        """Tokens of a row's pilot; as `VAttentionPolicy.pilot_size`."""
        return min(max(math.ceil(num_residual * self.base_fraction), MIN_PILOT), num_residual)

    def attended_tokens(self, context_len: int, page_size: int) -> int | None:
        return context_len if context_len < self.sparse_from(page_size) else None

    def read_apart_tokens(self, context_len: int, page_size: int) -> int:
        """The pilot. (A row whose sample would not pay reads what was chosen first apart, too.)"""
        if context_len < self.sparse_from(page_size):
            return 0
        block, sinks, recent = self.choice(page_size)
        blocks = -(-context_len // block)
        chosen = min(math.ceil(context_len * (self.top_k_fraction / block)) + sinks + recent, blocks)
        num_residual = (blocks - chosen) * block
        return self.pilot_size(num_residual) if num_residual >= 2 * MIN_PILOT else 0


class VAttentionPolicy(Policy):
    """Attends sinks, window and predicted top-k with weight 1; then a sample of the residual, each token for n_s / b.

    The first part is attended here, for its result sizes the sample (`sample_size.py`), and handed on as `Selection.partial`.
    A row whose sample would be too large to pay is dense; a sample is never truncated.
    """

    config_class = VAttentionConfig
    graph_safe = True
    config: VAttentionConfig

    def __init__(self, config: SparseConfig, geometry: Geometry) -> None:
        super().__init__(config, geometry)
        self.selector = make_selector(self.config.selector, geometry, self.config.hash_weights)
        self.metadata = self.selector.metadata
        self.launches = {  # of the selector quest; another one's own kernels are more
            **{"_page_scores_kernel": 1, "_top_k_pages_kernel": 1, "_attend_kernel": 1, "_combine_kernel": 1},
            **{"_sample_residual_kernel": 2, "_residual_statistics_kernel": 1, "_count_attended_kernel": 1},
            "aten": {"output": 115, "numerator_denominator": 114, "denominator": 80}[self.config.guarantee],
        }
        self.graph_safe = self.selector.graph_safe
        # What is chosen, and cut out of the residual: pages, or single tokens.
        self.block, self.sinks, self.recent = self.config.choice(geometry.page_size)

    def select(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Selection:
        if self.is_dense(batch.max_context_len):
            return dense_selection(batch, self.geometry.num_kv_heads)
        chosen, num_chosen = self.choose(q, cache, batch)
        first = self._as_selection(chosen, num_chosen, batch)
        with self.timer("attend_chosen"):
            partial = attend_partially(q, cache, batch, first, self.geometry.scale)
        n_s = batch.context_lens[:, None] - first.attended(batch.last_page_len, batch.page_size)  # [B, H_kv]
        sampled = n_s >= 2 * MIN_PILOT
        m = self.pilot_size(n_s) * sampled
        pilot = self.draw(chosen, num_chosen, m, cache, batch, PILOT, self._pilot_capacity(batch.max_context_len))
        statistics = self.estimate(q, cache, pilot, m, n_s, partial)
        b = self.sample_sizes(statistics, n_s, m)
        config, n = self.config, batch.context_lens[:, None]
        fits = sampled & (2 * (n - n_s + b) <= n) & (n >= config.min_context)
        if config.max_sample is not None:
            fits = fits & (b <= config.max_sample)
        count = b * fits
        tokens = self.draw(chosen, num_chosen, count, cache, batch, SAMPLE, self._sample_capacity(batch.max_context_len))
        selection = token_selection(batch, tokens, count, ~fits)
        selection.log_weight = (n_s.float() / b.clamp_min(1)).log()
        of_query_head = fits.repeat_interleave(self.geometry.group_size, 1)
        selection.partial = (partial[0], partial[1].where(of_query_head, -torch.inf))
        selection.partial_of = replace(first, num_pages=first.num_pages * fits)
        if first.num_tokens is not None:
            selection.partial_of.num_tokens = first.num_tokens * fits
        selection.read_apart = m + (n - n_s) * ~fits  # the pilot; what was chosen before a row turned out dense
        if batch.trace:
            selection.details = {
                "chosen": (n - n_s).float(),
                "pilot": m.float(),
                "budget": b.float(),
                "is_dense": (~fits).float(),
                **{name: value for name, value in statistics._asdict().items()},
            }
        return selection

    # ---- the parts, in their order

    def choose(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> tuple[Tensor, Tensor]:
        """Sinks, window and predicted top-k: logical pages or positions int32 [B, H_kv, F] ascending, counts [B, H_kv]."""
        counts = batch.context_lens if self.block == 1 else batch.num_pages
        fraction = self.config.top_k_fraction / self.block
        k = (batch.context_lens.double() * fraction).ceil().to(torch.int32) + (self.sinks + self.recent)
        capacity = math.ceil(batch.max_context_len * fraction) + self.sinks + self.recent
        with self.timer("score"):
            scores = self.selector.scores(q, cache, batch)
        capacity = min(capacity, scores.shape[2])
        with self.timer("top_k"):
            return top_k_logical(scores, counts, k, sinks=self.sinks, recent=self.recent, capacity=capacity)

    def pilot_size(self, num_residual: Tensor) -> Tensor:
        """Tokens of the pilot, int32."""
        share = (num_residual.double() * self.config.base_fraction).ceil().to(torch.int32)
        return share.clamp_min(MIN_PILOT).minimum(num_residual)

    def draw(
        self, chosen: Tensor, num_chosen: Tensor, count: Tensor, cache: LayerCache, batch: DecodeBatch, draw: int, capacity: int
    ) -> Tensor:
        """`count` tokens of each row's residual: physical slots int32 [B, H_kv, capacity]."""
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
        """What the pilot says of the residual."""
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

    def sample_sizes(self, statistics: ResidualStatistics, n_s: Tensor, m: Tensor) -> Tensor:
        """The sample that each row needs, int32 [B, H_kv]; all of the residual where no smaller one will do."""
        config, group = self.config, self.geometry.group_size
        of_query_head = [count.repeat_interleave(group, 1) for count in (n_s, m)]
        size = sample_size(config.guarantee, config.epsilon, config.delta, statistics, *of_query_head)
        return round_up(size.unflatten(1, (-1, group)), m, n_s)

    # ---- shapes that the host knows

    def is_dense(self, max_context_len: int) -> bool:
        """Whether no context up to this length can be sparse: too short to be sampled, or its sample could never pay."""
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
