"""ShardGroup: the Driver's interface to its ranks: start them, send step plans, collect results, rebuild, stop."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import msgspec

from distributed_sparse.protocol.step import Hello, Loaded, Ready, StepPlan, StepResult


@dataclasses.dataclass(frozen=True)
class RankInfo:
    """One rank's properties, from its start-up messages. Fields in bytes are per rank."""

    rank: int
    node_id: str
    hostname: str
    pid: int
    device: str
    dtype: str
    kv_heads: tuple[int, int]
    """This rank's KV heads: first, and one past the last."""
    weight_bytes: int
    page_bytes: int
    max_pages: int
    cache_bytes: int
    metadata_bytes: int
    evict_window: tuple[int, int] | None = None
    copy_on_fork: bool = False

    def as_dict(self) -> dict:
        """The entry of `LLM.stats()["ranks"]`."""
        old_names = {"kept_pages": self.evict_window, "forks_copy_pages": self.copy_on_fork}  # gone in the next version
        return dataclasses.asdict(self) | old_names

    @classmethod
    def of(cls, hello: Hello, loaded: Loaded, ready: Ready) -> RankInfo:
        """Combine a shard's start-up messages."""
        known = msgspec.structs.asdict(hello) | msgspec.structs.asdict(loaded) | msgspec.structs.asdict(ready)
        return cls(**{field.name: known[field.name] for field in dataclasses.fields(cls)})


class ShardFailure(RuntimeError):
    """A shard failed, died, or did not answer in time. The group must then be rebuilt or stopped.

    Attributes:
        ranks: the ranks that caused it, ascending; empty if no rank was reached.
        cause: what happened, for the user: rank, node, process and error.
        traceback: the shard's own traceback, if it could send one.
        detect_s: seconds from these ranks' last message to the detection: an upper bound of the detection time.
    """

    detect_s: float = 0.0

    def __init__(self, ranks: Sequence[int], cause: str, traceback: str = "") -> None:
        super().__init__(tuple(ranks), cause, traceback)  # the constructor's own arguments, so pickling works
        self.ranks = tuple(ranks)
        self.cause = cause
        self.traceback = traceback

    def __str__(self) -> str:
        return f"{self.cause}\n{self.traceback.rstrip()}" if self.traceback else self.cause


class ShardGroup(ABC):
    """The ranks of one engine over all generations: `start`, then `send` and `collect`; `rebuild` after a failure; `stop`.

    Plans may be sent before the results of earlier ones are collected; ranks run them in order. Only one thread at a time may
    call it, except for `cancel`.

    Attributes:
        world_size: number of ranks.
        generation: number of rebuilds so far; rendezvous keys and `Hello`s carry it.
        ranks: one `RankInfo` per rank, in rank order; empty until `start` has returned.
    """

    def __init__(self, world_size: int, generation: int = 0) -> None:
        self.world_size = world_size
        self.generation = generation
        self.ranks: list[RankInfo] = []

    @property
    def num_pages(self) -> int:
        """Pages allocated on every rank, the null page included: the smallest `max_pages` of the ranks."""
        return min(info.max_pages for info in self.ranks)

    @property
    def evict_window(self) -> tuple[int, int] | None:
        """As in `Loaded`; the same on every rank."""
        return self.ranks[0].evict_window

    @property
    def copy_on_fork(self) -> bool:
        """As in `Loaded`; the same on every rank."""
        return self.ranks[0].copy_on_fork

    @property
    def queues_plans(self) -> bool:
        """Whether ranks run a plan while the Driver does other work. Valid after `start`."""
        return True

    @abstractmethod
    def start(self, deadline: float | None = None) -> list[RankInfo]:
        """Start every rank: load weights, allocate the cache, warm up. Returns the ranks in rank order.

        Args:
            deadline: when all must be ready (`time.monotonic`); None: `startup_timeout_s` from now.

        Raises:
            ValueError: the ranks cannot be placed, or differ in versions, weights or methods. The group is stopped.
            ShardFailure: a rank failed, died or was not ready in time.
        """

    @abstractmethod
    def rebuild(self, deadline: float | None = None) -> list[RankInfo]:
        """After a ShardFailure: start the next generation, with empty caches.

        Failed ranks are replaced. The others keep their process and weights if the collectives' backend allows it. Plans sent
        and not collected are dropped. Arguments and errors: as `start`, except that an error of a single rank's own is a
        ShardFailure here, since the same configuration has worked before.
        """

    @abstractmethod
    def send(self, plan: StepPlan) -> None:
        """Send one plan to every rank.

        Raises:
            ShardFailure: a rank is lost.
        """

    @abstractmethod
    def collect(self, timeout: float = math.inf) -> list[StepResult]:
        """The results of the oldest plan not yet collected, in rank order. `timeout`: seconds for all ranks together.

        Raises:
            ShardFailure: a rank failed, died, answered another step, or did not answer in time.
        """

    @abstractmethod
    def check(self) -> None:
        """Check between steps that every rank is alive. Sends no message.

        Raises:
            ShardFailure: a rank is lost.
        """

    @abstractmethod
    def cancel(self) -> None:
        """Make any call that waits for ranks, now or later, raise ShardFailure soon. May be called from any thread."""

    @abstractmethod
    def stop(self) -> None:
        """End every rank, killing it if necessary; leaves no process and no socket behind. May be called again."""
