"""DriverActor: the Ray actor that hosts the DriverService; RemoteDriver: the client's handle to it."""

from __future__ import annotations

import atexit
import contextlib
import logging
import re
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distributed_sparse.driver.service import DriverService
from distributed_sparse.protocol.client import ModelInfo, NewRequest, RequestUpdate
from distributed_sparse.ranks.base import ShardFailure
from distributed_sparse.ray_backend.exporter import MetricsExporter
from distributed_sparse.ray_backend.group import RayShardGroup, demand, reason, remove, with_device
from distributed_sparse.ray_backend.placement import ClientPlacement
from distributed_sparse.ray_backend.session import RaySession, ensure_ray
from distributed_sparse.utils.process import Origin

if TYPE_CHECKING:
    from distributed_sparse.config import EngineConfig
    from distributed_sparse.ranks.worker import ShardFactory

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
"""Interval of the empty items that an idle output stream yields."""
UNREAD_ITEMS = 4
"""Maximum unread items of a stream. Then the stream pauses, and the service aborts the requests of the silent client."""
START_MARGIN_S = 60.0
"""Time allowed for starting the Driver's own process, on top of `startup_timeout_s`."""
STOP_TIMEOUT_S = 30.0
"""Time for an orderly shutdown before the Driver is killed."""
DRIVER_DEATHS = (RayActorError, OutOfMemoryError, NodeDiedError, ObjectLostError)
"""Errors that Ray raises if the Driver's process, or its node with the stored answers, is lost."""
OWN_RAY_CPUS_PER_RANK = 0.01
"""CPUs per rank in a Ray that this process started: nothing else needs them, and several engines must fit."""


@ray.remote(num_cpus=0, max_restarts=0, max_concurrency=4, concurrency_groups={"outputs": 16})  # type: ignore[call-overload]
class DriverActor:
    """Creates the shards and the service, so that all of them end with this process. Methods delegate to the service."""

    def __init__(
        self,
        config: EngineConfig,
        model_info: ModelInfo,
        tokenizer_json: str | None,
        name: str,
        cpus_per_rank: float,
        client: ClientPlacement | None,
        shard_factory: ShardFactory | None,
    ) -> None:
        self._arguments = (config, model_info, tokenizer_json)
        self._group_options: dict[str, Any] = {
            "name": name,
            "cpus_per_rank": cpus_per_rank,
            "client": client,
            "shard_factory": shard_factory,
        }
        self._started = False

    def start(self) -> dict[str, Any]:
        """Start the engine. Called once, first. Not part of the constructor, where Ray would hide the type of an error."""
        config, model_info, tokenizer_json = self._arguments
        group = RayShardGroup(config, **self._group_options)
        self._service = DriverService(config, model_info, tokenizer_json, group)
        info = self._service.start()
        self._exporter = MetricsExporter(self._service, model_info.name or config.model)
        self._started = True
        return info

    def submit(self, client_id: str, requests: list[NewRequest]) -> None:
        self._service.submit(client_id, requests)

    def abort(self, client_id: str, request_ids: list[str]) -> None:
        self._service.abort(client_id, request_ids)

    @ray.method(concurrency_group="outputs")
    def outputs(self, client_id: str, cursor: int) -> Iterator[tuple[int, list[RequestUpdate]]]:
        """A client's output stream: one item per commit, with the new updates of all its requests and the next cursor."""
        while (item := self._service.next_outputs(client_id, cursor, HEARTBEAT_S)) is not None:
            cursor = item[0]
            yield item

    def stats(self) -> dict[str, Any]:
        return self._service.stats()

    def health(self) -> bool:
        return self._service.health()

    def shutdown(self) -> None:
        """Shut down in order. While the engine is still starting this does nothing, and the caller kills the actor."""
        if self._started:
            self._service.shutdown()
            self._exporter.close()


