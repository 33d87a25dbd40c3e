"""DriverService: runs the Driver in a thread, with an inbox for calls and an outbox per client."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from distributed_sparse.config import EngineConfig
from distributed_sparse.driver.driver import Driver, Updates
from distributed_sparse.driver.engine_metrics import Readings
from distributed_sparse.driver.recovery import Recovery
from distributed_sparse.protocol.client import ModelInfo, NewRequest, RequestUpdate
from distributed_sparse.ranks.base import ShardFailure, ShardGroup

logger = logging.getLogger(__name__)

CLIENT_SILENCE_S = 30.0
"""The requests of a client that has not called `next_outputs` for so long are aborted."""
HEALTH_INTERVAL_S = 20.0
"""`health` is true if a step has completed within this time."""
IDLE_STEP_S = 5.0
"""Interval of the empty steps that an idle engine runs through every rank."""
IDLE_POLL_S = 0.25
"""Interval of an idle engine's checks that its ranks are alive."""
STOP_GRACE_S = 5.0
"""Time that a shutdown gives the current step before cancelling it."""

T = TypeVar("T")


class Outbox:
    """Numbered updates of one client, kept until the client acknowledges them with its cursor."""

    def __init__(self) -> None:
        self.updates: deque[RequestUpdate] = deque()
        self.first = 0
        self.last_seen = time.monotonic()

    def after(self, cursor: int) -> list[RequestUpdate]:
        """Drop the updates before the cursor and return the rest."""
        while self.first < cursor and self.updates:
            self.updates.popleft()
            self.first += 1
        return list(self.updates)


