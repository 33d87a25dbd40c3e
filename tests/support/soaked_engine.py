"""A stand-in for the engine that a soak works on, and processes that look like its shards."""

from __future__ import annotations

import itertools
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from distributed_sparse.outputs import CompletionOutput, RequestOutput
from distributed_sparse.sampling_params import SamplingParams
from distributed_sparse.tools.chaos.processes import MARK, SHARD, marked_processes

MENDING_S = 0.15
SHORT_TIMEOUT_S = 2.5
"""A request with a shorter `timeout_s` times out."""


class Processes:
    """Processes that do nothing, each with a mark and a name."""

    def __init__(self) -> None:
        self.all: list[subprocess.Popen[bytes]] = []

    def start(self, mark: str, name: str = SHARD) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([name, "60"], executable="/bin/sleep", env={MARK: mark})
        self.all.append(process)
        while process.pid not in marked_processes(mark):  # an environment is seen a moment after the program has begun
            time.sleep(0.001)
        return process

    def end(self) -> None:
        for process in self.all:
            process.kill()
            process.wait()


class SoakedEngine:
    """Answers every request at once with the tokens 0, 1, 2, ... up to its max_tokens, twice as fast as any model.

    Args:
        shards: two are started, and replaced some `stats` after one has died; None: it has no shards.
        mark: of the shards.
        before: called before each request.
        wrong: the first token is wrong from the second `generate` on but one, so after a pool has been settled.
        mends: it replaces what has died.
    """

    max_model_len = 400
    config = SimpleNamespace(max_num_seqs=4)

    def __init__(
        self,
        shards: Processes | None = None,
        mark: str = "",
        before: Callable[[], object] = lambda: None,
        wrong: bool = False,
        mends: bool = True,
    ) -> None:
        self._before = before
        self._wrong = wrong
        self._mends = mends
        self._generated = itertools.count()
        self._streams = itertools.count()
        self._aborted: set[str] = set()
        self._log: list[dict[str, Any]] = []
        self._noticed: float | None = None
        self._processes = shards
        self._mark = mark
        self._shards = [shards.start(mark) for _ in range(2)] if shards is not None else []
        self.left = 0
        """Streams whose reader left before their end."""
        self.pages = {"used": 0, "reserved": 0}

    # ---- requests

    def generate(self, prompts: list[list[int]], params: Sequence[SamplingParams], use_tqdm: bool) -> list[RequestOutput]:
        self._before()
        settled = next(self._generated) >= 2
        return [
            output(own, 2, "abort", error="timeout_s=1 has passed")
            if own.timeout_s is not None and own.timeout_s < SHORT_TIMEOUT_S
            else output(own, wrong=self._wrong and settled)
            for own in params
        ]

    def stream(self, prompt: list[int], params: SamplingParams) -> SoakedStream:
        self._before()
        return SoakedStream(self, params, str(next(self._streams)), self._wrong)

    def abort(self, request_id: str) -> None:
        self._aborted.add(request_id)

    def is_aborted(self, request_id: str) -> bool:
        return request_id in self._aborted

    # ---- shards

    def stats(self) -> dict[str, Any]:
        self._mend()
        ranks = [{"node_id": f"node {rank}", "pid": shard.pid} for rank, shard in enumerate(self._shards)]
        rows = {"rows_dense": 1, "rows_sparse": 2}
        return {"recovery_log": list(self._log), "ranks": ranks, "pages": self.pages, "attention": rows}

    def health(self) -> bool:
        return all(shard.poll() is None for shard in self._shards)

    def _mend(self) -> None:
        dead = [rank for rank, shard in enumerate(self._shards) if shard.poll() is not None]
        if dead and self._noticed is None:
            self._noticed = time.time()
        if self._noticed is not None and self._mends and time.time() > self._noticed + MENDING_S:
            assert self._processes is not None
            for rank in dead:
                self._shards[rank] = self._processes.start(self._mark)
            times = {"rebuild_s": MENDING_S, "replay_s": 0.0, "attempts": 1, "replayed_tokens": 3}
            self._log.append({"cause": f"ranks {dead} died", "noticed": self._noticed, **times})
            self._noticed = None


class SoakedStream:
    """A token an update; the last one when it was aborted."""

    def __init__(self, engine: SoakedEngine, params: SamplingParams, request_id: str, wrong: bool) -> None:
        self.request_id = request_id
        self._engine = engine
        self._params = params
        self._wrong = wrong

    def __iter__(self) -> Iterator[RequestOutput]:
        assert self._params.max_tokens is not None
        try:
            for count in range(1, self._params.max_tokens):
                yield output(self._params, count, None, self._wrong)
                if self._engine.is_aborted(self.request_id):
                    yield output(self._params, count, "abort", self._wrong)
                    return
            yield output(self._params, wrong=self._wrong)
        except GeneratorExit:
            self._engine.left += 1
            raise


def output(
    params: SamplingParams,
    count: int | None = None,
    reason: str | None = "length",
    wrong: bool = False,
    error: str | None = None,
) -> RequestOutput:
    """`count` tokens (None: all) of every sample."""
    tokens = list(range(count if count is not None else params.max_tokens or 0))
    if wrong:
        tokens[:1] = [99]
    completions = [CompletionOutput(index, "", list(tokens), reason) for index in range(params.n)]
    return RequestOutput("", None, [1], outputs=completions, finished=reason is not None, error=error)
