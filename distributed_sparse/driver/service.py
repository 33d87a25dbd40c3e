"""DriverService: the thread that runs the Driver's steps, with an inbox for requests and an outbox per client."""

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
"""A client that has not asked for its updates for so long has its requests aborted."""
HEALTH_INTERVAL_S = 20.0
"""An engine is healthy if a step went through every rank within this time."""
IDLE_STEP_S = 5.0
"""An idle engine sends an empty step through every rank this often."""
IDLE_POLL_S = 0.25
"""How often an idle engine looks whether its ranks are still there."""
STOP_GRACE_S = 5.0
"""How long a shutdown waits for the step that runs before it cancels it."""

T = TypeVar("T")


class Outbox:
    """Updates for one client, numbered, kept until the client's cursor has passed them."""

    def __init__(self) -> None:
        self.updates: deque[RequestUpdate] = deque()
        self.first = 0
        self.last_seen = time.monotonic()

    def after(self, cursor: int) -> list[RequestUpdate]:
        """Drop what lies before the cursor, return what lies behind it."""
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
        """Bring the shards up and start the loop; the ranks and the cache's size. Raises as `Recovery.start`."""
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
        """Queue requests; what becomes of each comes through `next_outputs`."""

        arrived = time.monotonic()

        def add() -> None:
            refused = [self._driver.add_request(client_id, request, arrived) for request in requests]
            self._publish({client_id: [update for update in refused if update is not None]})

        with self._wake:
            self._outboxes.setdefault(client_id, Outbox()).last_seen = time.monotonic()
        self._call(add)

    def abort(self, client_id: str, request_ids: list[str]) -> None:
        """End a client's requests; ids of others, and unknown ones, are ignored."""

        def end() -> None:
            own = set(self._driver.owned_by(client_id))
            self._publish({client_id: self._driver.abort([request_id for request_id in request_ids if request_id in own])})

        self._call(end)

    def next_outputs(self, client_id: str, cursor: int, timeout: float) -> tuple[int, list[RequestUpdate]] | None:
        """The client's updates after its cursor, and the new cursor; waits up to `timeout` seconds for one.

        None once the service is closed and everything has been given out.
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
        """The engine's counters; runs between two steps. While the shards are being rebuilt, theirs are of the last time."""

        def ask() -> dict[str, Any]:
            if self._failure is None:
                self._recovery.run(self._report)
            return self._driver.stats() | self._recovery.stats()

        return self._ask(ask)

    def metrics(self) -> tuple[dict[str, float], Readings]:
        """Gauges as they are now, and what was recorded since the last call; the first call begins it. Waits for no step."""
        return self._driver.gauges(), self._driver.metrics.take()

    def health(self) -> bool:
        """True only if a step, an empty one if there is no work, went through every rank within the last interval."""
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
            self._recovery.cancel()  # the step is a long one, or a hung rank does not answer it
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
        """One step, or while there is nothing to do a look at the shards."""
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
        """Make the calls that have come so far; if one raises, those behind it are still in the inbox."""
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
        """Their outboxes stay, with the numbering: a client that was only slow then finds out what became of its requests."""
        now = time.monotonic()
        with self._wake:
            silent = [client for client, outbox in self._outboxes.items() if now - outbox.last_seen > CLIENT_SILENCE_S]
        for client_id in silent:
            requests = self._driver.owned_by(client_id)
            if requests:
                logger.warning(
                    "a client has been silent for %g s: its %d requests are aborted", CLIENT_SILENCE_S, len(requests)
                )
                reason = f"nobody has fetched this client's outputs for {CLIENT_SILENCE_S:g} s; its requests were aborted"
                self._publish({client_id: self._driver.abort(requests, reason)})

    def _fail(self, failure: ShardFailure) -> None:
        """The shards cannot go on: every request ends with the reason, later ones are refused with it."""
        self._failure = failure
        logger.error("the engine has stopped: %s", failure)  # with the shard's traceback
        self._publish(self._driver.fail_all(failure))
        self._recovery.cancel()  # where the error was the driver's own, a rebuild may be under way
        self._recovery.close()
        try:
            self._group.stop()
        except Exception:
            logger.exception("the shards could not be stopped")
        while True:  # answer what still comes in
            with self._wake:
                while not self._inbox and not self._closed:
                    self._wake.wait()
                if self._closed:
                    return
            self._answer_calls()

    # ---- calls that the loop's thread makes

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
