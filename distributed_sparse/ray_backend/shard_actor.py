"""ShardActor: the Ray actor that runs one shard in a single long `run` call; the shard ends with the call."""

from __future__ import annotations

import dataclasses
import os

import ray

from distributed_sparse.ranks.worker import ShardArguments, run_shard


@dataclasses.dataclass(frozen=True)
class Place:
    """The node and process of an actor."""

    node_id: str
    node_ip: str
    pid: int
    num_cores: int
    """Number of cores that this process may run on."""


@ray.remote(max_restarts=0)
class ShardActor:
    """Call `where`, then `run`. Ray never restarts it; its group replaces it with a new actor.

    Args:
        name: the prefix that Ray puts before this actor's log lines.
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
        """Run the shard until it ends; see `run_shard`."""
        run_shard(arguments)
