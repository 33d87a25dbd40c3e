"""RayShardGroup: ranks as Ray actors in one placement group."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from distributed_sparse.ranks.remote import RemoteShardGroup
from distributed_sparse.ranks.worker import ShardArguments
from distributed_sparse.ray_backend.placement import ClientPlacement
from distributed_sparse.ray_backend.shard_actor import Place, ShardActor

if TYPE_CHECKING:
    from distributed_sparse.config import EngineConfig
    from distributed_sparse.ranks.worker import ShardFactory

logger = logging.getLogger(__name__)

T = TypeVar("T")

POLL_S = 0.05
"""Polling interval for Ray's state."""
PLACEMENT_TIMEOUT_S = 30.0
"""Time to wait for resources that are in use, when the ranks are placed for the first time."""
PATIENCE_S = 2.0
"""Time after which ranks of a lost node that find no room are logged."""
DEATH_TIMEOUT_S = 15.0
"""Time for killed processes to disappear."""


class RayShardGroup(RemoteShardGroup):
    """One actor and one CPU or GPU per rank, with the ranks of a node adjacent.

    The placement group lives as long as the group, and a rank keeps its bundle. If a node is lost, Ray moves its bundles to
    other nodes as soon as they have room; until then a rebuild waits.

    Args:
        config: the engine's; `device="auto"` uses GPUs if the cluster has any.
        generation, shard_factory: as `RemoteShardGroup`.
        name: name of the placement group, by which a client can remove it after the Driver's death. With the suffix `-rank-N`
            also the name of the actors.
        cpus_per_rank: Ray CPUs per CPU rank; near 0 in a Ray that only runs engines.
        client: use the bundles of this placement group instead of a new group. It is not removed at the end.
    """

    def __init__(
        self,
        config: EngineConfig,
        generation: int = 0,
        shard_factory: ShardFactory | None = None,
        name: str | None = None,
        cpus_per_rank: float = 1.0,
        client: ClientPlacement | None = None,
    ) -> None:
        config = with_device(config, client)
        super().__init__(config, ray.util.get_node_ip_address(), generation, shard_factory)
        self._name = name or f"engine-{uuid.uuid4().hex[:12]}"
        self._bundle = {"GPU": 1.0} if config.device == "cuda" else {"CPU": cpus_per_rank}
        self._client = client
        self._placement = client.group if client else None
        self._on_one_node = False  # STRICT_PACK: after a node loss Ray moves the group only to a node with room for all of it
        self._bundles = list(range(self.world_size))  # in rank order
        self._actors: dict[int, Any] = {}
        self._names: Counter[int] = Counter()  # number of actors that each rank has had
        self._places: dict[int, Place] = {}
        self._runs: dict[int, ray.ObjectRef] = {}

    def _spawn(self, ranks: list[int], address: tuple[str, int], store_address: tuple[str, int], deadline: float) -> None:
        if self._client is not None and not self._places:
            self._bundles = self._client_bundles(self._client, deadline)
        elif self._placement is None:
            self._bundles = self._place(deadline)
        self._make_actors(ranks, deadline)
        ranks_on = Counter(place.node_id for place in self._places.values())
        for rank in ranks:
            place = self._places[rank]
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
            self._runs[rank] = self._actors[rank].run.remote(arguments)

    # ---- resources

    def _place(self, deadline: float) -> list[int]:
        """Reserve one bundle per rank; return the bundles sorted by node, since Ray does not number them by node.

        Raises:
            ValueError: the cluster has too few resources, or they stay in use.
        """
        (resource, amount), *_ = self._bundle.items()
        nodes = [node["Resources"] for node in live_nodes()]
        fits = [math.floor(node.get(resource, 0.0) / amount + 1e-9) for node in nodes]
        if sum(fits) < self.world_size:
            total = sum(node.get(resource, 0.0) for node in nodes)
            raise ValueError(
                f"{demand(self.config)}, but the Ray cluster has {total:g} on {len(nodes)} node(s); "
                f"lower tensor_parallel_size or add nodes{' (or use device=cpu)' if resource == 'GPU' else ''}"
            )
        self._reserve("STRICT_PACK" if max(fits) >= self.world_size else "PACK")
        self._wait_for(
            lambda: self._placement_state() == "CREATED" or None,
            deadline,
            lambda seconds: (
                f"{demand(self.config)}{' on one node' if self._on_one_node else ''}, "
                f"and none came free within {seconds:.0f} s: the Ray cluster {self._unused()}; "
                "end what uses them (`ray status` shows it) or lower tensor_parallel_size"
            ),
        )
        nodes_of = placement_group_table(self._placement)["bundles_to_node_id"]
        return sorted(range(self.world_size), key=lambda bundle: nodes_of[bundle])

    def _client_bundles(self, client: ClientPlacement, deadline: float) -> list[int]:
        """A bundle of the client's placement group for each rank.

        Raises:
            ValueError: the bundles have too few units, or they stay in use.
        """
        (resource, _), *_ = self._bundle.items()
        remedy = f"add bundles with one {resource} per rank, lower tensor_parallel_size, or make the engine outside the group"
        if sum(map(math.floor, client.total(resource))) < self.world_size:
            raise ValueError(f"{demand(self.config)}, but {client.describe(resource)}; {remedy}")
        return self._wait_for(
            lambda: client.bundles_for(self.world_size, resource),
            deadline,
            lambda seconds: (
                f"{demand(self.config)}, and none came free within {seconds:.0f} s: {client.describe(resource)}; {remedy}"
            ),
        )

    def _wait_for(self, get: Callable[[], T | None], deadline: float, complaint: Callable[[float], str]) -> T:
        """Poll `get` until it is not None; after PLACEMENT_TIMEOUT_S raise ValueError with `complaint(seconds)`."""
        timeout = min(PLACEMENT_TIMEOUT_S, deadline - time.monotonic())
        in_time = time.monotonic() + timeout
        while (found := get()) is None:
            self._raise_if_cancelled()
            if time.monotonic() >= in_time:
                raise ValueError(complaint(timeout))
            time.sleep(POLL_S)
        return found

    def _await_room(self, ranks: list[int], deadline: float) -> None:
        """Wait until every bundle has its resources; those of `ranks` may have moved to other nodes.

        Raises:
            ValueError: there is no room for them before `deadline`.
            ShardFailure: other ranks were lost meanwhile.
        """
        began, logged = time.monotonic(), False
        while (state := self._placement_state()) != "CREATED":
            self._raise_if_cancelled_or_dead()
            if self._on_one_node or state in ("REMOVED", None):
                # its node is lost, and with it every bundle: reserve new ones, without requiring a single node
                others = {rank: "lost the resources it was placed on" for rank in self._places if rank not in ranks}
                if others:
                    raise self._fail(others)
                if self._client is not None:
                    raise ValueError("the placement group in which this engine was made has been removed")
                assert self._placement is not None
                remove(self._placement)
                self._reserve("PACK")
            waited = time.monotonic() - began
            if time.monotonic() >= deadline:
                raise ValueError(
                    f"{demand(self.config)}, and those of a lost node found no room on another within {waited:.0f} s: "
                    f"the Ray cluster {self._unused()}; add a node or lower tensor_parallel_size"
                )
            if waited > PATIENCE_S and not logged:
                logged = True
                logger.warning(
                    "%s, and those of a lost node have no room: the Ray cluster %s; waiting %.0f s more for a node",
                    demand(self.config), self._unused(), deadline - time.monotonic(),
                )  # fmt: skip
            time.sleep(POLL_S)

    def _reserve(self, strategy: str) -> None:
        self._on_one_node = strategy == "STRICT_PACK"
        self._placement = placement_group([self._bundle] * self.world_size, strategy=strategy, name=self._name)

    def _placement_state(self) -> str | None:
        return placement_group_table(self._placement).get("state")

    def _release(self) -> None:
        if self._client is None and self._placement is not None:
            remove(self._placement)
            self._placement = None

    def _unused(self) -> str:
        (resource, _), *_ = self._bundle.items()
        nodes = live_nodes()
        total = sum(node["Resources"].get(resource, 0.0) for node in nodes)
        return f"has {ray.available_resources().get(resource, 0.0):g} of {total:g} unused on {len(nodes)} node(s)"

    # ---- actors

    def _make_actors(self, ranks: list[int], deadline: float) -> None:
        """Make an actor for each of `ranks` in its bundle, and record its place.

        An actor lost with its node is made again: until Ray notices that a node is lost, it keeps placing actors there.
        """
        while missing := [rank for rank in ranks if rank not in self._places]:
            self._await_room(missing, deadline)
            nodes = placement_group_table(self._placement)["bundles_to_node_id"]
            for rank in missing:
                self._actors[rank] = self._make_actor(rank)
            pending = {self._actors[rank].where.remote(): rank for rank in missing}
            while pending:
                self._raise_if_cancelled_or_dead()
                if time.monotonic() >= deadline:
                    given = f"startup_timeout_s={self.config.startup_timeout_s:g}"
                    raise self._fail({rank: f"has no process after {given}" for rank in pending.values()}, hung=True)
                answered, _ = ray.wait(list(pending), timeout=POLL_S)
                for reference in answered:
                    rank = pending.pop(reference)
                    try:
                        self._places[rank] = ray.get(reference)
                    except RayError as error:
                        if nodes[self._bundles[rank]] in {node["NodeID"] for node in live_nodes()}:
                            raise self._fail({rank: f"could not be created: {reason(error)}"}, hung=True) from None
                        logger.warning("rank %d was placed on a lost node; placing it again", rank)

    def _make_actor(self, rank: int) -> Any:
        assert self._placement is not None
        self._names[rank] += 1
        name = f"{self._name}-rank-{rank}"
        if self._names[rank] > 1:  # Ray may not have freed the former actor's name yet
            name += f"-{self._names[rank]}"
        return ShardActor.options(  # type: ignore[attr-defined]
            name=name,
            num_cpus=self._bundle.get("CPU", 0),
            num_gpus=self._bundle.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                self._placement, placement_group_bundle_index=self._bundles[rank]
            ),
        ).remote(name)

    def _raise_if_cancelled_or_dead(self) -> None:
        """Raise if the start was cancelled or another rank has died meanwhile."""
        self._raise_if_cancelled()
        if dead := self._dead_ranks():
            raise self._fail(dead)

    def _dead_ranks(self) -> dict[int, str]:
        if not self._runs:
            return {}
        ranks = {run: rank for rank, run in self._runs.items()}
        ended, _ = ray.wait(list(ranks), num_returns=len(ranks), timeout=0, fetch_local=False)
        return {ranks[run]: end_of(run) for run in ended}

    def _kill(self, ranks: list[int], grace: float) -> None:
        runs = [self._runs[rank] for rank in ranks if rank in self._runs]
        if runs:
            ray.wait(runs, num_returns=len(runs), timeout=grace, fetch_local=False)
        # kill local processes directly: Ray takes 5 s for a stopped (SIGSTOP) process
        here = ray.get_runtime_context().get_node_id()
        pids = [place.pid for rank, place in self._places.items() if rank in ranks and place.node_id == here]
        for pid in filter(is_shard, pids):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        for rank in ranks:
            if rank in self._actors:
                ray.kill(self._actors[rank])
        # Ray counts the actor as dead at once, but frees its bundle only when the process has ended
        deadline = time.monotonic() + DEATH_TIMEOUT_S
        while any(map(is_shard, pids)) and time.monotonic() < deadline:
            time.sleep(0.01)
        if runs:
            ray.wait(runs, num_returns=len(runs), timeout=max(deadline - time.monotonic(), 0.0), fetch_local=False)
        for rank in ranks:
            for known in (self._actors, self._places, self._runs):
                known.pop(rank, None)  # type: ignore[attr-defined]


