"""synthetic: engines for benchmarks, whose caches can be filled with random keys and values instead of a prefill."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from distributed_sparse.cache import AppendRuns, Geometry
from distributed_sparse.config import EngineConfig
from distributed_sparse.llm import LLM
from distributed_sparse.protocol.step import Loaded, PrefillChunk, StepPlan
from distributed_sparse.ranks.worker import ShardFactory
from distributed_sparse.shard.collectives.collectives import Collectives
from distributed_sparse.shard.pending import PendingStep
from distributed_sparse.shard.shard import Shard
from distributed_sparse.tools.bench.models import BenchModel
from distributed_sparse.tools.bench.timing import check_memory
from distributed_sparse.tools.planner.rank import RankCostModel

BLOCK = 4096
"""Positions whose keys and values are drawn together; they depend on layer, KV head and block alone."""

KEY_SPREAD = 4.0
"""Standard deviation of the keys. Queries of random weights are below 1, so logits have a standard deviation of 2 to 4."""

FILL_FROM = 1024
"""Prompts of at least so many tokens are filled. Shorter ones are computed, to compare the same engine with a reference."""

NEVER_FILL = 1 << 62
"""As `fill_from`: every prompt is computed."""


def synthetic_kv(layer: int, kv_head: int, block: int, head_dim: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Keys and values of one KV head at `BLOCK` positions from block * BLOCK on: float32 [BLOCK, d] each.

    Values are standard normal, keys normal of standard deviation `KEY_SPREAD`. Equal on all ranks with the same kind of device.

    Args:
        kv_head: index among the whole model's KV heads.
    """
    name = hashlib.sha256(f"{layer} {kv_head} {block}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(name[:4], "little"))  # CPUs use 32 bits of a seed
    k, v = torch.randn(2, BLOCK, head_dim, generator=generator, device=device)
    return k.mul_(KEY_SPREAD), v


def blocks(start: int, stop: int) -> Iterator[tuple[int, slice, slice]]:
    """The blocks of positions [start, stop): (block, slice of its positions, slice of [start, stop))."""
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        first, last = max(start, block * BLOCK), min(stop, (block + 1) * BLOCK)
        yield block, slice(first - block * BLOCK, last - block * BLOCK), slice(first - start, last - start)


class SyntheticShard(Shard):
    """A shard that fills the cache with `synthetic_kv` instead of computing long prompts, except a prompt's last token.

    It uses the cache's own append, so pages and metadata are those of real keys.

    Args:
        fill_from: prompts of at least so many tokens are filled.
        num_threads: torch threads of this rank; None: unchanged.
    """

    def __init__(
        self,
        config: EngineConfig,
        rank: int,
        world_size: int,
        collectives: Collectives,
        *,
        fill_from: int = FILL_FROM,
        num_threads: int | None = None,
    ) -> None:
        super().__init__(config, rank, world_size, collectives)
        self.fill_from = fill_from
        self.num_threads = num_threads
        self._pages: dict[int, list[int]] = {}
        self._prompt_lengths: dict[int, int] = {}

    def load(self) -> Loaded:
        if self.num_threads is not None:
            torch.set_num_threads(self.num_threads)
        return super().load()

    def begin(self, plan: StepPlan) -> PendingStep:
        return super().begin(self._without_long_prompts(plan))

    @torch.inference_mode()
    def _without_long_prompts(self, plan: StepPlan) -> StepPlan:
        """Fill the chunks of long prompts, and return the step plan without them."""
        for setup in plan.setups:
            self._prompt_lengths[setup.slot], self._pages[setup.slot] = setup.prompt_length, []
        for slot, pages in plan.new_pages:
            self._pages[slot] += pages
        left: list[PrefillChunk] = []
        ranges: list[tuple[int, int, int]] = []
        for chunk in plan.prefill:
            if self._prompt_lengths.get(chunk.slot, 0) < self.fill_from:
                left.append(chunk)
                continue
            if chunk.targets:
                raise ValueError(f"a filled cache has no log-probabilities of prompts of {self.fill_from} tokens and more")
            is_last = bool(chunk.samples)
            ranges.append((chunk.slot, chunk.start, chunk.end - is_last))
            if is_last:
                left.append(msgspec.structs.replace(chunk, start=chunk.end - 1, tokens=chunk.tokens[-1:]))
        if not ranges:
            return plan
        with self._on_device():
            self._fill(ranges)
        return msgspec.structs.replace(plan, prefill=left)

    def _fill(self, ranges: list[tuple[int, int, int]]) -> None:
        """Write positions [start, stop) of each (slot, start, stop) in every layer."""
        geometry, size = self.geometry, self.config.page_size
        for block in sorted({block for _, start, stop in ranges for block, _, _ in blocks(start, stop)}):
            runs = [
                (own, self._runs(self._pages[slot], block * BLOCK + own.start, block * BLOCK + own.stop, size))
                for slot, start, stop in ranges
                for number, own, _ in blocks(start, stop)
                if number == block
            ]
            for layer, cache in enumerate(self.cache.layers):
                k, v = _of_heads(layer, block, geometry)
                for own, where in runs:
                    cache.append(k[own], v[own], where)

    def _runs(self, pages: list[int], start: int, stop: int, page_size: int) -> AppendRuns:
        """The append of positions [start, stop) of a sequence with these pages."""
        borders = np.unique(np.r_[start, np.arange(-(-start // page_size), -(-stop // page_size)) * page_size])
        ends = np.r_[borders[1:], stop]
        table = np.array(pages)[borders // page_size]
        columns = np.stack([table, borders - start, borders % page_size, ends - borders]).astype(np.int32)
        return AppendRuns(*torch.from_numpy(columns).to(self.device).unbind(0))


def _of_heads(layer: int, block: int, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """k and v [BLOCK, H_kv, d] of this rank's heads, in the cache's dtype."""
    k, v = (
        torch.empty(BLOCK, geometry.num_kv_heads, geometry.head_dim, dtype=geometry.dtype, device=geometry.device)
        for _ in range(2)
    )
    for head in range(geometry.num_kv_heads):
        own = synthetic_kv(layer, geometry.first_kv_head + head, block, geometry.head_dim, geometry.device)
        k[:, head], v[:, head] = own
    return k, v


class SyntheticLLM(LLM):
    """An LLM whose shards come from `shard_factory`, in this process for one rank, else in Ray actors.

    Args:
        model, engine_args: see `LLM`.
        shard_factory: picklable; None: `Shard` itself.
    """

    def __init__(self, model: str, shard_factory: ShardFactory | None, **engine_args: Any) -> None:
        self._shard_factory = shard_factory
        super().__init__(model, **engine_args)


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """A benchmark's engine, whose cache has room for `max_num_seqs` sequences of `max_model_len` tokens and no more.

    Attributes:
        sparse: the `sparse:` section.
        threads: torch threads of each rank; None: unchanged.
    """

    model: BenchModel
    sparse: dict[str, Any] | None
    tensor_parallel_size: int
    page_size: int
    max_model_len: int
    max_num_seqs: int
    threads: int | None = None

    @cached_property
    def rank(self) -> RankCostModel:
        return RankCostModel(self.model.config, self.tensor_parallel_size, self.sparse, self.page_size, self.model.dtype)

    @property
    def cache_bytes(self) -> int:
        """Cache of one rank; the null page takes one more page."""
        pages = self.max_num_seqs * -(-self.max_model_len // self.page_size) + 1
        return pages * sum(self.rank.page_bytes)

    @property
    def num_bytes(self) -> int:
        """Weights and cache on the device; on a CPU, of all ranks."""
        ranks = self.tensor_parallel_size if self.model.device.type == "cpu" else 1
        return ranks * (self.rank.weight_bytes + self.cache_bytes)

    @property
    def engine_args(self) -> dict[str, Any]:
        """Arguments of `LLM`, without the model's path."""
        return {
            "load_format": self.model.load_format,
            "tensor_parallel_size": self.tensor_parallel_size,
            "sparse": self.sparse,
            "dtype": self.model.dtype_name,
            "device": self.model.device.type,
            "page_size": self.page_size,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "kv_cache_memory_bytes": self.cache_bytes,
        }

    def start(self, what: str, *, max_num_batched_tokens: int, fill_from: int = NEVER_FILL, **engine_args: Any) -> SyntheticLLM:
        """Start the engine.

        Args:
            what: the engine's load, named if it does not fit.
            fill_from: see `SyntheticShard`.

        Raises:
            Unavailable: the engine does not fit into free memory.
        """
        check_memory(what, self.num_bytes, self.model.device)
        factory = partial(SyntheticShard, fill_from=fill_from, num_threads=self.threads)
        batched = max(max_num_batched_tokens, self.max_num_seqs)
        return SyntheticLLM(str(self.model.path), factory, max_num_batched_tokens=batched, **self.engine_args, **engine_args)
