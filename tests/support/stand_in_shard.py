"""StandInShard: a shard without a model, that answers plans through real collectives and can be told to misbehave."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from distributed_sparse.config import EngineConfig
from distributed_sparse.protocol.step import Loaded, Ready, ShardReport, StepPlan, StepResult
from distributed_sparse.ranks import worker as serve
from distributed_sparse.ranks.worker import ShardArguments, run_shard
from distributed_sparse.shard.collectives.collectives import Collectives
from distributed_sparse.shard.pending import PendingStep

FAIL_STEP, KILL_STEP, SLEEP_STEP, WRONG_STEP, QUIET_STEP = 1001, 1002, 1003, 1004, 1005
"""Steps in which the last rank raises, kills itself, sleeps, answers another step; and one that runs no collective."""
DEAF_STEP, LATE_STEP, BUSY_STEP = 1006, 1007, 1008
"""Steps in which the last rank raises while the others sleep, or answer when nobody wants it any more; and one in which all
compute for a while, without a word."""
LATE_S, BUSY_S = 0.6, 1.3


class StandInShard:
    """Answers each step with the all-reduced sum of the ranks + 1 and the step's number; a report counts its loads as
    `rows_dense` and its allocations as `rows_sparse`."""

    def __init__(self, config: EngineConfig, rank: int, world_size: int, collectives: Collectives) -> None:
        self.rank = rank
        self.world_size = world_size
        self.collectives = collectives
        self.loads = 0
        self.allocations = 0

    def load(self) -> Loaded:
        self.loads += 1
        return Loaded(
            rank=self.rank,
            device="cpu",
            dtype="float32",
            kv_heads=(self.rank, self.rank + 1),
            weight_bytes=100,
            page_bytes=64,
            max_pages=50 - self.rank,
        )

    def allocate(self, num_pages: int) -> Ready:
        self.allocations += 1
        return Ready(rank=self.rank, cache_bytes=num_pages * 60, metadata_bytes=num_pages * 4)

    def begin(self, plan: StepPlan) -> PendingStep:
        return PendingStep.done(self.step(plan))

    def step(self, plan: StepPlan) -> StepResult:
        if self.rank == self.world_size - 1:
            if plan.step in (FAIL_STEP, DEAF_STEP, LATE_STEP):
                raise ArithmeticError("the stand-in was told to fail")
            if plan.step == KILL_STEP:
                os.kill(os.getpid(), 9)
            if plan.step == SLEEP_STEP:
                time.sleep(3600)
            if plan.step == WRONG_STEP:
                return StepResult(step=plan.step - 1, rank=self.rank)
        if plan.step == DEAF_STEP:
            time.sleep(3600)
        if plan.step == LATE_STEP:
            time.sleep(LATE_S)
        if plan.step == BUSY_STEP:
            compute(BUSY_S)
        if plan.step in (QUIET_STEP, WRONG_STEP, LATE_STEP):
            return StepResult(step=plan.step, rank=self.rank)
        if plan.report:
            return StepResult(step=plan.step, rank=self.rank, report=report(self.loads, self.allocations))
        total = self.collectives.all_reduce(torch.tensor([float(self.rank + 1)]))
        return StepResult(step=plan.step, rank=self.rank, tokens=[int(total.item()), plan.step])

    def close(self) -> None:
        self.collectives.close()


def compute(seconds: float) -> None:
    """Half of the time in Python, half of it in one torch call after the other."""
    began, x = time.monotonic(), torch.ones(400, 400)
    while time.monotonic() < began + seconds / 2:
        sum(range(1000))
    while time.monotonic() < began + seconds:
        x @ x


def report(loads: int, allocations: int) -> ShardReport:
    return ShardReport(
        rows_dense=loads, rows_sparse=allocations, tokens_attended=[], tokens_in_context=0, bytes_read=0,
        all_reduce_calls=0, all_reduce_bytes=0, time_ms={},
    )  # fmt: skip


class OtherMethod(StandInShard):
    """Rank 1's method uses pages otherwise than rank 0's, as `name` of `Loaded` says."""

    def __init__(self, name: str, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.name = name

    def load(self) -> Loaded:
        loaded = super().load()
        if self.name == "evict_window":
            loaded.evict_window = (1, 2) if self.rank == 0 else None
        else:
            loaded.copy_on_fork = self.rank == 1
        return loaded


class FailsToLoad(StandInShard):
    """Rank 1 runs out of memory while it loads; the others wait for it."""

    def load(self) -> Loaded:
        if self.rank == 1:
            raise MemoryError("no room for the weights of rank 1")
        self.collectives.barrier()
        return super().load()


class RefusesToLoad(StandInShard):
    """Every rank refuses the checkpoint."""

    def load(self) -> Loaded:
        raise ValueError("the checkpoint lacks lm_head.weight; convert it again")


class DiesWhileLoading(StandInShard):
    """Rank 1's process vanishes without a word."""

    def load(self) -> Loaded:
        if self.rank == 1:
            os.kill(os.getpid(), 9)
        time.sleep(3600)
        raise AssertionError


class StopsWhileLoading(StandInShard):
    """Rank 1's process is stopped, and says nothing more."""

    def load(self) -> Loaded:
        if self.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().load()


class NeverLoads(StandInShard):
    """Rank 0 hangs while it loads."""

    def load(self) -> Loaded:
        if self.rank == 0:
            time.sleep(3600)
        return super().load()


def write_checkpoint(folder: Path, value: float = 1.0, columns: int = 4) -> Path:
    """A folder that passes for a checkpoint until a model is built from it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "value": value}))
    save_file({"model.norm.weight": torch.full((columns,), value)}, folder / "model.safetensors")
    return folder


BEAT_S = 0.05


def run_lively(arguments: ShardArguments) -> None:
    """`run_shard` that says much more often that it is alive."""
    serve.HEARTBEAT_S = BEAT_S
    run_shard(arguments)


def run_unreachable(arguments: ShardArguments) -> None:
    """`run_shard`, but from generation 1 on a rank never connects."""
    if arguments.generation > 0:
        time.sleep(3600)
    run_shard(arguments)


def run_doomed(arguments: ShardArguments) -> None:
    """`run_shard`, but a rank made for generation 1 ends before it connects."""
    if arguments.generation == 1:
        os._exit(7)
    run_shard(arguments)


def run_vanishing(arguments: ShardArguments) -> None:
    """`run_shard`, but a rank made for generation 1 ends between its hello and the meeting of the ranks."""
    if arguments.generation == 1:
        serve.make_collectives = lambda arguments: os.kill(os.getpid(), 9)  # type: ignore[return-value, assignment]
    run_shard(arguments)
