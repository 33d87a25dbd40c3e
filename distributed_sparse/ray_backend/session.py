"""RaySession: this process's connection to Ray, shared by its engines: joined or started, counted, and closed once."""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import signal
import threading
from urllib.parse import urlsplit

import grpc
import ray
from ray._private import services, state, worker

from distributed_sparse.utils.process import Origin, check_ray_is_own

logger = logging.getLogger(__name__)

REACH_TIMEOUT_S = 10.0
"""How long a cluster's head has to answer."""


class RaySession:
    """One engine's hold on this process's connection to Ray, of which there is one: the last to let go closes it.

    A connection that the process had made before is only used. The class itself keeps who has begun it and how many hold
    it, since Ray keeps its connection per process, too.

    Attributes:
        own: this process has started that Ray, for engines alone.
    """

    used = False
    """Whether an engine of this process has used its connection to Ray."""
    _lock = threading.Lock()
    _begun: str | None = None
    """Job of the connection that was begun here."""
    _own = False
    _holders = 0

    def __init__(self, num_ranks: int) -> None:
        cls = type(self)
        self._origin = Origin()
        check_ray_is_own()
        with cls._lock:
            if ray.util.client.ray.is_connected():
                raise ValueError(f"this process is connected to Ray by ray://, as Ray Client; {NO_RAY_CLIENT}")
            if not ray.is_initialized():
                cls._own = begin_ray(num_ranks)
                cls._begun, cls._holders = current_job(), 0
            cls.used = True
            self._held = current_job() == cls._begun
            self.own = self._held and cls._own
            cls._holders += self._held

    def release(self) -> None:
        """Let go. Harmless when called again, in a forked child, or when the process has closed the connection itself."""
        if not self._origin.is_here:
            return
        cls = type(self)
        with cls._lock:
            if not self._held:
                return
            self._held = False
            if ray.is_initialized() and current_job() == cls._begun:
                cls._holders -= 1
                if cls._holders == 0:
                    ray.shutdown()
                    cls._begun = None


def ensure_ray(num_ranks: int) -> RaySession:
    """Use the Ray that this process is connected to, or that RAY_ADDRESS or `ray start` names; else start a local one.

    A local one has a logical CPU for each of `num_ranks` even where the machine has fewer cores.

    Raises:
        ValueError: RAY_ADDRESS is malformed, or no cluster answers there.
        RuntimeError: this process is a forked child of one that was connected to Ray.
    """
    return RaySession(num_ranks)


def begin_ray(num_ranks: int) -> bool:
    """Connect; whether a Ray was started for it.

    Without RAY_ADDRESS, no `address="auto"`: it would also join the private Ray of any other process on this machine.
    """
    # Ray's workers are nice by 15 unless told: any other process takes their cores, and all ranks wait for the slowest.
    os.environ.setdefault("RAY_worker_niceness", "0")
    address = find_cluster()
    if address is not None:
        try:
            ray.init(address, include_dashboard=False, logging_level=logging.WARNING)
            return False
        except ConnectionError as error:
            raise unreachable(error) from None
    num_cpus = max(len(os.sched_getaffinity(0)), num_ranks)
    ray.init("local", num_cpus=num_cpus, include_dashboard=False, logging_level=logging.WARNING)
    return True


NO_RAY_CLIENT = "the engine needs a process on a node of the cluster: run it there, or use `ray job submit`"


def find_cluster() -> str | None:
    """host:port of the cluster that RAY_ADDRESS or `ray start` names and that answers; None: start a local Ray.

    Ray itself reads RAY_ADDRESS as it is, and tries for minutes where nobody answers.

    Raises:
        ValueError: RAY_ADDRESS is malformed, or no cluster answers there.
    """
    given = os.environ.get("RAY_ADDRESS", "")
    if given != given.strip():
        given = os.environ["RAY_ADDRESS"] = given.strip()  # Ray reads it, too, here and in its processes
    if given not in ("", "auto", "local"):
        check_address(given)
    try:
        address = services.canonicalize_bootstrap_address(None)  # type: ignore[arg-type]
        if address is not None:
            check_answers(address)
        return address
    except ConnectionError as error:
        if given:
            raise unreachable(error) from None
        logger.warning("the Ray that `ray start` left behind does not answer; starting another")
        return None


def check_address(address: str) -> None:
    """Raises ValueError unless a RAY_ADDRESS is `host:port`, the host a name or an address, IPv6 in brackets."""
    remedy = "give host:port of the cluster's head (`ray start --head` prints it), auto, or local"
    if address.startswith("ray://"):
        raise ValueError(f"RAY_ADDRESS={address!r} is an address for Ray Client; {NO_RAY_CLIENT}, or {remedy}")
    try:
        parts = urlsplit(f"//{address}")
        well_formed = bool(parts.hostname and parts.port) and parts.netloc == address and "@" not in address
    except ValueError as error:  # the port is no number, or out of range
        raise ValueError(f"RAY_ADDRESS={address!r} is not host:port ({error}); {remedy}") from None
    if not well_formed or any(map(str.isspace, address)):
        raise ValueError(f"RAY_ADDRESS={address!r} is not host:port; {remedy}")


def check_answers(address: str) -> None:
    """Raises ConnectionError unless a Ray head (its GCS) answers at host:port within REACH_TIMEOUT_S."""
    try:
        with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=REACH_TIMEOUT_S)
    except grpc.RpcError as error:
        # any other error, of a missing token for instance, is Ray's own: `ray.init` says what it means
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise ConnectionError(error.details()) from None
        if error.code() == grpc.StatusCode.UNIMPLEMENTED:
            raise ConnectionError("what answers there is no head of a Ray cluster") from None


def unreachable(error: Exception) -> ValueError:
    return ValueError(
        f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS', '')!r} cannot be reached ({error}); "
        "start that cluster, or unset RAY_ADDRESS for a local one"
    )


def current_job() -> str:
    """A name for this process's connection to Ray."""
    context = ray.get_runtime_context()
    return f"{context.gcs_address} {context.get_job_id()}"


def _abandon_in_child() -> None:
    """In a forked child: make Ray's objects forget the connection, which is the parent's.

    Else the child's copies of actor handles and object references would, when they are collected, tell the cluster over the
    parent's sockets that nobody needs those actors; `ray.shutdown`, which Ray calls at exit, would end a Ray that the parent
    has started; and the destructors of Ray's C++ objects would wait for threads that the child does not have.
    """
    if not RaySession.used or not ray.is_initialized():
        return
    atexit.unregister(ray.shutdown)
    for owner in filter(None, (worker.global_worker, worker._global_node, state.state)):
        for value in vars(owner).values():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))  # its destructor never runs
    worker.global_worker.set_is_connected(False)
    worker.global_worker.set_mode(None)  # type: ignore[arg-type]
    del worker.global_worker.core_worker  # type: ignore[attr-defined]
    worker._global_node = None
    handler = signal.getsignal(signal.SIGTERM)
    if getattr(handler, "__module__", "").startswith("ray."):  # it ends the processes of the parent's Ray
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "on_exit"):  # glibc: the exit of a child of multiprocessing, without C++'s destructors of globals
        libc.on_exit(libc._exit, None)


os.register_at_fork(after_in_child=_abandon_in_child)
