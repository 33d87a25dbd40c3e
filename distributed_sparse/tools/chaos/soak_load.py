"""soak_load: clients that send random requests of a pool, in several ways, until `finish` or `stop`."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from distributed_sparse.tools.chaos.outcome import LOST, Outcome, judge
from distributed_sparse.tools.chaos.soak_workload import PooledRequest

if TYPE_CHECKING:
    from distributed_sparse.llm import LLM
    from distributed_sparse.outputs import RequestOutput

WAYS = {"generate": 5, "batch": 2, "stream": 5, "abort": 2, "leave": 2, "timeout": 2}
"""Weight of each way to send a request: `generate` one prompt or several ("batch"); `stream` to the end, or until the client
aborts or leaves; `generate` with a `timeout_s`."""
LOST_PAUSE_S = 1.0
"""Pause after a lost request, so that a dead engine does not get thousands of requests."""


class Load:
    """The client threads and the outcomes so far.

    Args:
        llm: the engine that they share.
        pool: the requests with their expected completions.
        num_clients: number of threads.
        seed: of the clients' random choices.
    """

    def __init__(self, llm: LLM, pool: Sequence[PooledRequest], num_clients: int, seed: int) -> None:
        self._llm = llm
        self._pool = pool
        self._lock = threading.Lock()
        self._outcomes: list[Outcome] = []
        self._in_flight = 0
        self._closed = False
        self._finishing = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(f"{seed} {number}"),), name=f"client-{number}", daemon=True)
            for number in range(num_clients)
        ]

    @property
    def outcomes(self) -> list[Outcome]:
        """Outcomes of the requests that have ended."""
        with self._lock:
            return list(self._outcomes)

    def start(self) -> None:
        """Start the clients."""
        for thread in self._threads:
            thread.start()

    def finish(self, timeout: float) -> None:
        """Send no more requests and wait for those in flight; those that do not end within `timeout` seconds are lost."""
        self._finishing.set()
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            self._closed = True
            self._outcomes += [
                Outcome(LOST, detail=f"has not ended within {timeout:g} s after the last fault")
            ] * self._in_flight

    def stop(self) -> None:
        """Send no more requests and ignore those in flight."""
        self._finishing.set()
        with self._lock:
            self._closed = True

    # ---- one client

    def _run(self, rng: random.Random) -> None:
        while not self._finishing.is_set():
            (way,) = rng.choices(list(WAYS), list(WAYS.values()))
            outcomes = self._send(way, rng)
            if any(outcome.how == LOST for outcome in outcomes):
                self._finishing.wait(LOST_PAUSE_S)

    def _send(self, way: str, rng: random.Random) -> list[Outcome]:
        """Send one request, or a batch, in one of `WAYS`."""
        count = rng.randint(2, 4) if way == "batch" else 1
        with self._lock:
            self._in_flight += count
        requests = [rng.choice(self._pool) for _ in range(count)]
        if way in ("generate", "batch", "timeout"):
            outcomes = self._generate(requests, rng.uniform(0.05, 5.0) if way == "timeout" else None)
        else:
            outcomes = [self._stream(requests[0], way, rng.randint(1, 40) if way != "stream" else None)]
        with self._lock:
            if not self._closed:
                self._in_flight -= count
                self._outcomes += outcomes
        return outcomes

    def _generate(self, requests: list[PooledRequest], timeout_s: float | None) -> list[Outcome]:
        outputs: Sequence[RequestOutput | None] = [None] * len(requests)
        error = None
        try:
            params = [replace(request.params, timeout_s=timeout_s) for request in requests]
            outputs = self._llm.generate([request.prompt_token_ids for request in requests], params, use_tqdm=False)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        may_time_out = timeout_s is not None
        return [judge(request.expected, output, error, may_time_out=may_time_out) for request, output in zip(requests, outputs)]

    def _stream(self, request: PooledRequest, way: str, num_updates: int | None) -> Outcome:
        """Read a stream; abort or leave it after `num_updates` updates."""
        output, error = None, None
        try:
            stream = self._llm.stream(request.prompt_token_ids, request.params)
            for count, update in enumerate(stream, start=1):
                output = update
                if count == num_updates and way == "abort":
                    self._llm.abort(stream.request_id)
                elif count == num_updates:
                    break
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        return judge(request.expected, output, error, may_abort=num_updates is not None)
