"""Load: clients that ask for random requests of a pool, in several ways, until they are told to finish."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from distributed_sparse.tools.chaos.outcome import LOST, Outcome, judge
from distributed_sparse.tools.chaos.soak_workload import PooledRequest

if TYPE_CHECKING:
    from distributed_sparse.llm import LLM
    from distributed_sparse.outputs import RequestOutput

WAYS = {"generate": 5, "batch": 2, "stream": 5, "abort": 2, "leave": 2, "timeout": 2}
"""How often each is taken: `generate` of one prompt or of several; `stream` to its end, until `abort`, or until the client
leaves; and with a `timeout_s`."""
LOST_PAUSE_S = 1.0
"""After a lost request, so that an engine that has ended is not asked thousands of times."""


class Load:
    """Owns the clients' threads, and the outcomes so far.

    Args:
        llm: the engine they share.
        pool: the requests, with what is expected of each.
        num_clients: how many ask at once.
        seed: of what each client chooses.
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
            threading.Thread(target=self._ask, args=(random.Random(f"{seed} {number}"),), name=f"client-{number}", daemon=True)
            for number in range(num_clients)
        ]

    @property
    def outcomes(self) -> list[Outcome]:
        """Of the requests that have ended."""
        with self._lock:
            return list(self._outcomes)

    def start(self) -> None:
        """Begin to ask."""
        for thread in self._threads:
            thread.start()

    def finish(self, timeout: float) -> None:
        """Ask for nothing more, and wait for what is still asked for; what has not ended within `timeout` seconds is lost."""
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
        """Ask for nothing more, and forget what is still asked for."""
        self._finishing.set()
        with self._lock:
            self._closed = True

    # ---- one client

    def _ask(self, rng: random.Random) -> None:
        ways = self._ways()
        while not self._finishing.is_set():
            (way,) = rng.choices(list(WAYS), list(WAYS.values()))
            outcomes = ways[way](rng)
            if any(outcome.how == LOST for outcome in outcomes):
                self._finishing.wait(LOST_PAUSE_S)

    def _ways(self) -> dict[str, Callable[[random.Random], list[Outcome]]]:
        return {
            "generate": self._generate, "batch": self._batch, "stream": self._stream,
            "abort": self._abort, "leave": self._leave, "timeout": self._time_out,
        }  # fmt: skip

    def _end(self, outcomes: list[Outcome]) -> list[Outcome]:
        with self._lock:
            if not self._closed:
                self._in_flight -= len(outcomes)
                self._outcomes += outcomes
        return outcomes

    def _begin(self, rng: random.Random, count: int = 1) -> list[PooledRequest]:
        with self._lock:
            self._in_flight += count
        return [rng.choice(self._pool) for _ in range(count)]

    def _generate(self, rng: random.Random) -> list[Outcome]:
        return self._complete(self._begin(rng))

    def _batch(self, rng: random.Random) -> list[Outcome]:
        return self._complete(self._begin(rng, rng.randint(2, 4)))

    def _complete(self, asked: list[PooledRequest], timeout_s: float | None = None) -> list[Outcome]:
        outputs: Sequence[RequestOutput | None] = [None] * len(asked)
        error = None
        try:
            params = [replace(one.params, timeout_s=timeout_s) for one in asked]
            outputs = self._llm.generate([one.prompt_token_ids for one in asked], params, use_tqdm=False)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        return self._end(
            [judge(one.expected, output, error, may_time_out=timeout_s is not None) for one, output in zip(asked, outputs)]
        )

    def _time_out(self, rng: random.Random) -> list[Outcome]:
        return self._complete(self._begin(rng), timeout_s=rng.uniform(0.05, 5.0))

    def _stream(self, rng: random.Random) -> list[Outcome]:
        return self._follow(self._begin(rng)[0])

    def _abort(self, rng: random.Random) -> list[Outcome]:
        return self._follow(self._begin(rng)[0], abort_after=rng.randint(1, 40))

    def _leave(self, rng: random.Random) -> list[Outcome]:
        return self._follow(self._begin(rng)[0], leave_after=rng.randint(1, 40))

    def _follow(self, asked: PooledRequest, abort_after: int | None = None, leave_after: int | None = None) -> list[Outcome]:
        """Read a stream; abort it, or leave it, once so many updates have come."""
        output, error = None, None
        try:
            stream = self._llm.stream(asked.prompt_token_ids, asked.params)
            for count, update in enumerate(stream, start=1):
                output = update
                if count == abort_after:
                    self._llm.abort(stream.request_id)
                if count == leave_after:
                    break
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        may_abort = abort_after is not None or leave_after is not None
        return self._end([judge(asked.expected, output, error, may_abort)])