class RemoteDriver:
    """A handle with the methods of DriverService, which runs in an actor. Thread-safe. Made by `connect_driver`."""

    def __init__(self, session: RaySession, actor: Any, name: str) -> None:
        self._origin = Origin()
        self._session = session
        self._actor = actor
        self._name = name
        self._streams: dict[str, ray.ObjectRefGenerator] = {}
        self._idle = threading.Condition()
        self._calls = 0
        self._closed = False
        self._clearing = threading.Lock()
        self._cleared = False
        # registered after Ray's own exit handler, so it runs before it: a later call, from a thread that still waits for
        # outputs, would start a new Ray
        atexit.register(self.shutdown)

    def start(self, timeout: float) -> dict[str, Any]:
        """Start the shards.

        Raises:
            ValueError: a setting, the checkpoint or the cluster is invalid.
            ShardFailure: a shard, or the Driver, did not start.
        """
        return self._ask("start", timeout=timeout)

    def submit(self, client_id: str, requests: list[NewRequest]) -> None:
        self._ask("submit", client_id, requests)

    def abort(self, client_id: str, request_ids: list[str]) -> None:
        self._ask("abort", client_id, request_ids)

    def next_outputs(self, client_id: str, cursor: int, timeout: float) -> tuple[int, list[RequestUpdate]] | None:
        """As `DriverService.next_outputs`, over the client's stream. `cursor` only matters when the stream is opened."""
        with self._counted() as allowed:
            if not allowed:
                return None
            stream = self._streams.get(client_id)
            if stream is None:
                method = self._actor.outputs.options(num_returns="streaming", _generator_backpressure_num_objects=UNREAD_ITEMS)
                stream = self._streams[client_id] = method.remote(client_id, cursor)
            ready, _ = ray.wait([stream], timeout=timeout)
            if not ready:
                return cursor, []
            try:
                return ray.get(next(stream))
            except StopIteration:
                return None
            except RayError as error:
                if self._closed:
                    return None
                raise self._translated(error) from None

    def stats(self) -> dict[str, Any]:
        return self._ask("stats")

    def health(self) -> bool:
        try:
            return self._ask("health", timeout=HEARTBEAT_S * 10)
        except (ShardFailure, RuntimeError):
            return False

    def shutdown(self) -> None:
        """End the service, its actors and its placement group, killing them if necessary.

        May be called again; does nothing in a forked child.
        """
        if not self._origin.is_here:
            return
        with self._idle:
            if self._closed:
                return
            self._closed = True
        atexit.unregister(self.shutdown)
        # if the process has closed its Ray connection, everything has ended, and a call would start a new Ray
        if ray.is_initialized():
            with contextlib.suppress(RayError):
                ray.get(self._actor.shutdown.remote(), timeout=STOP_TIMEOUT_S)
            self._clean_up()
            with self._idle:
                self._idle.wait_for(lambda: self._calls == 0, timeout=STOP_TIMEOUT_S)
        self._session.release()

    def _ask(self, method: str, *arguments: Any, timeout: float | None = None) -> Any:
        with self._counted() as allowed:
            if not allowed:
                raise RuntimeError("the engine has been shut down")
            try:
                return ray.get(getattr(self._actor, method).remote(*arguments), timeout=timeout)
            except RayError as error:
                raise self._translated(error) from None

    def _translated(self, error: RayError) -> Exception:
        """Convert Ray's error to the engine's own (see `translated`). If the Driver has died, clean up after it."""
        if isinstance(error, DRIVER_DEATHS):
            self._clean_up()
        return translated(error)

    def _clean_up(self) -> None:
        """Kill the Driver's process, if it still runs, and remove its placement group, which Ray would keep.

        The shards end through Ray and through their closed sockets. May be called again, also from two threads.
        """
        with self._clearing:
            if not self._cleared:
                ray.kill(self._actor)
                with contextlib.suppress(ValueError):  # the Driver has removed it already, or not made it yet
                    remove(ray.util.get_placement_group(self._name))
                self._cleared = True

    @contextlib.contextmanager
    def _counted(self) -> Iterator[bool]:
        """Count a call in flight, so that Ray is not closed under it; yields whether calls are allowed.

        They are not after `shutdown`, nor after the process has closed its Ray connection: a call would start a new Ray.
        """
        with self._idle:
            allowed = not self._closed and ray.is_initialized()
            self._calls += allowed
        try:
            yield allowed
        finally:
            with self._idle:
                self._calls -= allowed
                self._idle.notify_all()


def connect_driver(
    config: EngineConfig,
    model_info: ModelInfo,
    tokenizer_json: str | None,
    shard_factory: ShardFactory | None = None,
) -> RemoteDriver:
    """Start a Driver and its shards on the Ray that `ensure_ray` finds or starts.

    Both end with this process, since no actor is detached.

    Raises:
        ValueError: a setting, the checkpoint or the cluster is invalid.
        ShardFailure: a shard, or the Driver, did not start.
    """
    session = ensure_ray(config.tensor_parallel_size)
    client = ClientPlacement.of_this_process()
    where = "the placement group in which it is made" if client else "the Ray cluster"
    logger.info("%s of %s", demand(with_device(config, client)), where)
    name = f"{re.sub(r'[^A-Za-z0-9._-]', '-', Path(config.model).name)}-{uuid.uuid4().hex[:12]}"
    driver: RemoteDriver | None = None
    try:
        # on the client's node; without a hard affinity Ray may put an actor with num_cpus=0 on any node
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = DriverActor.options(name=f"{name}-driver", scheduling_strategy=here).remote(  # type: ignore[attr-defined]
            config,
            model_info,
            tokenizer_json,
            name,
            OWN_RAY_CPUS_PER_RANK if session.own else 1.0,
            client,
            shard_factory,
        )
        driver = RemoteDriver(session, actor, name)
        driver.start(config.startup_timeout_s + START_MARGIN_S)
        return driver
    except BaseException:
        if driver is not None:
            driver.shutdown()
        session.release()
        raise


def translated(error: RayError) -> Exception:
    """Convert Ray's error to the engine's own, if there is one for it."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, ValueError | ShardFailure):
        return error.cause
    if isinstance(error, DRIVER_DEATHS):
        return ShardFailure((), f"the Driver has died: {reason(error)}")
    if isinstance(error, GetTimeoutError):
        return ShardFailure((), f"the Driver did not answer: {error}")
    return error
