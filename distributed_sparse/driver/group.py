"""RayShardGroup: ranks as Ray actors in one placement group."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from distributed_sparse.driver.remote_group import RemoteShardGroup
from distributed_sparse.driver.shard_group import ShardFailure
from distributed_sparse.shard.actor import Place, ShardActor
from distributed_sparse.shard.serve import ShardArguments

if TYPE_CHECKING:
    from distributed_sparse.config import EngineConfig
    from distributed_sparse.shard.serve import ShardFactory

PLACEMENT_TIMEOUT_S = 30.0
"""How long resources that exist but are in use may take to become free."""
DEATH_TIMEOUT_S = 15.0
"""How long Ray may take to end a killed actor; a stopped process takes it 5 s."""


class RayShardGroup(RemoteShardGroup):
    """One rank per actor, one CPU or one GPU per rank, ranks in order of (node, GPU).

    Args:
        config: the engine's; `device="auto"` takes GPUs where the cluster has any.
        generation, shard_factory: as `RemoteShardGroup`.
        name: of the placement group, so that a client can remove it when the Driver has died.
        cpus_per_rank: Ray CPUs of a CPU rank; a Ray that is the engine's alone need not count them.
    """

    def __init__(
        self,
        config: EngineConfig,
        generation: int = 0,
        shard_factory: ShardFactory | None = None,
        name: str = "",
        cpus_per_rank: float = 1.0,
    ) -> None:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if config.device == "auto":
            config = dataclasses.replace(config, device="cuda" if any(node.get("GPU") for node in nodes) else "cpu")
        super().__init__(config, ray.util.get_node_ip_address(), generation, shard_factory)
        self._nodes = nodes
        self._name = name
        self._bundle = {"GPU": 1.0} if config.device == "cuda" else {"CPU": cpus_per_rank}
        self._placement: PlacementGroup | None = None
        self._actors: list[Any] = []
        self._runs: list[ray.ObjectRef] = []

    def _spawn(self, address: tuple[str, int], store_address: tuple[str, int], deadline: float) -> None:
        placement = self._place(deadline)
        actors = [self._make_actor(placement, bundle) for bundle in range(self.world_size)]
        self._actors = actors
        try:
            places: list[Place] = ray.get([actor.where.remote() for actor in actors], timeout=deadline - time.monotonic())
        except GetTimeoutError:
            raise ShardFailure(
                (), f"the {self.world_size} shard actors were not up within startup_timeout_s={self.config.startup_timeout_s:g}"
            ) from None
        except RayError as error:
            raise ShardFailure((), f"a shard actor could not be created: {reason(error)}") from None
        # bundles are numbered in no order of nodes; ranks next to each other should share a node
        order = sorted(range(self.world_size), key=lambda bundle: (places[bundle].node_id, places[bundle].gpus))
        self._actors = [actors[bundle] for bundle in order]
        ranks_on = Counter(place.node_id for place in places)
        for rank, bundle in enumerate(order):
            place = places[bundle]
            arguments = ShardArguments(
                config=self.config,
                rank=rank,
                world_size=self.world_size,
                generation=self.generation,
                address=address,
                secret=self.secret,
                store_address=store_address,
                node_ip=place.node_ip,
                node_id=place.node_id,
                num_threads=max(1, place.num_cores // ranks_on[place.node_id]),
                shard_factory=self.shard_factory,
            )
            self._runs.append(actors[bundle].run.remote(arguments))

    def _place(self, deadline: float) -> PlacementGroup:
        """A placement group with one bundle per rank, its resources reserved.

        Raises:
            ValueError: the cluster has too little, or it stays in use.
        """
        (resource, amount), *_ = self._bundle.items()
        fits = [math.floor(node.get(resource, 0.0) / amount + 1e-9) for node in self._nodes]
        asked = (
            f"tensor_parallel_size={self.world_size} on device={self.config.device!r} asks for {self.world_size} {resource}s"
        )
        if sum(fits) < self.world_size:
            total = sum(node.get(resource, 0.0) for node in self._nodes)
            raise ValueError(
                f"{asked}, but the Ray cluster has {total:g} on {len(self._nodes)} node(s); "
                f"lower tensor_parallel_size or add nodes{' (or use device=cpu)' if resource == 'GPU' else ''}"
            )
        strategy = "STRICT_PACK" if max(fits) >= self.world_size else "PACK"
        placement = placement_group([self._bundle] * self.world_size, strategy=strategy, name=self._name)
        self._placement = placement
        timeout = min(PLACEMENT_TIMEOUT_S, deadline - time.monotonic())
        if not placement.wait(timeout):
            free = ray.available_resources().get(resource, 0.0)
            raise ValueError(
                f"{asked}{' on one node' if strategy == 'STRICT_PACK' else ''}, and none came free within {timeout:.0f} s: "
                f"the Ray cluster has {free:g} of {sum(n.get(resource, 0.0) for n in self._nodes):g} unused; "
                "end what uses them (`ray status` shows it) or lower tensor_parallel_size"
            )
        return placement

    def _make_actor(self, placement: PlacementGroup, bundle: int) -> Any:
        return ShardActor.options(  # type: ignore[attr-defined]
            num_cpus=self._bundle.get("CPU", 0),
            num_gpus=self._bundle.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=bundle),
        ).remote()

    def _dead_ranks(self) -> dict[int, str]:
        if not self._runs:
            return {}
        ended, _ = ray.wait(self._runs, num_returns=len(self._runs), timeout=0, fetch_local=False)
        return {self._runs.index(run): end_of(run) for run in ended}

    def _kill(self, grace: float) -> None:
        if self._runs:
            ray.wait(self._runs, num_returns=len(self._runs), timeout=grace, fetch_local=False)
        self._kill_here()
        for actor in self._actors:
            ray.kill(actor)
        deadline = time.monotonic() + DEATH_TIMEOUT_S
        for actor in self._actors:
            wait_until_dead(actor, deadline)
        if self._placement is not None:
            remove(self._placement)
        self._actors, self._runs, self._placement = [], [], None

    def _kill_here(self) -> None:
        """End what still runs on this node directly: Ray takes 5 s for a process that has been stopped."""
        here = ray.get_runtime_context().get_node_id()
        dead = self._dead_ranks()
        for rank, hello in self._hellos.items():
            if hello.node_id == here and rank not in dead and is_shard(hello.pid):
                with contextlib.suppress(OSError):
                    os.kill(hello.pid, signal.SIGKILL)


def is_shard(pid: int) -> bool:
    """Whether that process is one of Ray's, running a ShardActor: a pid from another container would be another's."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::ShardActor")
    except OSError:
        return False


def end_of(run: ray.ObjectRef) -> str:
    """How a `run` that has ended came to its end."""
    try:
        ray.get(run)
    except RayError as error:
        return f"died: {reason(error)}"
    return "ended before it was told to"


def reason(error: RayError) -> str:
    """What the user needs to know of Ray's error: the actor's own exception, or the line that says why it died."""
    if isinstance(error, RayTaskError):
        return f"{type(error.cause).__name__}: {error.cause}"
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())


def wait_until_dead(actor: Any, deadline: float) -> None:
    """Returns once Ray knows that a killed actor's process has gone, or at `deadline` (`time.monotonic`)."""
    while (remaining := deadline - time.monotonic()) > 0:
        try:
            ray.get(actor.where.remote(), timeout=remaining)
        except (RayActorError, GetTimeoutError):
            return
        time.sleep(0.02)  # the call was faster than the kill


def remove(placement: PlacementGroup, timeout: float = 5.0) -> None:
    """Remove a placement group, and return once Ray counts it as removed. Harmless when it has gone."""
    with contextlib.suppress(RayError, ValueError):
        remove_placement_group(placement)
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and placement_group_table(placement).get("state") != "REMOVED":
            time.sleep(0.02)
