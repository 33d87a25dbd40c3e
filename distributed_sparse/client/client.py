"""client: one LLM's connection to its Driver. Sends requests and routes each update to the call that submitted its request."""

from __future__ import annotations

import contextlib
import queue
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from distributed_sparse.protocol.client import NewRequest, RequestUpdate
from distributed_sparse.utils.process import Origin
from distributed_sparse.utils.validation import check_text

POLL_S = 1.0


class EngineError(RuntimeError):
    """The engine stopped or was shut down; all of its requests have ended."""


class Updates:
    """The queue of updates for one call's requests, filled by the receiver thread.

    Attributes:
        on_put: called on the receiver thread after each `put`; wakes a waiting coroutine.
    """

    def __init__(self) -> None:
        self.on_put: Callable[[], object] | None = None
        self._origin = Origin()
        self._queue: queue.SimpleQueue[RequestUpdate] = queue.SimpleQueue()

    def put(self, update: RequestUpdate) -> None:
        """Add an update."""
        self._queue.put(update)
        if self.on_put is not None:
            with contextlib.suppress(RuntimeError):  # the reader's event loop is closed
                self.on_put()

    def get(self, block: bool = True, timeout: float | None = None) -> RequestUpdate:
        """Return the next update.

        Raises:
            queue.Empty: no update is queued and `block` is False, or none arrives within `timeout` seconds.
            RuntimeError: called in a forked child, which has no receiver thread.
        """
        self._origin.check()
        return self._queue.get(block, timeout)


class Service(Protocol):
    """Interface of a Driver in this process (`DriverService`) or behind a Ray actor."""

    def submit(self, client_id: str, requests: list[NewRequest]) -> None: ...
    def abort(self, client_id: str, request_ids: list[str]) -> None: ...
    def next_outputs(self, client_id: str, cursor: int, timeout: float) -> tuple[int, list[RequestUpdate]] | None: ...
    def stats(self) -> dict[str, Any]: ...
    def health(self) -> bool: ...
    def shutdown(self) -> None: ...


class Client:
    """Connection to a Driver; owns the thread that receives updates. Thread-safe.

    In a forked child every method raises RuntimeError, except `close`, which does nothing.

    Attributes:
        origin: the process that created the client.
    """

    def __init__(self, service: Service) -> None:
        self.origin = Origin()
        self.service = service
        self._client_id = uuid.uuid4().hex
        self._waiting: dict[str, Updates] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._receiver = threading.Thread(target=self._receive, name="outputs", daemon=True)
        self._receiver.start()

    def submit(self, requests: list[NewRequest], updates: Updates | None = None) -> Updates:
        """Send requests and return the queue of their updates.

        The updates of one request arrive in order; the last one has `finished` set.

        Args:
            updates: an existing queue to use; None creates one.

        Raises:
            ValueError: a request_id is not valid text, is duplicated, or is already running; nothing is sent.
            EngineError: the engine has stopped.
        """
        self.origin.check()
        updates = Updates() if updates is None else updates
        ids = [check_text("request_id", request.request_id, "give a string of valid Unicode") for request in requests]
        if len(set(ids)) < len(ids):
            twice = next(request_id for place, request_id in enumerate(ids) if request_id in ids[:place])
            raise ValueError(f"request_id={twice!r} occurs twice in one call; give each request its own")
        with self._lock:
            for request in requests:
                if request.request_id in self._waiting:
                    raise ValueError(f"request_id={request.request_id!r} is running already; choose another")
            self._waiting.update((request.request_id, updates) for request in requests)
        try:
            with _as_engine_error():
                self.service.submit(self._client_id, requests)
        except BaseException:
            with self._lock:
                for request in requests:
                    self._waiting.pop(request.request_id, None)  # the receiver may have removed it already
            raise
        return updates

    def abort(self, request_ids: list[str]) -> None:
        """Abort requests; each still gets a final update. Ignores unknown ids, and does nothing after `close`."""
        self.origin.check()
        if not self._closed.is_set():
            with _as_engine_error():
                self.service.abort(self._client_id, request_ids)

    def stats(self) -> dict[str, Any]:
        """Return the engine's counters."""
        self.origin.check()
        with _as_engine_error():
            return self.service.stats()

    def health(self) -> bool:
        """See `DriverService.health`."""
        self.origin.check()
        return self.service.health()

    def close(self) -> None:
        """Shut the service down and end all running requests. Idempotent; does nothing in a forked child."""
        if not self.origin.is_here:
            return
        if not self._closed.is_set():
            self._closed.set()
            self.service.shutdown()
        if threading.current_thread() is not self._receiver:
            self._receiver.join()

    def _receive(self) -> None:
        cursor, reason = 0, "the engine has been shut down"
        try:
            while (received := self.service.next_outputs(self._client_id, cursor, POLL_S)) is not None:
                cursor, updates = received
                for update in updates:
                    self._deliver(update)
        except Exception as error:  # the Driver died
            reason = f"the engine has stopped: {error}"
        with self._lock:
            left = list(self._waiting)
        for request_id in left:
            self._deliver(RequestUpdate(request_id, finished=True, error=reason, error_kind="engine"))

    def _deliver(self, update: RequestUpdate) -> None:
        with self._lock:
            waiting = self._waiting.pop(update.request_id, None) if update.finished else self._waiting.get(update.request_id)
        if waiting is not None:
            waiting.put(update)


@contextlib.contextmanager
def _as_engine_error() -> Iterator[None]:
    """Convert the RuntimeErrors of a stopped service (`ShardFailure` included) to EngineError."""
    try:
        yield
    except RuntimeError as error:
        raise EngineError(str(error)) from error