def with_device(config: EngineConfig, client: ClientPlacement | None = None) -> EngineConfig:
    """Resolve `device="auto"`: GPUs if the client's placement group, or without one the cluster, has any."""
    if config.device != "auto":
        return config
    has_gpu = any(client.total("GPU") if client else (node["Resources"].get("GPU") for node in live_nodes()))
    return dataclasses.replace(config, device="cuda" if has_gpu else "cpu")


def demand(config: EngineConfig) -> str:
    """The resources that an engine needs, for messages."""
    size, resource = config.tensor_parallel_size, "GPU" if config.device == "cuda" else "CPU"
    return f"tensor_parallel_size={size} on device={config.device!r} asks for {size} {resource}s"


def live_nodes() -> list[dict[str, Any]]:
    """Ray's entries of live nodes."""
    return [node for node in ray.nodes() if node["Alive"]]


def is_shard(pid: int) -> bool:
    """Whether the process runs and is a Ray ShardActor: the same pid may be another process, e.g. from another container."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::ShardActor")
    except OSError:
        return False


def end_of(run: ray.ObjectRef) -> str:
    """The reason for the end of a `run` call."""
    try:
        ray.get(run)
    except RayError as error:
        return f"died: {reason(error)}"
    return "ended unexpectedly, without an error"


SHORT_REASONS = {
    "its worker process has died": "its process was killed (possibly by the kernel, out of memory) or crashed",
    "The actor is temporarily unavailable": "its process cannot be reached any more",
}
"""Ray's long messages about lost processes, and short replacements."""


def reason(error: RayError) -> str:
    """A short form of Ray's error: the actor's own exception, or the line with the cause of death."""
    if isinstance(error, RayTaskError):
        return f"{type(error.cause).__name__}: {error.cause}"
    text = str(error)
    if isinstance(error, OutOfMemoryError):
        return f"Ray killed it because its node ran out of memory: {text.partition('Object store memory usage')[0].strip()}"
    for words, short in SHORT_REASONS.items():
        if words in text:
            return short
    # drop the lines with the actor's class, id, pid and the like: the message already names the rank's place
    lines = [line for line in text.splitlines() if not line.startswith("\t") or "node" in line]
    return " ".join(" ".join(lines).removeprefix("The actor died unexpectedly before finishing this task.").split())


def remove(placement: PlacementGroup, timeout: float = 5.0) -> None:
    """Remove a placement group and wait until Ray reports it as removed. It may be gone already."""
    with contextlib.suppress(RayError, ValueError):
        remove_placement_group(placement)
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and placement_group_table(placement).get("state") != "REMOVED":
            time.sleep(0.02)
