"""LLMs for tests: the real engine, its ranks in spawned processes over gloo instead of Ray actors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distributed_sparse.client.client import Service
from distributed_sparse.driver.service import DriverService
from distributed_sparse.llm import LLM
from distributed_sparse.protocol.client import ModelInfo
from distributed_sparse.ranks.base import ShardGroup
from distributed_sparse.ranks.in_process import InProcessGroup
from distributed_sparse.ranks.worker import ShardArguments, ShardFactory, run_shard
from tests.support.process_group import ProcessShardGroup


class GroupLLM(LLM):
    """An LLM that is the product's in everything but who starts the ranks, and what they are.

    Args:
        model, engine_args: as `LLM`.
        shard_factory: makes each rank's shard; None: `Shard` itself.
        run: what each rank's process runs.

    Attributes:
        group: the ranks.
    """

    def __init__(
        self,
        model: str,
        shard_factory: ShardFactory | None = None,
        run: Callable[[ShardArguments], None] = run_shard,
        **engine_args: Any,
    ) -> None:
        self._shard_factory = shard_factory
        self._run_rank = run
        super().__init__(model, **engine_args)

    def _start_service(self, info: ModelInfo, tokenizer: str | None) -> Service:
        self.group = self._make_group()
        service = DriverService(self.config, info, tokenizer, self.group)
        service.start()
        return service

    def _make_group(self) -> ShardGroup:
        raise NotImplementedError


class ProcessLLM(GroupLLM):
    """Every rank in a process of its own."""

    group: ProcessShardGroup

    def _make_group(self) -> ProcessShardGroup:
        return ProcessShardGroup(self.config, self._shard_factory, run=self._run_rank)


class InProcessLLM(GroupLLM):
    """One rank, in this process."""

    def _make_group(self) -> InProcessGroup:
        return InProcessGroup(self.config, self._shard_factory)


def make_llm(model: Any, tensor_parallel_size: int = 1, shard_factory: ShardFactory | None = None, **engine_args: Any) -> LLM:
    """The product's LLM in this process for one rank, else a ProcessLLM; `shard_factory` makes the shards if given."""
    engine_args.setdefault("device", "cpu")  # also where there is a GPU: ranks would share it
    engine_args["tensor_parallel_size"] = tensor_parallel_size
    if tensor_parallel_size > 1:
        return ProcessLLM(str(model), shard_factory, **engine_args)
    return LLM(str(model), **engine_args) if shard_factory is None else InProcessLLM(str(model), shard_factory, **engine_args)
