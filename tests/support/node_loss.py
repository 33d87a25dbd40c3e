"""A cluster whose nodes go, and a group of stand-ins on it: run as a program, which prints what became of each loss as JSON.

In a process of its own: a process has one connection to Ray, and the tests' own is to another.

    python -m tests.support.node_loss MODEL
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.cluster_utils import Cluster

from distributed_sparse.config import EngineConfig
from distributed_sparse.protocol.step import StepPlan
from distributed_sparse.ranks.base import ShardFailure
from distributed_sparse.ray_backend.group import RayShardGroup
from tests.support.patience import WAIT_S
from tests.support.stand_in_shard import StandInShard


class Losses:
    """The cluster, the group on it, and the Driver's log. This process stands in for the Driver, on the head, with no CPU."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.log: list[str] = []
        self.failures: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: self.log.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("distributed_sparse").addHandler(handler)
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        ray.init(address=self.cluster.address, logging_level=logging.ERROR, log_to_driver=False)
        self.group = self.new_group()

    def new_group(self) -> RayShardGroup:
        config = EngineConfig(model=self.model, tensor_parallel_size=2, device="cpu")
        self.group = RayShardGroup(config, shard_factory=StandInShard, name="lost-nodes")
        return self.group

    def start(self, *num_cpus: int) -> dict[str, Any]:
        """Add nodes, and start a new group; `found` of it."""
        for count in num_cpus:
            self.cluster.add_node(num_cpus=count)
        self.new_group().start()
        return self.found()

    def lose(self, rank: int, graceful: bool = False) -> dict[str, Any]:
        """The node of a rank stops in good order, or goes as if its power had gone; what the group noticed."""
        assert self.group.ranks, f"the last rebuild failed: {self.failures}"
        lost = self.group.ranks[rank]
        entry = next(node for node in ray.nodes() if node["NodeID"] == lost.node_id)
        node = next(node for node in self.cluster.worker_nodes if node._raylet_socket_name == entry["RayletSocketName"])
        self.log.clear()
        began = time.monotonic()
        if not graceful:
            for info in self.group.ranks:
                if info.node_id == lost.node_id:
                    os.kill(info.pid, signal.SIGKILL)
        removal = threading.Thread(target=self.cluster.remove_node, args=(node, graceful))
        removal.start()
        try:
            while time.monotonic() < began + 30.0:
                self.group.check()
                time.sleep(0.01)
            return {}
        except ShardFailure as failure:
            return {"seconds": time.monotonic() - began, "ranks": failure.ranks, "cause": failure.cause}
        finally:
            removal.join()

    def rebuild(self, timeout: float = WAIT_S) -> dict[str, Any]:
        """How long it took, with the error if there was one, or `found`.

        A rank that is found dead on the way is replaced by another rebuild, as the engine's recovery does it.
        """
        began, error = time.monotonic(), ""
        self.failures.clear()
        while True:
            try:
                self.group.rebuild(began + timeout)
            except ShardFailure as failure:
                self.failures.append(str(failure))
                if failure.ranks and len(self.failures) < 3:
                    continue
                error = f"ShardFailure: {failure}"
            except ValueError as refusal:
                error = f"ValueError: {refusal}"
            seconds = time.monotonic() - began
            return {"seconds": seconds, "error": error, "log": list(self.log), **({} if error else self.found())}

    def rebuild_meanwhile(self, after: float, action: Callable[[], object]) -> dict[str, Any]:
        """The same, with `action` taken `after` so many seconds; `seconds` are counted from then on."""
        with ThreadPoolExecutor(1) as threads:
            rebuilt = threads.submit(self.rebuild)
            time.sleep(after)
            assert not rebuilt.done(), rebuilt.result()
            action()  # Ray starts nodes in the main thread only
            return rebuilt.result() | {"seconds": rebuilt.result()["seconds"] - after}

    def found(self) -> dict[str, Any]:
        """The ranks, whether steps go through all of them, and the cluster."""
        tokens = []
        for number in (5, 6):
            self.group.send(StepPlan(step=number, generation=self.group.generation))
            tokens.append([result.tokens for result in self.group.collect(20.0)])
        return {
            "nodes": [info.node_id for info in self.group.ranks],
            "pids": [info.pid for info in self.group.ranks],
            "steps": tokens == [[[3, 5]] * 2, [[3, 6]] * 2],
            "placements": self.placements(),
        }

    def placements(self) -> list[str]:
        """The strategies of all placement groups that are left."""
        table = ray.util.placement_group_table().values()
        return [entry["strategy"] for entry in table if entry["state"] != "REMOVED"]

    def stop(self) -> dict[str, Any]:
        self.group.stop()
        return {"placements": self.placements()}


def main(model: str) -> dict[str, Any]:
    """Every loss, one after the other."""
    losses = Losses(model)
    found: dict[str, Any] = {"started": losses.start(1, 1, 1)}
    found["power"] = losses.lose(1), losses.rebuild()
    found["no room, then a new node"] = (
        losses.lose(1, graceful=True),
        losses.rebuild_meanwhile(3.0, lambda: losses.cluster.add_node(num_cpus=1)),
    )
    found["no room until the deadline"] = losses.lose(1), losses.rebuild(timeout=6.0)
    found["given up"] = losses.stop()
    found["on one node"] = losses.start(2)
    losses.cluster.add_node(num_cpus=1)
    found["the only node with room for all"] = losses.lose(1), losses.rebuild()
    found["cancelled"] = losses.lose(0), losses.rebuild_meanwhile(4.0, losses.group.cancel)
    found["stopped"] = losses.stop()
    ray.shutdown()
    losses.cluster.shutdown()
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
