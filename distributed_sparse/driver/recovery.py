"""Recovery: rebuilds the ShardGroup after a failure and has the Driver replay its requests, hidden from the step loop."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from distributed_sparse.driver.driver import Driver, Updates
from distributed_sparse.ranks.base import ShardFailure

logger = logging.getLogger(__name__)

KEPT_RECORDS = 64
RETRY_PAUSE_S = 1.0
"""Pause before another rebuild, times the number of failed ones: the cause of a failure may be transient."""

T = TypeVar("T")


@dataclasses.dataclass
class RecoveryRecord:
    """One recovery; fields are filled as it proceeds. The entries of `LLM.stats()["recovery_log"]`."""

    ranks: tuple[int, ...]
    """Ranks that caused the failure."""
    cause: str
    noticed: float
    """When the Driver noticed the failure, in seconds since the epoch."""
    detect_s: float
    """Seconds from these ranks' last heartbeat or message until the Driver noticed: an upper bound of the detection time."""
    further_causes: tuple[str, ...] = ()
    """Causes of further failures during the rebuild."""
    attempts: int = 0
    """Rebuilds started; more than one if a shard failed during a rebuild."""
    rebuild_s: float | None = None
    """Seconds from the start of the rebuild until every rank was ready."""
    replay_s: float | None = None
    """Seconds from then until every request had recomputed its tokens."""
    replayed_tokens: int = 0

    def __str__(self) -> str:
        until = "until the next failure" if self.replay_s is None else f"in {self.replay_s:.2f} s"
        causes = "; then ".join((self.cause, *self.further_causes))
        return (
            f"{causes}; noticed within {self.detect_s:.2f} s, rebuilt in {self.rebuild_s:.2f} s "
            f"({self.attempts} attempt(s)), {self.replayed_tokens} tokens replayed {until}"
        )


class Recovery:
    """Runs the Driver's steps for the loop, and rebuilds the shards in a thread of its own after a failure.

    During a rebuild the loop goes on: requests are accepted, aborted and expire, but no steps run. Only the loop's thread
    may call it, except for `cancel`.

    Args:
        driver: its requests are replayed once the shards are ready.
        publish: receives the final updates of requests that do not fit into the rebuilt caches.
        wake: called from the rebuild thread when it has finished.
    """

    def __init__(self, driver: Driver, publish: Callable[[Updates], None], wake: Callable[[], None]) -> None:
        self.count = 0
        self.records: deque[RecoveryRecord] = deque(maxlen=KEPT_RECORDS)
        self._driver = driver
        self._group = driver.group
        self._config = driver.config
        self._publish = publish
        self._wake = wake
        self._failures: deque[float] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rebuild")
        self._rebuilding: Future[None] | None = None
        self._replaying: RecoveryRecord | None = None
        self._ready = 0.0
        self._cancelled = threading.Event()

    @property
    def up(self) -> bool:
        """Whether no rebuild is running or waiting to be picked up by `run`."""
        return self._rebuilding is None

    @property
    def busy(self) -> bool:
        """Whether a rebuild is running."""
        return self._rebuilding is not None and not self._rebuilding.done()

    def start(self) -> None:
        """Start the shards. A shard that dies during the start is replaced.

        Raises:
            ValueError: a setting, the checkpoint or the cluster is invalid.
            ShardFailure: the shards did not start. There is no retry if a shard reported an exception of its own.
        """
        deadline = self._deadline()
        try:
            self._group.start(deadline)
        except ShardFailure as failure:
            if failure.traceback or time.monotonic() >= deadline:
                raise
            self._rebuild(self._new_record(failure), failure, deadline)
        self._driver.resume()

    def run(self, work: Callable[[], T]) -> T | None:
        """Return `work()`, which may run steps; None if a shard fails in it, and during a rebuild (`work` is then not called).

        Raises:
            ShardFailure: the shards cannot be rebuilt.
        """
        if self._rebuilding is not None and not self._resume():
            return None
        try:
            result = work()
        except ShardFailure as failure:
            self._begin(failure)
            return None
        if self._replaying is not None:
            self._follow_replay()
        return result

    def cancel(self) -> None:
        """Make a running rebuild, or a step that hangs, end soon with a ShardFailure. May be called from any thread."""
        self._cancelled.set()
        self._group.cancel()

    def close(self) -> None:
        """End the rebuild thread. Call after `cancel`, or when no rebuild is running."""
        self._thread.shutdown()

    def stats(self) -> dict[str, Any]:
        """The entries of `LLM.stats()` about recoveries."""
        return {"recoveries": self.count, "recovery_log": [dataclasses.asdict(record) for record in self.records]}

    # ---- inside

    def _deadline(self) -> float:
        return time.monotonic() + self._config.startup_timeout_s

    def _new_record(self, failure: ShardFailure) -> RecoveryRecord:
        record = RecoveryRecord(failure.ranks, failure.cause, time.time(), failure.detect_s)
        self.records.append(record)
        return record

    def _begin(self, failure: ShardFailure) -> None:
        if self._replaying is not None:
            self._log()
        logger.warning("a shard has failed, rebuilding the group: %s", failure)  # with the shard's traceback
        record = self._new_record(failure)
        self._rebuilding = self._thread.submit(self._rebuild, record, failure, self._deadline())
        self._rebuilding.add_done_callback(lambda _: self._wake())

    def _rebuild(self, record: RecoveryRecord, failure: ShardFailure, deadline: float) -> None:
        """Rebuild, repeatedly if need be, until all ranks are ready. Raises the last failure if that does not succeed."""
        began = time.monotonic()
        while True:
            self._admit(failure)
            if self._cancelled.wait(RETRY_PAUSE_S * record.attempts):
                raise failure
            record.attempts += 1
            try:
                self._group.rebuild(deadline)
                break
            except ShardFailure as another:
                if time.monotonic() >= deadline:
                    raise
                logger.warning("a shard has failed in a rebuild: %s", another)
                record.further_causes = (*record.further_causes, another.cause)
                failure = another
        self._ready = time.monotonic()
        record.rebuild_s = self._ready - began
        self.count += 1
        self._driver.metrics.count("recoveries")
        self._replaying = record

    def _admit(self, failure: ShardFailure) -> None:
        """Count a failure; raise it if there were more than `max_rebuilds` within `rebuild_window_s`."""
        now, most, window = time.monotonic(), self._config.max_rebuilds, self._config.rebuild_window_s
        self._failures.append(now)
        while self._failures[0] < now - window:
            self._failures.popleft()
        if len(self._failures) > most:
            raise ShardFailure(
                failure.ranks,
                f"{failure.cause} (failure {len(self._failures)} within rebuild_window_s={window:g}, and max_rebuilds={most})",
                failure.traceback,
            )

    def _resume(self) -> bool:
        """Finish a completed rebuild: start the replay. Return False while the rebuild is still running."""
        assert self._rebuilding is not None
        if not self._rebuilding.done():
            return False
        try:
            self._rebuilding.result()
        except ValueError as error:  # a replaced rank has another checkpoint or other versions
            raise ShardFailure((), str(error)) from None
        self._rebuilding = None
        self._publish(self._driver.resume())
        return True

    def _follow_replay(self) -> None:
        assert self._replaying is not None
        self._replaying.replayed_tokens = self._driver.scheduler.replayed_tokens
        if not self._driver.replays:
            self._replaying.replay_s = time.monotonic() - self._ready
            self._log()

    def _log(self) -> None:
        logger.warning("recovered in generation %d: %s", self._group.generation, self._replaying)
        self._replaying = None
