"""InProcessGroup: a single rank in the Driver's process, without Ray and without sockets."""

from __future__ import annotations

import math
import os
import socket
import traceback
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from distributed_sparse.protocol.step import Hello, StepPlan, StepResult
from distributed_sparse.ranks.base import RankInfo, ShardFailure, ShardGroup

if TYPE_CHECKING:
    from distributed_sparse.config import EngineConfig
    from distributed_sparse.ranks.worker import ShardFactory, ShardInterface

T = TypeVar("T")


class InProcessGroup(ShardGroup):
    """A ShardGroup of one rank. Calls run in the Driver's thread, so timeouts and `cancel` have no effect.

    A GPU runs asynchronously: a plan is started by `send`. A CPU computes a plan in `collect`, and sending the next plan
    ahead would only delay results, so `queues_plans` is False there.

    Args:
        config: the engine's; `tensor_parallel_size` must be 1.
        shard_factory: makes the shard; None: `Shard` itself.
    """

    def __init__(self, config: EngineConfig, shard_factory: ShardFactory | None = None) -> None:
        if config.tensor_parallel_size != 1:
            raise ValueError(
                f"tensor_parallel_size={config.tensor_parallel_size} needs one process per rank; "
                "use distributed_executor_backend='ray' (or 'auto')"
            )
        super().__init__(world_size=1)
        self._config = config
        self._shard_factory = shard_factory
        self._shard: ShardInterface | None = None
        self._steps: deque[tuple[int, Callable[[], StepResult]]] = deque()
        self._failure: ShardFailure | None = None

    def start(self, deadline: float | None = None) -> list[RankInfo]:
        from distributed_sparse.ranks.worker import make_shard
        from distributed_sparse.shard.collectives.collectives import Collectives

        hostname = socket.gethostname()
        hello = Hello(0, self.generation, hostname, hostname, os.getpid(), {}, "")
        try:
            self._shard = make_shard(self._config, 0, 1, Collectives(), self._shard_factory)
            loaded = self._shard.load()
            ready = self._shard.allocate(loaded.max_pages)
        except ValueError:
            self.stop()
            raise  # for the user to fix; the message is the shard's own
        except Exception as error:
            self._failure = self._failed("could not start", error)
            raise self._failure from error.with_traceback(None)  # its frames would keep the shard's memory
        self.ranks = [RankInfo.of(hello, loaded, ready)]
        return self.ranks

    @property
    def queues_plans(self) -> bool:
        return self.ranks[0].device != "cpu"

    def rebuild(self, deadline: float | None = None) -> list[RankInfo]:
        self.stop()  # free the memory first: there may not be enough for two
        self._failure = None
        self.generation += 1
        try:
            return self.start(deadline)
        except ValueError as error:  # the same configuration worked before
            self._failure = self._failed("could not start again", error)
            raise self._failure from error.with_traceback(None)

    def send(self, plan: StepPlan) -> None:
        shard = self._running_shard()
        if self.queues_plans:
            self._steps.append((plan.step, self._guarded(plan.step, lambda: shard.begin(plan)).result))
        else:
            self._steps.append((plan.step, lambda: shard.begin(plan).result()))

    def collect(self, timeout: float = math.inf) -> list[StepResult]:
        self._running_shard()
        step, finish = self._steps.popleft()
        return [self._guarded(step, finish)]

    def _guarded(self, step: int, work: Callable[[], T]) -> T:
        try:
            return work()
        except Exception as error:
            self._failure = self._failed(f"failed in step {step}", error)
            raise self._failure from error.with_traceback(None)  # its frames would keep the shard's memory

    def check(self) -> None:
        self._running_shard()

    def cancel(self) -> None: ...

    def stop(self) -> None:
        shard, self._shard = self._shard, None
        self._steps.clear()
        if shard is not None:
            shard.close()

    def _running_shard(self) -> ShardInterface:
        if self._failure is not None:
            raise self._failure
        if self._shard is None:
            raise ShardFailure((), "the shard has been stopped")
        return self._shard

    @staticmethod
    def _failed(what: str, error: Exception) -> ShardFailure:
        text = "".join(traceback.format_exception(error))
        return ShardFailure((0,), f"rank 0 (this process) {what}: {type(error).__name__}: {error}", text)
