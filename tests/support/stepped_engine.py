"""SteppedEngine: the Driver without its thread: a test says when a request comes and when a step is taken."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from distributed_sparse.client.output_builder import OutputBuilder
from distributed_sparse.config import EngineConfig
from distributed_sparse.driver.driver import Driver
from distributed_sparse.model.config import ModelConfig
from distributed_sparse.outputs import RequestOutput
from distributed_sparse.protocol.client import ModelInfo, NewRequest
from distributed_sparse.protocol.step import Hello, StepPlan, StepResult
from distributed_sparse.ranks.base import RankInfo, ShardGroup
from distributed_sparse.sampling_params import SamplingParams
from distributed_sparse.shard.collectives.collectives import Collectives
from distributed_sparse.shard.shard import Shard
from tests.support.patience import WAIT_S

T = TypeVar("T")


class ThreadShardGroup(ShardGroup):
    """All ranks in this process, each in a thread of its own with one torch thread, over gloo: a test can look into them.

    Args:
        config: the engine's.
        queues_plans: as of `ShardGroup`; a plan is nevertheless run when it is collected.

    Attributes:
        shards: in rank order, after `start`.
        plans: every plan that was sent.
    """

    def __init__(self, config: EngineConfig, queues_plans: bool = False) -> None:
        super().__init__(config.tensor_parallel_size)
        self._config = config
        self._queues_plans = queues_plans
        self._threads = [ThreadPoolExecutor(1, f"rank-{rank}", torch.set_num_threads, (1,)) for rank in range(self.world_size)]
        self._sent = 0
        self.plans: list[StepPlan] = []
        self.shards: list[Shard] = []

    @property
    def queues_plans(self) -> bool:
        return self._queues_plans

    def start(self, deadline: float | None = None) -> list[RankInfo]:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if self.world_size > 1 else None

        def make(rank: int) -> Shard:
            own = dist.TCPStore("127.0.0.1", store.port, is_master=False) if store is not None else None
            collectives = Collectives(rank, self.world_size, "cpu", own, timeout=WAIT_S)
            collectives.rendezvous()
            return Shard(self._config, rank, self.world_size, collectives)

        self.shards = self._on_all(make)
        loaded = self._on_all(lambda rank: self.shards[rank].load())
        num_pages = min(message.max_pages for message in loaded)
        ready = self._on_all(lambda rank: self.shards[rank].allocate(num_pages))
        hellos = [Hello(rank, 0, "here", "here", 0, {}, "") for rank in range(self.world_size)]
        self.ranks = [RankInfo.of(*told) for told in zip(hellos, loaded, ready)]
        return self.ranks

    def rebuild(self, deadline: float | None = None) -> list[RankInfo]:
        """All ranks anew, in the same threads."""
        self._on_all(lambda rank: self.shards[rank].close())
        self.generation += 1
        return self.start(deadline)

    def cancel(self) -> None: ...

    def send(self, plan: StepPlan) -> None:
        self.plans.append(plan)

    def collect(self, timeout: float = math.inf) -> list[StepResult]:
        plan = self.plans[self._sent]
        self._sent += 1
        return self._on_all(lambda rank: self.shards[rank].step(plan))

    def check(self) -> None: ...

    def stop(self) -> None:
        self._on_all(lambda rank: self.shards[rank].close())
        for thread in self._threads:
            thread.shutdown()

    def _on_all(self, work: Callable[[int], T]) -> list[T]:
        futures = [thread.submit(work, rank) for rank, thread in enumerate(self._threads)]
        return [future.result() for future in futures]


class SteppedEngine:
    """A Driver over a `ThreadShardGroup`; use it in a `with` block."""

    def __init__(self, path: Path, tensor_parallel_size: int = 1, queues_plans: bool = False, **engine_args: Any) -> None:
        config = EngineConfig.from_dict({"model": str(path), "tensor_parallel_size": tensor_parallel_size, **engine_args})
        model = ModelConfig.from_pretrained(path)
        info = ModelInfo(
            vocab_size=model.vocab_size,
            num_layers=model.num_hidden_layers,
            num_kv_heads=model.num_key_value_heads,
            eos_token_ids=model.eos_token_ids,
            max_model_len=config.max_model_len or model.max_position_embeddings,
        )
        self.group = ThreadShardGroup(config, queues_plans)
        self.driver = Driver(config, info, None, self.group)
        self.driver.group.start()
        self.driver.resume()
        self._builders: dict[str, OutputBuilder] = {}
        self._numbers = itertools.count()

    def add(self, prompt: list[int], **params: Any) -> RequestOutput:
        """Queue a request; the output that is returned grows with every step."""
        request_id, sampling = str(next(self._numbers)), SamplingParams(**params)
        builder = self._builders[request_id] = OutputBuilder(request_id, None, prompt, sampling, None)
        refused = self.driver.add_request("test", NewRequest(request_id, prompt, sampling))
        assert refused is None, refused
        return builder.output

    def abort(self, output: RequestOutput) -> None:
        for update in self.driver.abort([output.request_id]):
            self._builders[update.request_id].add(update)

    def step(self) -> StepPlan:
        """Take one step; the plan that it ran."""
        for updates in self.driver.step().values():
            for update in updates:
                self._builders[update.request_id].add(update)
        return self.group.plans[-1]

    def finish(self) -> None:
        """Take steps until nothing is left to do."""
        while self.driver.has_work:
            self.step()

    def __enter__(self) -> SteppedEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.group.stop()
