"""worker: the loop of one rank: start-up messages, then one result per step plan in order, until `Stop`.

After another rank's failure the process keeps its weights and rejoins as the next generation. Does not need Ray: an actor runs
it, and any other process can.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol, TypeVar

import msgspec

from distributed_sparse.protocol.step import (
    Alive,
    AllocateCache,
    Failed,
    Hello,
    Join,
    Loaded,
    Message,
    Ready,
    Regroup,
    StepPlan,
    Stop,
    ToShard,
)
from distributed_sparse.ranks.channel import Channel, ChannelClosed, connect
from distributed_sparse.utils.versions import versions

if TYPE_CHECKING:
    from distributed_sparse.config import EngineConfig
    from distributed_sparse.shard.collectives.collectives import Collectives
    from distributed_sparse.shard.pending import PendingStep

M = TypeVar("M")

logger = logging.getLogger(__name__)

HEARTBEAT_S = 0.5
"""Interval of `Alive` messages."""
MAX_PENDING = 2
"""Maximum number of steps queued on the device; beyond it the worker waits for the oldest result."""
RESULT_POLL_S = 1e-4
"""Polling interval for finished steps and new plans while the device is busy."""


class ShardInterface(Protocol):
    """The calls that `Worker` makes, in this order."""

    def load(self) -> Loaded:
        """Load the weights; return how many pages fit."""

    def allocate(self, num_pages: int) -> Ready:
        """Allocate the cache and warm up. Called once per generation; must reset all counters."""

    def begin(self, plan: StepPlan) -> PendingStep:
        """Queue a step behind earlier ones; compute it at once if the device has no queue."""

    def close(self) -> None:
        """Release all resources."""


ShardFactory = Callable[["EngineConfig", int, int, "Collectives"], ShardInterface]
"""(config, rank, world_size, collectives) -> shard."""


@dataclasses.dataclass(frozen=True)
class ShardArguments:
    """Arguments of `run_shard` for one rank; picklable."""

    config: EngineConfig
    rank: int
    world_size: int
    generation: int
    address: tuple[str, int]
    """Address that the Driver listens on."""
    secret: bytes
    store_address: tuple[str, int]
    """Address of the Driver's TCPStore, for the ranks' rendezvous."""
    node_ip: str
    node_id: str
    num_threads: int
    """torch threads: the node's cores divided by the ranks on it."""
    shard_factory: ShardFactory | None = None
    """None: `Shard` itself."""


def run_shard(arguments: ShardArguments) -> None:
    """Run a shard until `Stop`, or until the Driver's connection closes.

    Raises:
        Exception: the error that ended the shard; it has been sent to the Driver.
    """
    with contextlib.ExitStack() as opened:
        channel = connect(arguments.address, arguments.secret, arguments.config.startup_timeout_s)
        opened.callback(channel.close)
        opened.enter_context(heartbeat(channel, arguments.rank))
        worker = Worker(arguments)
        opened.callback(worker.close)
        try:
            channel.send(worker.hello)
            while not isinstance(message := next_message(channel, worker), Stop):
                answer = worker.answer(message)
                if answer is not None:
                    channel.send(answer)
        except ChannelClosed as error:
            logger.warning("rank %d ends: the connection to the driver closed (%s)", arguments.rank, error)
        except BaseException as error:
            # sent before closing anything, which takes a while
            with contextlib.suppress(OSError):
                channel.send(failed(arguments.rank, error))
            raise


def next_message(channel: Channel, worker: Worker) -> ToShard:
    """Wait for the Driver's next message. Meanwhile send results as they get ready; at MAX_PENDING steps, send one first."""
    while worker.pending:
        if worker.pending[0].ready or len(worker.pending) == MAX_PENDING:
            channel.send(worker.finish_step())
        elif channel.poll():
            break
        else:
            time.sleep(RESULT_POLL_S)
    return channel.receive()


