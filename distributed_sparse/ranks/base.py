"""ShardGroup: what the Driver knows of its shards: start them, send a plan, collect the results, stop them."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

from distributed_sparse.protocol.step import Hello, Loaded, Ready, StepPlan, StepResult


@dataclasses.dataclass(frozen=True)
class RankInfo:
    """One rank, as it introduced itself; fields in bytes are of this rank alone."""

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
        """What a shard said on its way up, in one piece."""
        return cls(
            rank=hello.rank,
            node_id=hello.node_id,
            hostname=hello.hostname,
            pid=hello.pid,
            device=loaded.device,
            dtype=loaded.dtype,
            kv_heads=loaded.kv_heads,
            weight_bytes=loaded.weight_bytes,
            page_bytes=loaded.page_bytes,
            max_pages=loaded.max_pages,
            cache_bytes=ready.cache_bytes,
            metadata_bytes=ready.metadata_bytes,
            evict_window=loaded.evict_window,
            copy_on_fork=loaded.copy_on_fork,
        )


class ShardFailure(RuntimeError):
    """A shard failed, died, or did not answer in time; its group can only be rebuilt or stopped.

    Attributes:
        ranks: the ranks at the root of it, ascending; empty where no rank was reached at all.
        cause: what happened, for the user: rank, node, process and error.
        traceback: the shard's own traceback, where it could still send one.
        detect_s: seconds since the last sign of life of these ranks: when it was noticed, it was no older than that.
    """

    detect_s: float = 0.0

    def __init__(self, ranks: Sequence[int], cause: str, traceback: str = "") -> None:
        super().__init__(tuple(ranks), cause, traceback)  # the constructor's own arguments: so it can be pickled
        self.ranks = tuple(ranks)
        self.cause = cause
        self.traceback = traceback

    def __str__(self) -> str:
        return f"{self.cause}\n{self.traceback.rstrip()}" if self.traceback else self.cause


class ShardGroup(ABC):
    """The ranks, from one generation to the next: start, then send and collect, rebuild after a failure, then stop.

    Plans may be sent before the results of earlier ones are collected; ranks run them in order. One thread at a time calls it;
    only `cancel` may be called beside another verb.

    Attributes:
        world_size: number of ranks.
        generation: counts the rebuilds of the group; rendezvous keys and hellos carry it.
        ranks: one `RankInfo` per rank, in rank order; empty until `start` has returned.
    """

    def __init__(self, world_size: int, generation: int = 0) -> None:
        self.world_size = world_size
        self.generation = generation
        self.ranks: list[RankInfo] = []

    @property
    def num_pages(self) -> int:
        """Pages that every rank has allocated, the null page included: the smallest of the ranks' `max_pages`."""
        return min(info.max_pages for info in self.ranks)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers of one rank, metadata included: the largest of the ranks'."""
        return max(info.page_bytes for info in self.ranks)

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
        """Whether ranks go on with a plan that was sent while the Driver does other things. Known once they have started."""
        return True

    @abstractmethod
    def start(self, deadline: float | None = None) -> list[RankInfo]:
        """Bring every rank up, weights loaded, cache allocated, warm; the ranks, in rank order.

        Args:
            deadline: when they must be ready (`time.monotonic`); None: `startup_timeout_s` from now.

        Raises:
            ValueError: the ranks cannot be placed, or their versions, weights or methods differ. The group is stopped.
            ShardFailure: a rank failed, died or was not ready in time.
        """

    @abstractmethod
    def rebuild(self, deadline: float | None = None) -> list[RankInfo]:
        """After a ShardFailure: bring every rank up as the next generation; nothing is left of what the caches held.

        Ranks that failed are ended and replaced; others stay, with their weights, where the collectives' backend allows it.
        Plans that were sent and not collected are forgotten. Arguments and errors: as `start`; but what a single rank refuses
        in a rebuild is a ShardFailure, since it has been right before.
        """

    @abstractmethod
    def send(self, plan: StepPlan) -> None:
        """Send one plan to every rank.

        Raises:
            ShardFailure: a rank has gone.
        """

    @abstractmethod
    def collect(self, timeout: float = math.inf) -> list[StepResult]:
        """The results of the oldest plan not yet collected, in rank order. `timeout`: seconds for all ranks together.

        Raises:
            ShardFailure: a rank failed, died, answered another step, or did not answer in time.
        """

    @abstractmethod
    def check(self) -> None:
        """Between steps: is every rank still there? Costs no message.

        Raises:
            ShardFailure: a rank has gone.
        """

    @abstractmethod
    def cancel(self) -> None:
        """From any thread: whatever verb waits for ranks, now or later, raises ShardFailure soon. `stop` does not wait."""

    @abstractmethod
    def stop(self) -> None:
        """End every rank, by force if need be; leaves no process and no socket behind. Harmless when called again."""
