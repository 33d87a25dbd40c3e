"""Client: one LLM's connection to its Driver. Sends requests, and brings every update to the call that waits for it."""

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
    """The engine has stopped, or was shut down, and with it every request."""


class Updates:
    """What one call waits for: the updates of its requests, put in by the receiver's thread.

    Attributes:
        on_put: called after each `put`, on that thread; how a coroutine is woken.
    """

    def __init__(self) -> None:
        self.on_put: Callable[[], object] | None = None
        self._origin = Origin()
        self._queue: queue.SimpleQueue[RequestUpdate] = queue.SimpleQueue()

    def put(self, update: RequestUpdate) -> None:
        """Add an update."""
        self._queue.put(update)
        if self.on_put is not None:
            with contextlib.suppress(RuntimeError):  # the event loop has been closed: nobody reads this any more
                self.on_put()

    def get(self, block: bool = True, timeout: float | None = None) -> RequestUpdate:
        """The next one.

        Raises:
            queue.Empty: there is none and `block` is False, or none within `timeout` seconds.
            RuntimeError: this is a forked child, in which nobody puts any.
        """
        self._origin.check()
        return self._queue.get(block, timeout)


class Service(Protocol):
    """A Driver, in this process (`DriverService`) or behind a Ray actor."""

    def submit(self, client_id: str, requests: list[NewRequest]) -> None: ...
    def abort(self, client_id: str, request_ids: list[str]) -> None: ...
    def next_outputs(self, client_id: str, cursor: int, timeout: float) -> tuple[int, list[RequestUpdate]] | None: ...
    def stats(self) -> dict[str, Any]: ...
    def health(self) -> bool: ...
    def shutdown(self) -> None: ...


class Client:
    """Owns the thread that receives updates. Calls from several threads at once are fine.

    In a forked child every call raises RuntimeError, but for `close`, which does nothing.

    Attributes:
        origin: the process that made it.
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
        """Send requests; all their updates arrive in the queue, each request's in order, its last one `finished`.

        Args:
            updates: the queue, where the caller has one already; None: a new one.

        Raises:
            ValueError: a request_id that is no text, occurs twice, or is running already; nothing is sent.
            EngineError: the engine has gone.
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
                    self._waiting.pop(request.request_id, None)  # the receiver may have ended it already
            raise
        return updates

    def abort(self, request_ids: list[str]) -> None:
        """End requests; each still gets its last update. Unknown ids are ignored, and so is everything after `close`."""
        self.origin.check()
        if not self._closed.is_set():
            with _as_engine_error():
                self.service.abort(self._client_id, request_ids)

    def stats(self) -> dict[str, Any]:
        """The engine's counters."""
        self.origin.check()
        with _as_engine_error():
            return self.service.stats()

    def health(self) -> bool:
        """See `DriverService.health`."""
        self.origin.check()
        return self.service.health()

    def close(self) -> None:
        """Shut the service down and end what still waits. Idempotent; in a forked child it does nothing."""
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
        except Exception as error:  # the Driver is gone
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
    """What a service raises when it has gone (`ShardFailure`, or a RuntimeError after its end), as the public error."""
    try:
        yield
    except RuntimeError as error:
        raise EngineError(str(error)) from error