@contextlib.contextmanager
def heartbeat(channel: Channel, rank: int) -> Iterator[None]:
    """Send `Alive` every `HEARTBEAT_S` from a separate thread while the block runs."""
    ended = threading.Event()

    def beat() -> None:
        with contextlib.suppress(OSError):  # connection lost: the receiving thread notices, too
            while not ended.wait(HEARTBEAT_S):
                channel.send(Alive(rank))

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Worker:
    """A shard and its collectives over all generations; `answer` handles one message.

    Attributes:
        pending: steps begun whose results have not been sent, oldest first.
    """

    def __init__(self, arguments: ShardArguments) -> None:
        self.pending: deque[PendingStep] = deque()
        self._arguments = arguments
        self._generation = arguments.generation
        self._collectives: Collectives | None = None
        self._shard: ShardInterface | None = None
        self._loaded: Loaded | None = None
        self._broken = False

    @functools.cached_property
    def _introduction(self) -> Hello:
        # torch is imported before `Hello` is sent: after `Join` the other ranks block in the rendezvous, uninterruptibly
        self._collectives = self._collectives or make_collectives(self._arguments)
        return introduction(self._arguments)

    @property
    def hello(self) -> Hello:
        """The first message of this generation."""
        return msgspec.structs.replace(self._introduction, generation=self._generation)

    def answer(self, message: StepPlan | Join | AllocateCache | Regroup) -> Message | None:
        """Handle a message and return the answer. None for a plan: it is added to `pending`, or dropped if the group is broken.

        If a collective breaks off, another rank has failed: this one returns `Failed` with `waits`, keeps its weights, and
        expects `Regroup`.

        Raises:
            Exception: the shard's own error; the shard cannot go on.
        """
        return self._or_broken(lambda: self._do(message))

    def finish_step(self) -> Message:
        """Wait for the oldest pending step's result. Raises as `answer`."""
        step = self.pending.popleft()
        return self._or_broken(step.result)

    def _do(self, message: StepPlan | Join | AllocateCache | Regroup) -> Message | None:
        if isinstance(message, StepPlan):
            assert self._shard is not None
            if not self._broken:  # else the Driver sent it before it knew of the failure
                self.pending.append(self._shard.begin(message))
            return None
        if isinstance(message, Join):
            return self._join()
        if isinstance(message, AllocateCache):
            assert self._shard is not None
            return self._shard.allocate(message.num_pages)
        assert isinstance(message, Regroup)
        self._generation, self._broken = message.generation, False
        self.pending.clear()
        return self.hello

    def _or_broken(self, work: Callable[[], M]) -> M | Failed:
        try:
            return work()
        except Exception as error:
            from distributed_sparse.shard.collectives.collectives import CollectiveError

            if not isinstance(error, CollectiveError):
                raise
            self._broken = True
            self.pending.clear()
            if self._collectives is not None:
                self._collectives.close()  # so that ranks blocked on this one fail at once, too
            return failed(self._arguments.rank, error, waits=True)

    def _join(self) -> Loaded:
        if self._collectives is None:
            self._collectives = make_collectives(self._arguments)
        self._collectives.rendezvous(self._generation)
        if self._shard is None:
            given = self._arguments
            self._shard = make_shard(given.config, given.rank, given.world_size, self._collectives, given.shard_factory)
        if self._loaded is None:
            self._loaded = self._shard.load()
        return self._loaded

    def close(self) -> None:
        """Release the shard and the collectives."""
        if self._shard is not None:
            self._shard.close()
        if self._collectives is not None:
            self._collectives.close()


def failed(rank: int, error: BaseException, waits: bool = False) -> Failed:
    """The message that reports an exception."""
    return Failed(rank, f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)), waits)


def introduction(arguments: ShardArguments) -> Hello:
    """A rank's `Hello`: its place, package versions and weights fingerprint."""
    from distributed_sparse.model.checkpoint import resolve_checkpoint, weights_fingerprint

    config = arguments.config
    return Hello(
        rank=arguments.rank,
        generation=arguments.generation,
        node_id=arguments.node_id,
        hostname=socket.gethostname(),
        pid=os.getpid(),
        versions=versions(),
        weights_fingerprint=weights_fingerprint(resolve_checkpoint(config.model, config.load_format), config.load_format),
    )


def make_collectives(arguments: ShardArguments) -> Collectives:
    """Set this process's torch threads and device; return its collectives, not connected to the other ranks yet."""
    import torch
    import torch.distributed as dist

    from distributed_sparse.shard.collectives.collectives import Collectives

    config, timeout = arguments.config, arguments.config.startup_timeout_s
    torch.set_num_threads(arguments.num_threads)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(0)  # the process sees exactly one GPU
    if arguments.world_size == 1:
        return Collectives()
    host, port = arguments.store_address
    return Collectives(
        rank=arguments.rank,
        world_size=arguments.world_size,
        device=device,
        store=dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout)),
        node_ip=arguments.node_ip,
        timeout=timeout,
    )


def make_shard(
    config: EngineConfig, rank: int, world_size: int, collectives: Collectives, factory: ShardFactory | None
) -> ShardInterface:
    """Make one rank's shard with `factory`; None: a `Shard`."""
    if factory is None:
        from distributed_sparse.shard.shard import Shard

        factory = Shard
    return factory(config, rank, world_size, collectives)
