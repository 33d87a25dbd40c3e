"""Recovery: a shard fails, the group is rebuilt, what ran before is replayed: the step loop need not know."""

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
"""Before a rebuild that follows a failed one, times the number of those: what killed a shard may need a moment to pass."""

T = TypeVar("T")


@dataclasses.dataclass
class RecoveryRecord:
    """One recovery, as it goes on. The entries of `LLM.stats()["recovery_log"]`."""

    ranks: tuple[int, ...]
    """Those at the root of it."""
    cause: str
    noticed: float
    """When the Driver knew: seconds since the epoch."""
    detect_s: float
    """Seconds from the last sign of life of these ranks until the Driver knew: it took no longer than that."""
    further_causes: tuple[str, ...] = ()
    """Of failures while it was being rebuilt."""
    attempts: int = 0
    """Rebuilds begun; more than one where a shard failed while another was being replaced."""
    rebuild_s: float | None = None
    """Seconds until every rank was ready again."""
    replay_s: float | None = None
    """Seconds from then on until every request stood where it had been."""
    replayed_tokens: int = 0

    def __str__(self) -> str:
        until = "until the next failure" if self.replay_s is None else f"in {self.replay_s:.2f} s"
        causes = "; then ".join((self.cause, *self.further_causes))
        return (
            f"{causes}; noticed within {self.detect_s:.2f} s, rebuilt in {self.rebuild_s:.2f} s "
            f"({self.attempts} attempt(s)), {self.replayed_tokens} tokens replayed {until}"
        )


class Recovery:
    """Stands between the loop and the Driver's steps; owns the thread in which the shards are rebuilt meanwhile.

    While it rebuilds, the loop goes on: requests are taken in, aborted, and expire. Steps are not taken. The loop's thread
    calls everything but `cancel`.

    Args:
        driver: whose requests replay once its shards are back.
        publish: takes the updates of requests that cannot go on with the rebuilt shards.
        wake: called from the rebuilding thread when it has ended.
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
        """The shards stand, as far as is known."""
        return self._rebuilding is None

    @property
    def busy(self) -> bool:
        """They are being rebuilt, and there is nothing to do but to wait for it."""
        return self._rebuilding is not None and not self._rebuilding.done()

    def start(self) -> None:
        """Bring the shards up for the first time; one that dies on the way is replaced, as later on.

        Raises:
            ValueError: a setting, the checkpoint or the cluster does not allow it.
            ShardFailure: they did not come up. One that says itself why it cannot start is not tried again.
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
        """What `work` returns, which may step the shards; None if one fails in it, and as long as they are being rebuilt.

        Raises:
            ShardFailure: they cannot be rebuilt.
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
        """From any thread: a rebuild that is under way, or a step that a rank does not answer, ends soon, in a ShardFailure."""
        self._cancelled.set()
        self._group.cancel()

    def close(self) -> None:
        """End the thread. What it does has ended, or has been cancelled."""
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
        logger.warning("a shard has failed, its group is being rebuilt: %s", failure)  # with the shard's traceback
        record = self._new_record(failure)
        self._rebuilding = self._thread.submit(self._rebuild, record, failure, self._deadline())
        self._rebuilding.add_done_callback(lambda _: self._wake())

    def _rebuild(self, record: RecoveryRecord, failure: ShardFailure, deadline: float) -> None:
        """Rebuild until a generation stands. Raises the failure that ends it."""
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
        """Raises if shards fail too often for another rebuild to make sense."""
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
        """Once the shards are back, have everything begin where it was; whether they are."""
        assert self._rebuilding is not None
        if not self._rebuilding.done():
            return False
        try:
            self._rebuilding.result()
        except ValueError as error:  # a replacement found another checkpoint, or other versions
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
