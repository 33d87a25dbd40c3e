"""LLMs for tests: the real engine, its ranks in spawned processes over gloo instead of Ray actors."""

from __future__ import annotations

from typing import Any

from distributed_sparse.client import Service
from distributed_sparse.driver.client_messages import ModelInfo
from distributed_sparse.driver.service import DriverService
from distributed_sparse.llm import LLM
from tests.support.process_group import ProcessShardGroup


class ProcessLLM(LLM):
    """An LLM that is the product's in everything but who starts the ranks."""

    def _start_service(self, info: ModelInfo, tokenizer: str | None) -> Service:
        service = DriverService(self.config, info, tokenizer, ProcessShardGroup(self.config))
        service.start()
        return service


def make_llm(model: Any, tensor_parallel_size: int = 1, **engine_args: Any) -> LLM:
    """The product's LLM in this process for one rank, else a ProcessLLM."""
    engine_args.setdefault("device", "cpu")  # also where there is a GPU: ranks would share it
    kind = ProcessLLM if tensor_parallel_size > 1 else LLM
    return kind(str(model), tensor_parallel_size=tensor_parallel_size, **engine_args)
