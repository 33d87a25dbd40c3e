"""RemoteShardGroup: ranks in processes of their own, reached over authenticated sockets; who makes the processes is open."""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
import selectors
import socket
import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from distributed_sparse.protocol import step as messages
from distributed_sparse.protocol.step import (
    Alive,
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
from distributed_sparse.ranks.base import RankInfo, ShardFailure, ShardGroup
from distributed_sparse.ranks.channel import Channel, ChannelClosed, ChannelTimeout, Listener, address_family
from distributed_sparse.ranks.failures import describe, refusal_of, refuse_unequal, refuse_unequal_methods

if TYPE_CHECKING:
    from distributed_sparse.config import EngineConfig
    from distributed_sparse.ranks.worker import ShardFactory

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=messages.Message)

POLL_S = 0.1
"""How often processes are looked at while sockets are silent."""
ROOT_CAUSE_S = 0.25
"""After a first failure: how long to listen for others, since the rank that caused it may not be the first to tell."""
ROOT_CAUSE_POLL_S = 0.01
SILENCE_S = 5.0
"""A rank that has not even said that it is alive for so long hangs, or cannot be reached."""
START_SILENCE_S = 60.0
"""The same for a rank that connects, imports, loads or compiles: some of that lets no other thread of its process run."""
SUSPECT_S = 2.0
"""Of ranks that do not answer a step, those that have been silent for so long are the cause, and the others wait for them."""
REGROUP_TIMEOUT_S = 15.0
"""How long a rank that outlives another has to leave what it is in; it is replaced, too, if it does not."""
STOP_GRACE_S = 2.0
"""How long a healthy shard has to end by itself."""


