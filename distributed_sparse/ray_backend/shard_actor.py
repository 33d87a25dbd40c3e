"""ShardActor: the Ray actor around a shard: one long `run`, whose end is the shard's end."""

from __future__ import annotations

import dataclasses
import os

import ray

from distributed_sparse.ranks.worker import ShardArguments, run_shard


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an actor has come to live."""

    node_id: str
    node_ip: str
    pid: int
    num_cores: int
    """Cores that this process may run on."""


@ray.remote(max_restarts=0)
class ShardActor:
    """Asked where it is, then told to run. Never restarted by Ray: its group puts another in its place.

    Args:
        name: what Ray puts before the lines that this actor logs.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name

    def where(self) -> Place:
        context = ray.get_runtime_context()
        return Place(
            node_id=context.get_node_id(),
            node_ip=ray.util.get_node_ip_address(),
            pid=os.getpid(),
            num_cores=len(os.sched_getaffinity(0)),
        )

    def run(self, arguments: ShardArguments) -> None:
        """The shard's whole life; see `run_shard`."""
        run_shard(arguments)
