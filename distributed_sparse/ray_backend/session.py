"""RaySession: this process's connection to Ray, joined or started, shared by its engines with a reference count."""

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
"""Time for a cluster's head to answer."""


class RaySession:
    """One engine's reference to this process's connection to Ray. The last `release` closes the connection.

    A connection that the process had before the first engine is used but never closed. The reference count is kept on the
    class, since Ray's connection is per process, too.

    Attributes:
        own: whether this process started that Ray, for its engines only.
    """

    used = False
    """Whether an engine of this process has used its connection to Ray."""
    _lock = threading.Lock()
    _begun: str | None = None
    """Job of the connection that an engine opened."""
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
        """Drop the reference. May be called again, in a forked child, or after the process has closed the connection itself."""
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
    """Use this process's Ray connection, or the Ray that RAY_ADDRESS or `ray start` names; else start a local one.

    A local Ray has at least `num_ranks` logical CPUs, even if the machine has fewer cores.

    Raises:
        ValueError: RAY_ADDRESS is malformed, or no cluster answers there.
        RuntimeError: this process is a forked child of one that was connected to Ray.
    """
    return RaySession(num_ranks)


def begin_ray(num_ranks: int) -> bool:
    """Connect to Ray; return whether a local Ray was started.

    Does not use `address="auto"` without RAY_ADDRESS: it would also join the private Ray of another process on this machine.
    """
    # Ray's workers run at niceness 15 by default: other processes would take their cores, and all ranks wait for the slowest
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
    """host:port of the answering cluster that RAY_ADDRESS or `ray start` names; None: start a local Ray.

    Checked here because Ray uses RAY_ADDRESS unchecked and retries for minutes if nothing answers.

    Raises:
        ValueError: RAY_ADDRESS is malformed, or no cluster answers there.
    """
    given = os.environ.get("RAY_ADDRESS", "")
    if given != given.strip():
        given = os.environ["RAY_ADDRESS"] = given.strip()  # Ray reads the variable, too, here and in its workers
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
        logger.warning("the Ray cluster of a former `ray start` does not answer; starting a local one")
        return None


def check_address(address: str) -> None:
    """Raise ValueError unless RAY_ADDRESS is `host:port`, with a host name or an address (IPv6 in brackets)."""
    remedy = "give host:port of the cluster's head (`ray start --head` prints it), auto, or local"
    if address.startswith("ray://"):
        raise ValueError(f"RAY_ADDRESS={address!r} is an address for Ray Client; {NO_RAY_CLIENT}, or {remedy}")
    try:
        parts = urlsplit(f"//{address}")
        well_formed = bool(parts.hostname and parts.port) and parts.netloc == address and "@" not in address
    except ValueError as error:  # the port is not a number, or out of range
        raise ValueError(f"RAY_ADDRESS={address!r} is not host:port ({error}); {remedy}") from None
    if not well_formed or any(map(str.isspace, address)):
        raise ValueError(f"RAY_ADDRESS={address!r} is not host:port; {remedy}")


def check_answers(address: str) -> None:
    """Raise ConnectionError unless a Ray head (its GCS) answers at host:port within REACH_TIMEOUT_S."""
    try:
        with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=REACH_TIMEOUT_S)
    except grpc.RpcError as error:
        # `ray.init` explains any other error, such as a missing token
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise ConnectionError(error.details()) from None
        if error.code() == grpc.StatusCode.UNIMPLEMENTED:
            raise ConnectionError("the server there is not the head of a Ray cluster") from None


def unreachable(error: Exception) -> ValueError:
    return ValueError(
        f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS', '')!r} cannot be reached ({error}); "
        "start that cluster, or unset RAY_ADDRESS for a local one"
    )


def current_job() -> str:
    """Identify this process's current connection to Ray."""
    context = ray.get_runtime_context()
    return f"{context.gcs_address} {context.get_job_id()}"


def _abandon_in_child() -> None:
    """Run in a forked child: detach Ray's objects from the connection, which is the parent's.

    Otherwise three things would go wrong. When the child's copies of actor handles and object references are collected, they
    would tell the cluster over the parent's sockets that those actors are unused. `ray.shutdown`, which Ray registers at exit,
    would end a Ray that the parent started. The destructors of Ray's C++ objects would wait for threads that the child does
    not have.
    """
    if not RaySession.used or not ray.is_initialized():
        return
    atexit.unregister(ray.shutdown)
    for owner in filter(None, (worker.global_worker, worker._global_node, state.state)):
        for value in vars(owner).values():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))  # so its destructor never runs
    worker.global_worker.set_is_connected(False)
    worker.global_worker.set_mode(None)  # type: ignore[arg-type]
    del worker.global_worker.core_worker  # type: ignore[attr-defined]
    worker._global_node = None
    handler = signal.getsignal(signal.SIGTERM)
    if getattr(handler, "__module__", "").startswith("ray."):  # it would end the processes of the parent's Ray
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "on_exit"):  # glibc: leave a multiprocessing child without running the destructors of C++ globals
        libc.on_exit(libc._exit, None)


os.register_at_fork(after_in_child=_abandon_in_child)