class RemoteShardGroup(ShardGroup):
    """Owns the ranks' channels, the port they connect to, and the store at which they meet; all gone after `stop`.

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
        self._listener: Listener | None = None
        self._store: Any = None  # torch's TCPStore; its port closes with the last reference
        self._store_address: tuple[str, int] | None = None
        self._pending_channels: list[Channel] = []  # accepted, but their hello has not come
        self._channels: dict[int, Channel] = {}
        self._hellos: dict[int, Hello] = {}
        self._regrouping: set[int] = set()  # ranks whose hello is due: what else they say is of the last generation
        self._inbox: list[deque[messages.Message]] = [deque() for _ in range(self.world_size)]
        self._selector = selectors.DefaultSelector()
        self._registered: dict[int, int] = {}  # descriptors by rank: a channel that has closed no longer knows its own
        self._heard: dict[int, float] = {}  # each rank's last sign of life
        self._listened = 0.0
        self._plans: deque[int] = deque()  # steps sent and not collected
        self._failure: ShardFailure | None = None
        self._news: dict[int, str | Failed] = {}  # what is known of each rank that failed
        self._stood = False  # every rank has once been ready
        self._cancelled = threading.Event()
        self._stopped = False

    # ---- what a kind of process must say

    @abstractmethod
    def _spawn(self, ranks: list[int], address: tuple[str, int], store_address: tuple[str, int], deadline: float) -> None:
        """Begin `run_shard` once for each of `ranks`, with these addresses; returns before the shards are up.

        Raises:
            ValueError: they cannot be placed.
            ShardFailure: a process could not be made before `deadline` (`time.monotonic`).
        """

    @abstractmethod
    def _dead_ranks(self) -> dict[int, str]:
        """Ranks whose run has ended, each with the reason; must not wait."""

    @abstractmethod
    def _kill(self, ranks: list[int], grace: float) -> None:
        """Give the processes of `ranks` `grace` seconds to end, kill those that have not, and return once all have gone."""

    @abstractmethod
    def _release(self) -> None:
        """Give back what `_spawn` took beside the processes. Called once, last."""

    # ---- the verbs

    def start(self, deadline: float | None = None) -> list[RankInfo]:
        return self._bring_up(list(range(self.world_size)), deadline)

    def rebuild(self, deadline: float | None = None) -> list[RankInfo]:
        lost = self._lost_ranks()
        self.generation += 1
        self._failure, self._news = None, {}
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
        while self._take_in(0.0):
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
            with contextlib.suppress(OSError):  # it may have gone already
                channel.send(Stop())
        if self._listener is not None:
            self._listener.close()
        if not healthy:
            self._close_channels()  # end of file ends those that can still listen
        self._kill(list(range(self.world_size)), STOP_GRACE_S if healthy else ROOT_CAUSE_S)
        self._release()
        self._close_channels()
        self._selector.close()
        self._store = None
        self._failure = self._failure or ShardFailure((), "the shards have been stopped")

    # ---- start-up, the first and every later one

    def _bring_up(self, missing: list[int], deadline: float | None) -> list[RankInfo]:
        """Spawn the ranks that are missing, regroup the others, and take all of them to READY."""
        if deadline is None:
            deadline = time.monotonic() + self.config.startup_timeout_s
        self.ranks = []
        try:
            self._listener = Listener(self.host, self.secret)
            try:
                loaded, ready = self._meet(missing, deadline)
            finally:
                self._listener.close()
        except ShardFailure as failure:
            refusal = refusal_of(failure, self._news, self.world_size, self._hellos)
            if refusal is None or self._stood:
                raise  # what a rank refuses in a rebuild has been right before: a folder, or memory, may come back
            self.stop()
            raise refusal from None
        except BaseException:
            self.stop()
            raise
        self._stood = True
        self.ranks = [RankInfo.of(self._hellos[rank], loaded[rank], ready[rank]) for rank in range(self.world_size)]
        return self.ranks

    def _meet(self, missing: list[int], deadline: float) -> tuple[list[Loaded], list[Ready]]:
        self._regrouping = set(self._channels)
        self._send_all(Regroup(self.generation))
        if self._store_address is None:
            # bound here, so that its port is known, and closed to other networks, before torch is imported
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
        if late:  # they wait in a collective that nothing ends, or load for long: no failure of theirs
            logger.warning("ranks %s do not leave what they are in, and are replaced, too", late)
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
        """Spawn ranks; from then on their silence counts."""
        assert self._listener is not None and self._store_address is not None
        self._spawn(ranks, self._listener.address, self._store_address, deadline)
        self._heard |= dict.fromkeys(ranks, time.monotonic())

    def _await_regrouped(self, deadline: float) -> list[int]:
        """Returns once the ranks that are regrouped have said hello; at `deadline`, those that have not."""
        while self._regrouping and time.monotonic() < deadline:
            self._raise_if_cancelled()
            if not self._read(POLL_S):
                self._check_liveness()
        return sorted(self._regrouping)

    def _end(self, ranks: list[int]) -> None:
        """Kill what runs of these ranks, and forget it."""
        for rank in ranks:
            self._drop(rank)
        self._kill(ranks, 0.0)

    def _lost_ranks(self) -> list[int]:
        """The ranks that must be replaced: on GPUs all, since a NCCL group that has lost one cannot be left; else those that
        failed or cannot be reached. One whose collective only broke off stays, with its weights."""
        reachable = {rank for rank, channel in self._channels.items() if not channel.closed}
        if self._failure is None or self.config.device == "cuda":
            return list(range(self.world_size))
        waiting = {rank for rank, what in self._news.items() if isinstance(what, Failed) and what.waits}
        kept = reachable - (set(self._failure.ranks) - waiting) - self._dead_ranks().keys()
        return [rank for rank in range(self.world_size) if rank not in kept]

    # ---- messages

    def _send_all(self, message: messages.Message) -> None:
        frame = messages.encode(message)
        lost = {}
        for rank, channel in self._channels.items():
            try:
                channel.send_bytes(frame)
            except OSError as error:
                lost[rank] = str(error)
        if lost:
            raise self._fail(lost)

    def _gather(self, kind: type[M], deadline: float, task: str) -> list[M]:
        """The next message of every rank, each of which must be a `kind`; `task`: what a rank did not do in time."""
        ranks, began = range(self.world_size), time.monotonic()
        while missing := [rank for rank in ranks if not self._inbox[rank]]:
            self._raise_if_cancelled()
            remaining = deadline - time.monotonic()
            # ranks that say all the time that they are alive leave no silence in which to look at the others
            if self._read(max(min(POLL_S, remaining), 0.0)) and time.monotonic() - self._listened < POLL_S:
                continue
            while self._read(0.0):
                pass
            self._check_liveness()
            # only now: if the Driver itself came late, the answers lay there in time
            missing = [rank for rank in missing if not self._inbox[rank]]
            if missing and remaining <= 0:
                silent = [rank for rank in missing if self._silent_for(rank) > SUSPECT_S]
                failure = self._fail({rank: f"did not {task}" for rank in silent or missing}, hung=True)
                failure.detect_s = max(failure.detect_s, time.monotonic() - began)  # it lived, and did nothing
                raise failure
        taken = {rank: self._inbox[rank].popleft() for rank in ranks}
        wrong = {rank: f"sent {type(m).__name__}, not {kind.__name__}" for rank, m in taken.items() if type(m) is not kind}
        if wrong:
            raise self._fail(wrong)
        return list(taken.values())  # type: ignore[arg-type]

    def _check_liveness(self) -> None:
        """After all that was sent has been read: has a process ended, or fallen silent?"""
        dead = {rank: why for rank, why in self._dead_ranks().items() if not self._inbox[rank]}
        if dead:
            raise self._fail(dead)
        now = time.monotonic()
        if now - self._listened > SUSPECT_S:  # nobody listened, or the whole machine stood still
            self._heard = dict.fromkeys(self._heard, now)
        self._listened = now
        limit = SILENCE_S if self.ranks else START_SILENCE_S
        silent = [rank for rank in self._heard if self._silent_for(rank) > limit]
        if silent:
            raise self._fail({rank: f"has given no sign of life for {limit:g} s" for rank in silent}, hung=True)

    def _silent_for(self, rank: int) -> float:
        return time.monotonic() - self._heard.get(rank, 0.0)

    def _read(self, timeout: float) -> bool:
        """Take in what the sockets hold, waiting at most `timeout` for the first of it; whether there was anything."""
        if len(self._channels) < self.world_size:
            return self._greet(timeout)
        return self._take_in(timeout)

    def _greet(self, timeout: float) -> bool:
        """While ranks are still to come: new connections, their hellos, and news of those that came."""
        assert self._listener is not None
        channel = self._listener.accept(timeout)
        if channel is not None:
            self._pending_channels.append(channel)
        heard = channel is not None
        for pending in list(self._pending_channels):
            heard |= self._hear_hello(pending)
        return self._take_in(0.0) or heard

    def _hear_hello(self, pending: Channel) -> bool:
        try:
            message = pending.receive(0.0)
        except ChannelTimeout:
            return False
        except ChannelClosed:
            self._pending_channels.remove(pending)  # if it was a shard of ours, its process tells why
            return True
        if isinstance(message, Alive):
            self._heard[message.rank] = time.monotonic()
            return True
        self._pending_channels.remove(pending)
        rank = getattr(message, "rank", -1)
        generation = getattr(message, "generation", self.generation)
        if not isinstance(message, Hello | Failed) or not 0 <= rank < self.world_size or generation != self.generation:
            logger.warning("turned away a shard that said %s rank %s, generation %s", type(message).__name__, rank, generation)
            pending.close()
        elif isinstance(message, Failed):
            pending.close()
            raise self._fail({rank: message})
        elif rank in self._channels:
            pending.close()
            raise self._fail({rank: f"introduced itself twice, the second time as process {message.pid}"})
        else:
            self._channels[rank] = pending
            self._hellos[rank] = message
            self._inbox[rank].append(message)
            self._heard[rank] = time.monotonic()
            self._registered[rank] = pending.fileno()
            self._selector.register(pending.fileno(), selectors.EVENT_READ, rank)
        return True

    def _take_in(self, timeout: float) -> bool:
        """One message of each rank that has sent some; raises the failure if a rank has failed or gone."""
        ready = self._selector.select(timeout) if self._registered else []
        news: dict[int, str | Failed] = {}
        for key, _ in ready:
            self._receive(key.data, news)
        if news:
            raise self._fail(news)
        return bool(ready)

    def _receive(self, rank: int, news: dict[int, str | Failed]) -> None:
        try:
            message = self._channels[rank].receive(POLL_S)
        except (ChannelClosed, ChannelTimeout) as error:
            news.setdefault(rank, str(error))
            self._unregister(rank)
            return
        self._heard[rank] = time.monotonic()
        if isinstance(message, Alive):
            return
        if rank in self._regrouping:
            if isinstance(message, Hello) and message.generation == self.generation:
                self._regrouping.remove(rank)
                self._hellos[rank] = message
            elif not isinstance(message, Failed) or message.waits:
                return
        if isinstance(message, Failed):
            news[rank] = message
        else:
            self._inbox[rank].append(message)

    def _unregister(self, rank: int) -> None:
        descriptor = self._registered.pop(rank, None)
        if descriptor is not None:
            self._selector.unregister(descriptor)

    def _drop(self, rank: int) -> None:
        """Forget a rank's process: its channel is closed, nothing more is heard of it."""
        self._unregister(rank)
        channel = self._channels.pop(rank, None)
        if channel is not None:
            channel.close()
        self._inbox[rank].clear()
        self._regrouping.discard(rank)
        self._hellos.pop(rank, None)
        self._heard.pop(rank, None)

    # ---- failures

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _raise_if_cancelled(self) -> None:
        """To be called wherever something is waited for, in `_spawn`, too."""
        if self._cancelled.is_set():
            raise self._fail({}, hung=True)

    def _fail(self, news: Mapping[int, str | Failed], hung: bool = False) -> ShardFailure:
        """The failure to raise: waits a moment for other ranks' news, then names the ranks at the root of it."""
        self._news = dict(news)
        if not hung:
            self._listen_for_more(self._news)
        self._failure = describe(self._news, self._hellos)
        known = [self._silent_for(rank) for rank in self._failure.ranks if rank in self._heard]
        self._failure.detect_s = max(known, default=0.0)
        return self._failure

    def _listen_for_more(self, news: dict[int, str | Failed]) -> None:
        """Adds what other ranks say within a moment, and how processes ended whose sockets only closed."""
        deadline = time.monotonic() + ROOT_CAUSE_S
        while time.monotonic() < deadline:
            for pending in self._pending_channels:  # ranks that fail before their hello has been taken
                with contextlib.suppress(ChannelTimeout, ChannelClosed):
                    message = pending.receive(0.0)
                    if isinstance(message, Failed) and message.rank in set(range(self.world_size)) - self._channels.keys():
                        news[message.rank] = message
            # the end of a process says more than the end of its socket, but is known a little later
            dead = self._dead_ranks()
            news |= {rank: why for rank, why in dead.items() if not isinstance(news.get(rank), Failed)}
            explained = dead.keys() | {rank for rank, what in news.items() if isinstance(what, Failed)}
            if explained >= {*range(self.world_size)}:
                return
            for key, _ in self._selector.select(ROOT_CAUSE_POLL_S) if self._registered else []:
                self._receive(key.data, news)

    def _close_channels(self) -> None:
        for channel in [*self._channels.values(), *self._pending_channels]:
            channel.close()


def open_store(host: str, listening: socket.socket) -> Any:
    """torch's TCPStore on a socket that listens already; the store lives here, so it survives every shard."""
    import torch.distributed as dist

    port = listening.getsockname()[1]
    return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
