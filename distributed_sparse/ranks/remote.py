"""RemoteShardGroup: ranks in separate processes, reached over authenticated sockets. Subclasses spawn the processes."""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
import socket
import time
from abc import abstractmethod
from collections import deque
from typing import TYPE_CHECKING, Any

from distributed_sparse.protocol.step import (
    AllocateCache,
    Failed,
    Hello,
    Join,
    Loaded,
    Ready,
    Regroup,
    StepPlan,
    StepResult,
    Stop,
)
from distributed_sparse.ranks.base import RankInfo, ShardFailure
from distributed_sparse.ranks.channel import Listener, address_family
from distributed_sparse.ranks.failures import refusal_of, refuse_unequal, refuse_unequal_methods
from distributed_sparse.ranks.messaging import POLL_S, ROOT_CAUSE_S, MessagingGroup

if TYPE_CHECKING:
    from distributed_sparse.config import EngineConfig
    from distributed_sparse.ranks.worker import ShardFactory

logger = logging.getLogger(__name__)

REGROUP_TIMEOUT_S = 15.0
"""Time for a surviving rank to leave its current work and send `Hello`; a rank that does not is replaced, too."""
STOP_GRACE_S = 2.0
"""Time for a healthy shard to end after `Stop`, before it is killed."""


class RemoteShardGroup(MessagingGroup):
    """Owns the ranks' channels, the port they connect to, and the TCPStore of their rendezvous; `stop` closes all of them.

    Args:
        config: the engine's; `startup_timeout_s` bounds `start` and `rebuild`.
        host: the address that the Driver listens on, reachable from every rank.
        generation: see `ShardGroup`.
        shard_factory: makes each rank's shard; None: `Shard` itself.
    """

    def __init__(self, config: EngineConfig, host: str, generation: int = 0, shard_factory: ShardFactory | None = None) -> None:
        super().__init__(config.tensor_parallel_size, generation)
        self.config = config
        self.host = host
        self.shard_factory = shard_factory
        self.secret = secrets.token_bytes(32)
        self._store: Any = None  # torch's TCPStore; its port closes with the last reference
        self._store_address: tuple[str, int] | None = None
        self._plans: deque[int] = deque()  # step numbers sent and not collected
        self._was_ready = False  # all ranks have been ready at least once
        self._stopped = False

    # ---- implemented by each kind of process

    @abstractmethod
    def _spawn(self, ranks: list[int], address: tuple[str, int], store_address: tuple[str, int], deadline: float) -> None:
        """Start one process per rank of `ranks`, running `run_shard` with these addresses. Does not wait for the shards.

        Raises:
            ValueError: the ranks cannot be placed.
            ShardFailure: a process could not be started before `deadline` (`time.monotonic`).
        """

    @abstractmethod
    def _kill(self, ranks: list[int], grace: float) -> None:
        """Wait `grace` seconds for the processes of `ranks` to end, kill the rest, and return when all have ended."""

    @abstractmethod
    def _release(self) -> None:
        """Release what `_spawn` acquired besides processes. Called once, last."""

    # ---- ShardGroup

    def start(self, deadline: float | None = None) -> list[RankInfo]:
        return self._bring_up(list(range(self.world_size)), deadline)

    def rebuild(self, deadline: float | None = None) -> list[RankInfo]:
        lost = self._lost_ranks()
        self.generation += 1
        self._failure, self._reasons = None, {}
        self._plans.clear()
        for inbox in self._inbox:
            inbox.clear()
        for pending in self._pending_channels:
            pending.close()
        self._pending_channels.clear()
        self._end(lost)
        return self._bring_up(lost, deadline)

    def send(self, plan: StepPlan) -> None:
        self._raise_failure()
        self._send_all(plan)
        self._plans.append(plan.step)

    def collect(self, timeout: float = math.inf) -> list[StepResult]:
        self._raise_failure()
        step = self._plans.popleft()
        results = self._gather(
            StepResult,
            time.monotonic() + timeout,
            f"answer step {step} within {timeout:g} s (step_timeout_s sets another deadline)",
        )
        for rank, result in enumerate(results):
            if (result.step, result.rank) != (step, rank):
                raise self._fail({rank: f"answered step {result.step} as rank {result.rank} when step {step} was due"})
        return results

    def check(self) -> None:
        self._raise_failure()
        while self._receive_ready(0.0):
            pass
        self._check_liveness()

    def cancel(self) -> None:
        self._cancelled.set()

    def stop(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        healthy = self._failure is None and bool(self.ranks)
        for channel in [*self._channels.values(), *self._pending_channels]:
            with contextlib.suppress(OSError):  # it may be closed already
                channel.send(Stop())
        if self._listener is not None:
            self._listener.close()
        if not healthy:
            self._close_channels()  # end of file ends the shards that still read
        self._kill(list(range(self.world_size)), STOP_GRACE_S if healthy else ROOT_CAUSE_S)
        self._release()
        self._close_channels()
        self._selector.close()
        self._store = None
        self._failure = self._failure or ShardFailure((), "the shards have been stopped")

    # ---- start-up and rebuild

    def _bring_up(self, missing: list[int], deadline: float | None) -> list[RankInfo]:
        """Spawn the missing ranks, regroup the others, and wait until all are `Ready`."""
        if deadline is None:
            deadline = time.monotonic() + self.config.startup_timeout_s
        self.ranks = []
        try:
            self._listener = Listener(self.host, self.secret)
            try:
                loaded, ready = self._rendezvous(missing, deadline)
            finally:
                self._listener.close()
        except ShardFailure as failure:
            refusal = refusal_of(failure, self._reasons, self.world_size, self._hellos)
            if refusal is None or self._was_ready:
                raise  # it worked before: what a rank refuses in a rebuild (a folder, memory) may be transient
            self.stop()
            raise refusal from None
        except BaseException:
            self.stop()
            raise
        self._was_ready = True
        self.ranks = [RankInfo.of(self._hellos[rank], loaded[rank], ready[rank]) for rank in range(self.world_size)]
        return self.ranks

    def _rendezvous(self, missing: list[int], deadline: float) -> tuple[list[Loaded], list[Ready]]:
        self._regrouping = set(self._channels)
        self._send_all(Regroup(self.generation))
        if self._store_address is None:
            # bound before torch is imported: the port is known early, and listens on this host's address only
            store_socket = socket.create_server((self.host, 0), family=address_family(self.host))
            self._store_address = store_socket.getsockname()[:2]
            try:
                self._begin(missing, deadline)
                self._store = open_store(self.host, store_socket)
            finally:
                store_socket.close()
        else:
            self._begin(missing, deadline)
        late = self._await_regrouped(min(deadline, time.monotonic() + REGROUP_TIMEOUT_S))
        if late:  # blocked in a collective that cannot be interrupted, or still loading: not counted as failures
            logger.warning("ranks %s did not rejoin in time and are replaced, too", late)
            self._end(late)
            self._begin(late, deadline)
        self._gather(Hello, deadline, "connect")
        refuse_unequal(self._hellos)
        self._send_all(Join())
        loaded = self._gather(Loaded, deadline, "load its weights")
        refuse_unequal_methods(loaded, self._hellos)
        self._send_all(AllocateCache(min(message.max_pages for message in loaded)))
        return loaded, self._gather(Ready, deadline, "allocate its cache and warm up")

    def _begin(self, ranks: list[int], deadline: float) -> None:
        """Spawn ranks and start their silence timers."""
        assert self._listener is not None and self._store_address is not None
        self._spawn(ranks, self._listener.address, self._store_address, deadline)
        self._heard |= dict.fromkeys(ranks, time.monotonic())

    def _await_regrouped(self, deadline: float) -> list[int]:
        """Wait until all surviving ranks have sent `Hello`; return those that have not at `deadline`."""
        while self._regrouping and time.monotonic() < deadline:
            self._raise_if_cancelled()
            if not self._read(POLL_S):
                self._check_liveness()
        return sorted(self._regrouping)

    def _end(self, ranks: list[int]) -> None:
        """Kill the processes of these ranks and forget them."""
        for rank in ranks:
            self._drop(rank)
        self._kill(ranks, 0.0)

    def _lost_ranks(self) -> list[int]:
        """The ranks that must be replaced.

        On GPUs all of them, since a NCCL group that has lost a rank cannot be left. On CPUs those that failed or cannot be
        reached; a rank whose collective merely broke off keeps its process and its weights.
        """
        reachable = {rank for rank, channel in self._channels.items() if not channel.closed}
        if self._failure is None or self.config.device == "cuda":
            return list(range(self.world_size))
        waiting = {rank for rank, what in self._reasons.items() if isinstance(what, Failed) and what.waits}
        kept = reachable - (set(self._failure.ranks) - waiting) - self._dead_ranks().keys()
        return [rank for rank in range(self.world_size) if rank not in kept]


def open_store(host: str, listening: socket.socket) -> Any:
    """Serve torch's TCPStore on a listening socket. It runs in the Driver's process, so it survives every shard."""
    import torch.distributed as dist

    port = listening.getsockname()[1]
    return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