class DriverService:
    """Owns a Driver and its thread. Every public method may be called from any thread."""

    def __init__(self, config: EngineConfig, model_info: ModelInfo, tokenizer_json: str | None, group: ShardGroup) -> None:
        self._driver = Driver(config, model_info, tokenizer_json, group)
        self._group = group
        self._wake = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._outboxes: dict[str, Outbox] = {}
        self._closed = False
        self._failure: ShardFailure | None = None
        self._last_step = time.monotonic()
        self._recovery = Recovery(self._driver, self._publish, self._notify)
        self._thread = threading.Thread(target=self._run, name="driver", daemon=True)

    def start(self) -> dict[str, Any]:
        """Start the shards and the loop; return the ranks and the number of pages. Raises as `Recovery.start`."""
        try:
            self._recovery.start()
        except BaseException:
            self._recovery.close()
            self._group.stop()
            raise
        self._last_step = time.monotonic()
        self._thread.start()
        return {"ranks": [rank.as_dict() for rank in self._group.ranks], "num_pages": self._group.num_pages}

    # ---- calls from clients

    def submit(self, client_id: str, requests: list[NewRequest]) -> None:
        """Queue requests. Results and refusals come through `next_outputs`."""

        arrived = time.monotonic()

        def add() -> None:
            refused = [self._driver.add_request(client_id, request, arrived) for request in requests]
            self._publish({client_id: [update for update in refused if update is not None]})

        with self._wake:
            self._outboxes.setdefault(client_id, Outbox()).last_seen = time.monotonic()
        self._call(add)

    def abort(self, client_id: str, request_ids: list[str]) -> None:
        """Abort a client's requests. Unknown ids and other clients' ids are ignored."""

        def end() -> None:
            own = set(self._driver.owned_by(client_id))
            self._publish({client_id: self._driver.abort([request_id for request_id in request_ids if request_id in own])})

        self._call(end)

    def next_outputs(self, client_id: str, cursor: int, timeout: float) -> tuple[int, list[RequestUpdate]] | None:
        """Wait up to `timeout` seconds for updates after the cursor; return the new cursor and the updates.

        Returns None once the service is closed and all updates have been returned.
        """
        deadline = time.monotonic() + timeout
        with self._wake:
            outbox = self._outboxes.setdefault(client_id, Outbox())
            while True:
                outbox.last_seen = time.monotonic()
                updates = outbox.after(cursor)
                if updates:
                    return outbox.first + len(updates), updates
                if self._closed:
                    return None
                left = deadline - time.monotonic()
                if left <= 0:
                    return cursor, []
                self._wake.wait(left)

    def stats(self) -> dict[str, Any]:
        """The engine's counters, taken between two steps. During a rebuild the ranks' counters are those of the last report."""

        def ask() -> dict[str, Any]:
            if self._failure is None:
                self._recovery.run(self._report)
            return self._driver.stats() | self._recovery.stats()

        return self._ask(ask)

    def metrics(self) -> tuple[dict[str, float], Readings]:
        """Current gauges, and the values recorded since the last call. The first call starts the recording. Does not wait."""
        return self._driver.gauges(), self._driver.metrics.take()

    def health(self) -> bool:
        """Whether a step (an empty one on an idle engine) went through every rank within the last HEALTH_INTERVAL_S."""
        if self._failure is not None or self._closed or not self._recovery.up:
            return False
        return time.monotonic() - self._last_step < HEALTH_INTERVAL_S

    def shutdown(self) -> None:
        """End every request, the loop and the shards. Idempotent."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            if self._recovery.up:
                self._thread.join(STOP_GRACE_S)
            self._recovery.cancel()  # a long step, or one that a hung rank never completes
            self._thread.join()
        self._recovery.close()
        self._group.stop()

    # ---- the loop

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._answer_calls()
                self._abort_silent_clients()
                self._publish(self._driver.expire())
                self._recovery.run(self._advance)
        except ShardFailure as failure:
            self._fail(failure)
        except Exception as error:
            logger.exception("the driver's loop has ended")
            self._fail(ShardFailure((), f"internal error of the driver: {error!r}"))

    def _wait_for_work(self) -> bool:
        with self._wake:
            idle = self._recovery.busy or not self._driver.has_work
            if idle and not self._inbox and not self._closed:
                self._wake.wait(IDLE_POLL_S)
            return not self._closed

    def _advance(self) -> None:
        """Run one step. An idle engine checks its ranks instead, and runs an empty step every IDLE_STEP_S."""
        if not self._driver.has_work and time.monotonic() - self._last_step < IDLE_STEP_S:
            self._group.check()
            return
        if self._driver.has_work:
            self._publish(self._driver.step())
        else:
            self._driver.check()
        self._last_step = time.monotonic()

    def _report(self) -> None:
        while self._driver.in_flight:
            self._publish(self._driver.settle())
        self._driver.check(report=True)

    def _answer_calls(self) -> None:
        """Run the queued calls. If one raises, those behind it stay in the inbox."""
        for _ in range(len(self._inbox)):
            with self._wake:
                call = self._inbox.popleft()
            call()

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify_all()

    def _publish(self, updates: Updates) -> None:
        if not updates:
            return
        with self._wake:
            for client_id, of_client in updates.items():
                self._outboxes.setdefault(client_id, Outbox()).updates.extend(of_client)
            self._wake.notify_all()

    def _abort_silent_clients(self) -> None:
        """Abort requests of clients that fetch no updates. Outboxes stay, numbering included: a slow client still gets them."""
        now = time.monotonic()
        with self._wake:
            silent = [client for client, outbox in self._outboxes.items() if now - outbox.last_seen > CLIENT_SILENCE_S]
        for client_id in silent:
            requests = self._driver.owned_by(client_id)
            if requests:
                logger.warning(
                    "a client has not fetched its outputs for %g s; aborting its %d requests", CLIENT_SILENCE_S, len(requests)
                )
                reason = f"the client has not fetched its outputs for {CLIENT_SILENCE_S:g} s; its requests were aborted"
                self._publish({client_id: self._driver.abort(requests, reason)})

    def _fail(self, failure: ShardFailure) -> None:
        """Stop for good: end every request with the failure, and refuse later ones with it."""
        self._failure = failure
        logger.error("the engine has stopped: %s", failure)  # with the shard's traceback
        self._publish(self._driver.fail_all(failure))
        self._recovery.cancel()  # a rebuild may be running if the error is the Driver's own
        self._recovery.close()
        try:
            self._group.stop()
        except Exception:
            logger.exception("the shards could not be stopped")
        while True:  # answer further calls until shutdown
            with self._wake:
                while not self._inbox and not self._closed:
                    self._wake.wait()
                if self._closed:
                    return
            self._answer_calls()

    # ---- calls that run in the loop's thread

    def _call(self, function: Callable[[], None]) -> None:
        with self._wake:
            if self._closed:
                raise RuntimeError("the engine has been shut down")
            self._inbox.append(function)
            self._wake.notify_all()

    def _ask(self, function: Callable[[], T]) -> T:
        answer: Future[T] = Future()

        def run() -> None:
            try:
                answer.set_result(function())
            except ShardFailure as failure:
                answer.set_exception(failure)
                raise
            except Exception as error:
                answer.set_exception(error)

        self._call(run)
        while not self._closed:
            try:
                return answer.result(timeout=1.0)
            except TimeoutError:
                continue
        raise RuntimeError("the engine has been shut down")
