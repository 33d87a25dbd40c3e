"""MessagingGroup: the sockets of a group of remote ranks: sends and gathers messages, detects failed and silent ranks."""

from __future__ import annotations

import contextlib
import logging
import selectors
import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Mapping
from typing import TypeVar

from distributed_sparse.protocol import step as messages
from distributed_sparse.protocol.step import Alive, Failed, Hello
from distributed_sparse.ranks.base import ShardFailure, ShardGroup
from distributed_sparse.ranks.channel import Channel, ChannelClosed, ChannelTimeout, Listener
from distributed_sparse.ranks.failures import describe

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=messages.Message)

POLL_S = 0.1
"""Interval of the checks for dead processes while no socket is readable."""
ROOT_CAUSE_S = 0.25
"""Time after a first failure in which failures of other ranks are collected: the rank that caused it may report later."""
ROOT_CAUSE_POLL_S = 0.01
SILENCE_S = 5.0
"""A rank without a message, `Alive` included, for so long has failed: its process hangs or its node is unreachable."""
START_SILENCE_S = 60.0
"""The same during start-up: imports, loading and compilation may hold the GIL and so stop the heartbeat thread."""
SUSPECT_S = 2.0
"""If a step times out, ranks silent for at least this long are the cause; the others are only waiting for them."""


