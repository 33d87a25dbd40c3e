"""ScriptedGroup: ranks without a model. A page table that stores tokens stands for the cache, a checksum for the model."""

from __future__ import annotations

import threading
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from distributed_sparse.protocol.step import DecodeRow, LogprobBlock, SlotSetup, StepPlan, StepResult
from distributed_sparse.ranks.base import RankInfo, ShardFailure, ShardGroup

VOCAB_SIZE = 97
T = TypeVar("T")


def next_token(context: Sequence[int | None], sample_index: int) -> int:
    """The stand-in for a model: a token that depends on every token before it, on their order, and on the sample.

    None is what lies where nothing has been written.
    """
    return zlib.crc32(repr((sample_index, list(context))).encode()) % VOCAB_SIZE


def in_window(tokens: Sequence[T], page_size: int, evict_window: tuple[int, int]) -> list[T]:
    """What a decode step reads of a context: its first pages and its newest ones."""
    sink, recent = evict_window
    start = max(-(-len(tokens) // page_size) - recent, sink)
    return [*tokens[: sink * page_size], *tokens[start * page_size :]]


def expected_tokens(
    prompt: Sequence[int],
    count: int,
    sample_index: int = 0,
    *,
    evict_window: tuple[int, int] | None = None,
    prefill_length: int = 0,
    page_size: int = 16,
) -> list[int]:
    """The first `count` tokens that a request gets when nothing goes wrong with its pages.

    With `evict_window`, contexts longer than `prefill_length` are read through that window.
    """
    tokens = list(prompt)
    for _ in range(count):
        read = tokens
        if evict_window is not None and len(tokens) > prefill_length:
            read = in_window(tokens, page_size, evict_window)
        tokens.append(next_token(read, sample_index))
    return tokens[len(prompt) :]


class CacheModel:
    """Does with plans what a shard does, with tokens in place of keys: what it samples comes from what lies in the pages."""

    def __init__(self, num_pages: int, page_size: int, evict_window: tuple[int, int] | None = None) -> None:
        self.page_size = page_size
        self.evict_window = evict_window
        self.pages: list[list[int | None]] = [[None] * page_size for _ in range(num_pages)]
        self.tables: dict[int, list[int]] = {}
        self.setups: dict[int, SlotSetup] = {}
        self.last_token: dict[int, int] = {}

    def step(self, plan: StepPlan) -> StepResult:
        """Apply a plan in the order that `StepPlan` promises: setups, new pages, copies, then the tokens."""
        for setup in plan.setups:
            self.setups[setup.slot], self.tables[setup.slot] = setup, []
            self.last_token.pop(setup.slot, None)
        for slot, pages in plan.new_pages:
            # only a fork from a sequence that has evicted pages is told of the null page
            least = 1 if self.evict_window is None else 0
            assert all(least <= page < len(self.pages) for page in pages), f"slot {slot} is given {pages}"
            self.tables[slot] += pages
        copied = [list(self.pages[source]) for source, _ in plan.page_copies]
        for (_, target), page in zip(plan.page_copies, copied):
            self.pages[target] = page
        for row in plan.decode:
            self._write(row.slot, row.position, self.last_token[row.slot] if row.token is None else row.token)
        for chunk in plan.prefill:
            for offset, token in enumerate(chunk.tokens):
                self._write(chunk.slot, chunk.start + offset, token)
        result = StepResult(step=plan.step, rank=0)
        sampled: dict[int, int] = {}
        for part in plan.parts:
            context = self.read(part.slot, part.end)
            if self.evict_window is not None and isinstance(part, DecodeRow):
                context = in_window(context, self.page_size, self.evict_window)
            for slot in part.samples:
                sampled[slot] = next_token(context, self.setups[slot].sample_index)
                result.tokens.append(sampled[slot])
        self.last_token |= sampled
        if any(self.setups[slot].logprobs is not None for part in plan.parts for slot in part.samples):
            result.logprobs = [
                block(slot, part.end, [sampled[slot]]) if self.setups[slot].logprobs is not None else None
                for part in plan.parts
                for slot in part.samples
            ]
        for row in plan.decode:
            if row.target is not None:
                result.prompt_logprobs.append(block(row.slot, row.position + 1, [row.target]))
        for chunk in plan.prefill:
            if chunk.targets:
                result.prompt_logprobs.append(block(chunk.slot, chunk.start + 1, chunk.targets))
        return result

    def read(self, slot: int, length: int) -> list[int | None]:
        """The first `length` tokens of a slot, as they lie in its pages."""
        table = self.tables[slot]
        assert length <= len(table) * self.page_size, f"slot {slot} has {len(table)} pages for {length} tokens"
        tokens = [token for page in table for token in self.pages[page]]
        return tokens[:length]

    def _write(self, slot: int, position: int, token: int) -> None:
        page, offset = divmod(position, self.page_size)
        if offset == 0:  # a recycled page begins anew, as page metadata does
            self.pages[self.tables[slot][page]] = [None] * self.page_size
        self.pages[self.tables[slot][page]][offset] = token


def block(slot: int, position: int, tokens: list[int]) -> LogprobBlock:
    """A block of width 1 whose log-probability names its token: minus the token."""
    ids = np.array(tokens, dtype=np.int32)
    ranks = np.ones(len(tokens), dtype=np.int32)
    return LogprobBlock(slot, position, len(tokens), 1, ids.tobytes(), (-ids).astype(np.float32).tobytes(), ranks.tobytes())


class ScriptedGroup(ShardGroup):
    """One rank that answers with a `CacheModel`.

    Args:
        num_pages: of the cache, the null page included; may be set anew before a rebuild.
        before_step: called with each plan before it is answered; may wait, or raise a ShardFailure.
        evict_window, copy_on_fork: as in `Loaded`.
        queues_plans: as of `ShardGroup`.

    Attributes:
        plans, timeouts: of every step so far, of all generations.
        deadlines: those that `start` and every `rebuild` were given.
        before_start, before_rebuild: called by these verbs, may wait, or raise.
    """

    def __init__(
        self,
        num_pages: int = 64,
        page_size: int = 16,
        before_step: Callable[[StepPlan], None] | None = None,
        evict_window: tuple[int, int] | None = None,
        copy_on_fork: bool = False,
        queues_plans: bool = False,
    ) -> None:
        super().__init__(world_size=1)
        self._queues_plans = queues_plans
        self._uncollected: deque[StepPlan] = deque()
        self.cache_pages = num_pages
        self.page_size = page_size
        self.before_step = before_step
        self.before_start: Callable[[], None] | None = None
        self.before_rebuild: Callable[[], None] | None = None
        self.plans: list[StepPlan] = []
        self.timeouts: list[float] = []
        self.deadlines: list[float | None] = []
        self.stopped = threading.Event()
        self.cancelled = threading.Event()
        self._window = evict_window
        self._copies = copy_on_fork
        self._failure: ShardFailure | None = None

    @property
    def queues_plans(self) -> bool:
        return self._queues_plans

    def start(self, deadline: float | None = None) -> list[RankInfo]:
        self.deadlines.append(deadline)
        if self.before_start is not None:
            self.before_start()
        return self._come_up()

    def rebuild(self, deadline: float | None = None) -> list[RankInfo]:
        """Nothing is left of the cache."""
        assert not self.stopped.is_set(), "a group that has been stopped is not rebuilt"
        self.deadlines.append(deadline)
        self.generation += 1
        self.ranks = []
        if self.before_rebuild is not None:
            self.before_rebuild()
        return self._come_up()

    def _come_up(self) -> list[RankInfo]:
        self._failure = None
        self._uncollected.clear()
        self.cache = CacheModel(self.cache_pages, self.page_size, self._window)
        self.ranks = [
            RankInfo(
                rank=0, node_id="n", hostname="h", pid=1, device="cpu", dtype="float32", kv_heads=(0, 1), weight_bytes=0,
                page_bytes=64, max_pages=self.cache_pages, cache_bytes=0, metadata_bytes=0, evict_window=self._window,
                copy_on_fork=self._copies,
            )
        ]  # fmt: skip
        return self.ranks

    def cancel(self) -> None:
        self.cancelled.set()

    def send(self, plan: StepPlan) -> None:
        self.check()
        assert plan.generation == self.generation, "a plan of another generation"
        self.plans.append(plan)
        self._uncollected.append(plan)

    def collect(self, timeout: float = float("inf")) -> list[StepResult]:
        self.check()
        self.timeouts.append(timeout)
        plan = self._uncollected.popleft()
        try:
            if self.before_step is not None:
                self.before_step(plan)
        except ShardFailure as failure:
            self._failure = failure
            raise
        return [self.cache.step(plan)]

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        self.stopped.set()
