"""load: send requests to an engine from one thread, with a fixed number in flight."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from distributed_sparse.client.client import EngineError, Updates
from distributed_sparse.protocol.client import NewRequest, RequestUpdate
from distributed_sparse.tools.common.latency import RequestTimes

if TYPE_CHECKING:
    from distributed_sparse import LLM


class Arrivals(Updates):
    """Updates with their arrival times, taken on the receiver's thread, so that late reading does not change them."""

    def __init__(self) -> None:
        super().__init__()
        self._times: queue.SimpleQueue[float] = queue.SimpleQueue()

    def put(self, update: RequestUpdate) -> None:
        self._times.put(time.monotonic())
        super().put(update)

    def next(self) -> tuple[float, RequestUpdate]:
        """Wait for the next update; return its arrival time and the update."""
        update = self.get()
        return self._times.get(), update


def send(
    llm: LLM,
    requests: Sequence[NewRequest],
    concurrency: int,
    on_update: Callable[[int, RequestUpdate], None] | None = None,
) -> list[RequestTimes]:
    """Run all requests, `concurrency` at a time; return their times and tokens in the given order.

    Args:
        on_update: called with (index of the request, update).

    Raises:
        EngineError: the engine refused or failed a request; the others are aborted.
    """
    numbers = {request.request_id: number for number, request in enumerate(requests)}
    found: dict[int, RequestTimes] = {}
    arrivals, left = Arrivals(), list(reversed(requests))
    running: set[str] = set()

    def submit(count: int) -> None:
        new = [left.pop() for _ in range(min(count, len(left)))]
        if new:
            now = time.monotonic()
            found.update((numbers[r.request_id], RequestTimes(now, len(r.prompt_token_ids))) for r in new)
            running.update(r.request_id for r in new)
            llm.client.submit(new, arrivals)

    try:
        submit(concurrency)
        while running:
            arrived, update = arrivals.next()
            number = numbers[update.request_id]
            new_tokens = [token for sample in update.samples for token in sample.token_ids]
            if new_tokens:
                found[number].arrivals.append(arrived)
                found[number].token_ids += new_tokens
            if on_update is not None:
                on_update(number, update)
            if update.finished:
                running.discard(update.request_id)
                if update.error is not None:
                    raise EngineError(update.error)
                submit(1)
    finally:
        if running:
            llm.abort(list(running))
    return [found[number] for number in range(len(requests))]
