"""ProcessShardGroup: ranks as processes of their own that meet over loopback and gloo: tensor parallelism without Ray."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from distributed_sparse.config import EngineConfig
from distributed_sparse.ranks.remote import RemoteShardGroup
from distributed_sparse.ranks.worker import ShardArguments, ShardFactory, run_shard

PRELOAD = [
    "torch",
    "torch.distributed",
    "safetensors.torch",
    "distributed_sparse.ranks.worker",
    "distributed_sparse.shard.shard",
]


class ProcessShardGroup(RemoteShardGroup):
    """A group on this machine; `processes` are its ranks, in rank order, `former` those that they have replaced.

    Args:
        config, shard_factory, generation: as `RemoteShardGroup`.
        num_threads: torch threads of each rank.
        run: what each process runs, instead of `run_shard`.
    """

    def __init__(
        self,
        config: EngineConfig,
        shard_factory: ShardFactory | None = None,
        generation: int = 0,
        num_threads: int = 1,
        run: Callable[[ShardArguments], None] = run_shard,
    ) -> None:
        super().__init__(config, "127.0.0.1", generation, shard_factory)
        self.num_threads = num_threads
        self.run = run
        self.processes: list[BaseProcess] = []
        self.former: list[BaseProcess] = []
        self.ports: list[int] = []

    def _spawn(self, ranks: list[int], address: tuple[str, int], store_address: tuple[str, int], deadline: float) -> None:
        self.ports += [address[1], store_address[1]]
        # children of a process that has imported torch once: a group starts in a second, where spawning takes seven
        forkserver = multiprocessing.get_context("forkserver")
        forkserver.set_forkserver_preload(PRELOAD)
        self.former += [self.processes[rank] for rank in ranks if self.processes]
        self.processes = self.processes or [None] * self.world_size  # type: ignore[list-item]
        for rank in ranks:
            arguments = ShardArguments(
                config=self.config,
                rank=rank,
                world_size=self.world_size,
                generation=self.generation,
                address=address,
                secret=self.secret,
                store_address=store_address,
                node_ip=self.host,
                node_id=f"node-{rank}",
                num_threads=self.num_threads,
                shard_factory=self.shard_factory,
            )
            self.processes[rank] = forkserver.Process(
                target=run_and_leave, args=(self.run, arguments), name=f"rank-{rank}", daemon=True
            )
            self.processes[rank].start()

    def _dead_ranks(self) -> dict[int, str]:
        return {rank: ended(process.exitcode) for rank, process in enumerate(self.processes) if process.exitcode is not None}

    def _kill(self, ranks: list[int], grace: float) -> None:
        deadline = time.monotonic() + grace
        processes = [self.processes[rank] for rank in ranks if self.processes]
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0.0))
        for process in processes:
            process.kill()
        for process in processes:
            process.join()

    def _release(self) -> None: ...


def run_and_leave(run: Callable[[ShardArguments], None], arguments: ShardArguments) -> None:
    """Run a rank and end its process at once: taking a Python with torch in it apart takes seconds."""
    try:
        run(arguments)
        exitcode = 0
    except BaseException:
        traceback.print_exc()
        exitcode = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exitcode)


def open_ports() -> set[int]:
    """TCP ports of this machine that are listened on or connected."""
    listening, established = "0A", "01"
    ports = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state in (listening, established):
                ports.add(int(local.rpartition(":")[2], 16))
    return ports


def connections(pid: int, port: int) -> set[int]:
    """The local ports of a process's connections to a port of this machine."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            inodes.add(descriptor.readlink().name.removeprefix("socket:[").removesuffix("]"))
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, remote, *_, inode = line.split()[:10]
            if inode in inodes and int(remote.rpartition(":")[2], 16) == port:
                found.add(int(local.rpartition(":")[2], 16))
    return found


def open_sockets() -> int:
    """Sockets that this process holds."""
    count = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that lists them
            count += descriptor.readlink().name.startswith("socket:")
    return count


def ended(exitcode: int) -> str:
    """How a process came to its end."""
    if exitcode < 0:
        return f"was killed by {signal.Signals(-exitcode).name}"
    return f"ended with exit code {exitcode}"
