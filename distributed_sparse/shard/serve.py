"""serve: the life of one shard: say hello, load, allocate, then a result for every plan until told to stop.

Needs no Ray: an actor runs it, and so does any process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import logging
import os
import platform
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

from distributed_sparse.driver.channel import Channel, ChannelClosed, connect
from distributed_sparse.driver.messages import AllocateCache, Failed, Hello, Loaded, Ready, StepPlan, StepResult, Stop

if TYPE_CHECKING:
    from distributed_sparse.config import EngineConfig
    from distributed_sparse.shard.collectives import Collectives

logger = logging.getLogger(__name__)

COMPARED_PACKAGES = ("distributed-sparse", "torch", "triton")


class ShardLife(Protocol):
    """What `serve` asks of a shard, in the order in which it asks."""

    def load(self) -> Loaded:
        """Weights in place; how many pages would fit."""

    def allocate(self, num_pages: int) -> Ready:
        """Cache allocated, warm-up done."""

    def step(self, plan: StepPlan) -> StepResult:
        """One step."""

    def close(self) -> None:
        """Give everything back."""


ShardFactory = Callable[["EngineConfig", int, int, "Collectives"], ShardLife]
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
        try:
            serve(channel, arguments, opened)
        except ChannelClosed as error:
            logger.warning("rank %d ends: the driver has gone (%s)", arguments.rank, error)
        except BaseException as error:
            # told before anything is closed: leaving a broken collective group may take for ever
            with contextlib.suppress(OSError):
                channel.send(Failed(arguments.rank, f"{type(error).__name__}: {error}", traceback.format_exc()))
            raise


def serve(channel: Channel, arguments: ShardArguments, opened: contextlib.ExitStack) -> None:
    """Introduce this rank, start its shard, and answer plans until `Stop`; `opened` closes what it opens.

    Raises:
        ChannelClosed: the Driver has gone.
        Exception: whatever the shard raised.
    """
    channel.send(introduction(arguments))
    collectives = make_collectives(arguments)
    opened.callback(collectives.close)
    shard = make_shard(arguments.config, arguments.rank, arguments.world_size, collectives, arguments.shard_factory)
    opened.callback(shard.close)
    channel.send(shard.load())
    while True:
        message = channel.receive()
        if isinstance(message, StepPlan):
            channel.send(shard.step(message))
        elif isinstance(message, AllocateCache):
            channel.send(shard.allocate(message.num_pages))
        else:
            assert isinstance(message, Stop)
            return


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


def versions() -> dict[str, str]:
    """Versions that must be equal on all ranks."""
    found = {"python": platform.python_version()}
    for package in COMPARED_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def make_collectives(arguments: ShardArguments) -> Collectives:
    """Set this process's threads and device, then meet the other ranks."""
    import torch
    import torch.distributed as dist

    from distributed_sparse.shard.collectives import Collectives

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
        generation=arguments.generation,
        node_ip=arguments.node_ip,
        timeout=timeout,
    )


def make_shard(
    config: EngineConfig, rank: int, world_size: int, collectives: Collectives, factory: ShardFactory | None
) -> ShardLife:
    """The shard of one rank: `factory`'s, or a `Shard`."""
    if factory is None:
        from distributed_sparse.shard.shard import Shard

        factory = Shard
    return factory(config, rank, world_size, collectives)
