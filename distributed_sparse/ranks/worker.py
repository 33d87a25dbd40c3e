"""serve: the life of one shard: say hello, join, load, allocate, then a result for every plan, in order, until told to stop.

When another rank fails it keeps its weights, says hello to the next generation, and goes on.

Needs no Ray: an actor runs it, and so does any process.
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
"""A shard says that it is alive this often."""
MAX_PENDING = 2
"""Steps queued on the device before the first one's result is waited for."""
RESULT_POLL_S = 1e-4
"""How often a shard whose device is at work looks whether it is done, while it also listens for the next plan."""


class ShardInterface(Protocol):
    """What `serve` asks of a shard, in the order in which it asks."""

    def load(self) -> Loaded:
        """Weights in place; how many pages would fit."""

    def allocate(self, num_pages: int) -> Ready:
        """Cache allocated, warm-up done. Called again in every generation, for nothing to be left of the last one's counts."""

    def begin(self, plan: StepPlan) -> PendingStep:
        """One step, queued behind those begun before it; computed where it cannot be queued."""

    def close(self) -> None:
        """Give everything back."""


ShardFactory = Callable[["EngineConfig", int, int, "Collectives"], ShardInterface]
"""(config, rank, world_size, collectives) -> shard."""


@dataclasses.dataclass(frozen=True)
class ShardArguments:
    """What one rank is told when it is spawned; picklable."""

    config: EngineConfig
    rank: int
    world_size: int
    generation: int
    address: tuple[str, int]
    """Where the Driver listens."""
    secret: bytes
    store_address: tuple[str, int]
    """Where the ranks meet: the Driver's TCPStore."""
    node_ip: str
    node_id: str
    num_threads: int
    """torch threads: the node's cores shared among the ranks on it."""
    shard_factory: ShardFactory | None = None
    """None: `Shard` itself."""


def run_shard(arguments: ShardArguments) -> None:
    """The whole life of a shard. Returns after `Stop`, or when the Driver has gone.

    Raises:
        Exception: whatever ended the shard; the Driver has been told before.
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
            logger.warning("rank %d ends: the driver has gone (%s)", arguments.rank, error)
        except BaseException as error:
            # told before anything is closed, which takes a while
            with contextlib.suppress(OSError):
                channel.send(failed(arguments.rank, error))
            raise


def next_message(channel: Channel, worker: Worker) -> ToShard:
    """The next word of the Driver; until it comes, and before too much is queued, results go out as they get ready."""
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
    """Say `Alive` every `HEARTBEAT_S` from a thread of its own, as long as the block runs."""
    ended = threading.Event()

    def beat() -> None:
        with contextlib.suppress(OSError):  # the Driver has gone: the thread that receives finds out, too
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
    """A shard and its collectives, from one generation to the next; `answer` does what one message asks for.

    Attributes:
        pending: steps begun whose results have not been sent, the oldest first.
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
        # torch is imported before the hello: between `Join` and the meeting, others wait where nothing can wake them
        self._collectives = self._collectives or make_collectives(self._arguments)
        return introduction(self._arguments)

    @property
    def hello(self) -> Hello:
        """The first word in this generation."""
        return msgspec.structs.replace(self._introduction, generation=self._generation)

    def answer(self, message: StepPlan | Join | AllocateCache | Regroup) -> Message | None:
        """What to send back at once; None for a plan: it is `pending`, or its group has broken, and it is forgotten.

        A collective that breaks off is another rank's failure: this one keeps its weights, and waits to be regrouped.

        Raises:
            Exception: whatever the shard raised; it cannot go on.
        """
        return self._or_broken(lambda: self._do(message))

    def finish_step(self) -> Message:
        """The result of the oldest pending step. Raises as `answer`."""
        step = self.pending.popleft()
        return self._or_broken(step.result)

    def _do(self, message: StepPlan | Join | AllocateCache | Regroup) -> Message | None:
        if isinstance(message, StepPlan):
            assert self._shard is not None
            if not self._broken:  # else it was sent before the Driver knew
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
                self._collectives.close()  # ranks that wait for this one in turn find out now
            return failed(self._arguments.rank, error, waits=True)

    def _join(self) -> Loaded:
        if self._collectives is None:
            self._collectives = make_collectives(self._arguments)
        self._collectives.meet(self._generation)
        if self._shard is None:
            given = self._arguments
            self._shard = make_shard(given.config, given.rank, given.world_size, self._collectives, given.shard_factory)
        if self._loaded is None:
            self._loaded = self._shard.load()
        return self._loaded

    def close(self) -> None:
        """Give back what the shard and the collectives hold."""
        if self._shard is not None:
            self._shard.close()
        if self._collectives is not None:
            self._collectives.close()


def failed(rank: int, error: BaseException, waits: bool = False) -> Failed:
    """What a shard tells of an exception."""
    return Failed(rank, f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)), waits)


def introduction(arguments: ShardArguments) -> Hello:
    """The first word of a rank: who and where it is, and what it would compute with."""
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
    """Set this process's threads and device; then what it will meet the other ranks with."""
    import torch
    import torch.distributed as dist

    from distributed_sparse.shard.collectives.collectives import Collectives

    config, timeout = arguments.config, arguments.config.startup_timeout_s
    torch.set_num_threads(arguments.num_threads)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(0)  # whoever spawned this process has shown it one GPU only
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
    """The shard of one rank: `factory`'s, or a `Shard`."""
    if factory is None:
        from distributed_sparse.shard.shard import Shard

        factory = Shard
    return factory(config, rank, world_size, collectives)