class MessagingGroup(ShardGroup):
    """Base of `RemoteShardGroup`: one channel and one inbox per rank."""

    def __init__(self, world_size: int, generation: int = 0) -> None:
        super().__init__(world_size, generation)
        self._listener: Listener | None = None
        self._pending_channels: list[Channel] = []  # accepted; `Hello` not received yet
        self._channels: dict[int, Channel] = {}
        self._hellos: dict[int, Hello] = {}
        self._regrouping: set[int] = set()  # ranks whose new `Hello` is due; other messages of theirs are outdated
        self._inbox: list[deque[messages.Message]] = [deque() for _ in range(self.world_size)]
        self._selector = selectors.DefaultSelector()
        self._registered: dict[int, int] = {}  # rank -> file descriptor, since a closed channel has none
        self._heard: dict[int, float] = {}  # rank -> time of its last message
        self._listened = 0.0  # time of the last liveness check
        self._failure: ShardFailure | None = None
        self._reasons: dict[int, str | Failed] = {}  # what is known about each failed rank
        self._cancelled = threading.Event()

    @abstractmethod
    def _dead_ranks(self) -> dict[int, str]:
        """Ranks whose process has ended, each with the reason. Must not block."""

    def _send_all(self, message: messages.Message) -> None:
        frame = messages.encode(message)
        lost = {}
        for rank, channel in self._channels.items():
            try:
                channel.send_bytes(frame)
            except OSError as error:
                lost[rank] = f"lost its connection: {error}"
        if lost:
            raise self._fail(lost)

    def _gather(self, kind: type[M], deadline: float, task: str) -> list[M]:
        """The next message of every rank, in rank order.

        Args:
            kind: the expected type; another one is a failure.
            deadline: `time.monotonic`.
            task: completes the error "did not ..." after the deadline.
        """
        ranks, began = range(self.world_size), time.monotonic()
        while missing := [rank for rank in ranks if not self._inbox[rank]]:
            self._raise_if_cancelled()
            remaining = deadline - time.monotonic()
            # heartbeats make sockets readable all the time, so check liveness every POLL_S even then
            if self._read(max(min(POLL_S, remaining), 0.0)) and time.monotonic() - self._listened < POLL_S:
                continue
            while self._read(0.0):
                pass
            self._check_liveness()
            # checked after reading: if the Driver itself was late, the answers may have arrived in time
            missing = [rank for rank in missing if not self._inbox[rank]]
            if missing and remaining <= 0:
                silent = [rank for rank in missing if self._silent_for(rank) > SUSPECT_S]
                failure = self._fail({rank: f"did not {task}" for rank in silent or missing}, hung=True)
                failure.detect_s = max(failure.detect_s, time.monotonic() - began)  # its heartbeat went on while it hung
                raise failure
        taken = {rank: self._inbox[rank].popleft() for rank in ranks}
        wrong = {rank: f"sent {type(m).__name__}, not {kind.__name__}" for rank, m in taken.items() if type(m) is not kind}
        if wrong:
            raise self._fail(wrong)
        return list(taken.values())  # type: ignore[arg-type]

    def _check_liveness(self) -> None:
        """Raise the failure if a process has ended or has been silent too long. Call after reading all sockets."""
        dead = {rank: why for rank, why in self._dead_ranks().items() if not self._inbox[rank]}
        if dead:
            raise self._fail(dead)
        now = time.monotonic()
        if now - self._listened > SUSPECT_S:  # the Driver did not read, or the machine was suspended
            self._heard = dict.fromkeys(self._heard, now)
        self._listened = now
        limit = SILENCE_S if self.ranks else START_SILENCE_S
        silent = [rank for rank in self._heard if self._silent_for(rank) > limit]
        if silent:
            raise self._fail({rank: f"has sent no heartbeat for {limit:g} s" for rank in silent}, hung=True)

    def _silent_for(self, rank: int) -> float:
        return time.monotonic() - self._heard.get(rank, 0.0)

    def _read(self, timeout: float) -> bool:
        """Read available messages, waiting at most `timeout` seconds for the first; return whether there were any."""
        if len(self._channels) < self.world_size:
            return self._accept_ranks(timeout)
        return self._receive_ready(timeout)

    def _accept_ranks(self, timeout: float) -> bool:
        """As `_receive_ready` while ranks are still connecting: also accept connections and read their `Hello`."""
        assert self._listener is not None
        channel = self._listener.accept(timeout)
        if channel is not None:
            self._pending_channels.append(channel)
        heard = channel is not None
        for pending in list(self._pending_channels):
            heard |= self._receive_hello(pending)
        return self._receive_ready(0.0) or heard

    def _receive_hello(self, pending: Channel) -> bool:
        try:
            message = pending.receive(0.0)
        except ChannelTimeout:
            return False
        except ChannelClosed:
            self._pending_channels.remove(pending)  # if it was one of our ranks, `_dead_ranks` gives the reason
            return True
        if isinstance(message, Alive):
            self._heard[message.rank] = time.monotonic()
            return True
        self._pending_channels.remove(pending)
        rank = getattr(message, "rank", -1)
        generation = getattr(message, "generation", self.generation)
        if not isinstance(message, Hello | Failed) or not 0 <= rank < self.world_size or generation != self.generation:
            logger.warning(
                "refused a connection that sent %s with rank %s, generation %s", type(message).__name__, rank, generation
            )
            pending.close()
        elif isinstance(message, Failed):
            pending.close()
            raise self._fail({rank: message})
        elif rank in self._channels:
            pending.close()
            raise self._fail({rank: f"connected twice, the second time as process {message.pid}"})
        else:
            self._channels[rank] = pending
            self._hellos[rank] = message
            self._inbox[rank].append(message)
            self._heard[rank] = time.monotonic()
            self._registered[rank] = pending.fileno()
            self._selector.register(pending.fileno(), selectors.EVENT_READ, rank)
        return True

    def _receive_ready(self, timeout: float) -> bool:
        """Read one message of each readable rank; raise the failure if a rank reports one or has disconnected."""
        ready = self._selector.select(timeout) if self._registered else []
        reasons: dict[int, str | Failed] = {}
        for key, _ in ready:
            self._receive(key.data, reasons)
        if reasons:
            raise self._fail(reasons)
        return bool(ready)

    def _receive(self, rank: int, reasons: dict[int, str | Failed]) -> None:
        try:
            message = self._channels[rank].receive(POLL_S)
        except (ChannelClosed, ChannelTimeout) as error:
            reasons.setdefault(rank, f"lost its connection: {error}")
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
            reasons[rank] = message
        else:
            self._inbox[rank].append(message)

    def _unregister(self, rank: int) -> None:
        descriptor = self._registered.pop(rank, None)
        if descriptor is not None:
            self._selector.unregister(descriptor)

    def _drop(self, rank: int) -> None:
        """Close a rank's channel and forget its state."""
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
        """Call in every waiting loop, also in `_spawn`."""
        if self._cancelled.is_set():
            raise self._fail({}, hung=True)

    def _fail(self, reasons: Mapping[int, str | Failed], hung: bool = False) -> ShardFailure:
        """The failure to raise. Unless `hung`, first collect other ranks' failures for up to ROOT_CAUSE_S to find the cause."""
        self._reasons = dict(reasons)
        if not hung:
            self._collect_reasons(self._reasons)
        self._failure = describe(self._reasons, self._hellos)
        known = [self._silent_for(rank) for rank in self._failure.ranks if rank in self._heard]
        self._failure.detect_s = max(known, default=0.0)
        return self._failure

    def _collect_reasons(self, reasons: dict[int, str | Failed]) -> None:
        """Add to `reasons` the failures of other ranks, and exit reasons of processes whose sockets have closed."""
        deadline = time.monotonic() + ROOT_CAUSE_S
        while time.monotonic() < deadline:
            for pending in self._pending_channels:  # ranks that fail before their `Hello` was read
                with contextlib.suppress(ChannelTimeout, ChannelClosed):
                    message = pending.receive(0.0)
                    if isinstance(message, Failed) and message.rank in set(range(self.world_size)) - self._channels.keys():
                        reasons[message.rank] = message
            # an exit reason says more than a closed socket, but is known slightly later
            dead = self._dead_ranks()
            reasons |= {rank: why for rank, why in dead.items() if not isinstance(reasons.get(rank), Failed)}
            explained = dead.keys() | {rank for rank, what in reasons.items() if isinstance(what, Failed)}
            if explained >= {*range(self.world_size)}:
                return
            for key, _ in self._selector.select(ROOT_CAUSE_POLL_S) if self._registered else []:
                self._receive(key.data, reasons)

    def _close_channels(self) -> None:
        for channel in [*self._channels.values(), *self._pending_channels]:
            channel.close()
