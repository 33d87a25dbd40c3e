"""FaultyShard: the real shard, that dies, hangs or raises where a test has told it to, once, and leaves a note that it did."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from distributed_sparse.config import EngineConfig
from distributed_sparse.protocol.step import Loaded, PrefillChunk, Ready, StepPlan
from distributed_sparse.ranks.worker import ShardArguments, run_shard
from distributed_sparse.shard.collectives.collectives import CollectiveError, Collectives
from distributed_sparse.shard.pending import PendingStep
from distributed_sparse.shard.shard import Shard

T = TypeVar("T")

HOLD_POLL_S = 0.01


@dataclass(frozen=True)
class Fault:
    """What happens to one rank, once.

    Attributes:
        rank: whom it happens to.
        kind: "kill" (SIGKILL), "stop" (SIGSTOP), "exit" (the process ends in silence), "raise" (RuntimeError), "memory"
            (MemoryError), "collective error" (its collective breaks off), "sleep" (it never goes on, but stays alive), "hold"
            (it goes on once `Faults.release` is called).
        moment: "begin" (its process runs, and has said nothing), "load", "allocate", "warm up" (inside a collective), and of
            steps "before", "collective" (others are inside one that this rank does not join) and "after" (it is not answered).
        position: of steps: the first that computes a token at this position ...
        part: ... by "prefill" or by "decode" ...
        generation: ... so many rebuilds after the fault was armed.
        nth_collective: of the moment "collective" or "warm up": which all-reduce of the step, 0 the first.
    """

    rank: int
    kind: str
    moment: str
    position: int = -1
    part: str = "decode"
    generation: int = 0
    nth_collective: int = 3

    def is_due_in(self, plan: StepPlan) -> bool:
        """Whether it is this step that it is about."""
        if plan.generation != self.generation:
            return False
        parts = (part for part in plan.parts if isinstance(part, PrefillChunk) == (self.part == "prefill"))
        return any(part.end - part.num_tokens <= self.position < part.end for part in parts)


@dataclass(frozen=True)
class Faults:
    """The faults of one engine, as files in a folder: armed ones, and those that have fired. Makes its shards (a ShardFactory).

    A test may arm more while the engine runs; every process sees them from its next message on.
    """

    folder: Path

    def arm(self, *faults: Fault, generation: int = 0) -> None:
        """Have them happen; `generation`: the engine's current one, from which a fault counts its own."""
        for fault in faults:
            absolute = replace(fault, generation=generation + fault.generation)
            name = f"{time.monotonic_ns():020d}-{fault.rank}"  # a rank looks at its own alone
            part = self.folder / f"{name}.part"
            part.write_text(json.dumps(asdict(absolute)))
            part.rename(self.folder / f"{name}.armed")

    @property
    def num_armed(self) -> int:
        """How many have not happened yet."""
        return len(list(self.folder.glob("*.armed")))

    @property
    def num_fired(self) -> int:
        """How many have happened."""
        return len([*self.folder.glob("*.fired"), *self.folder.glob("*.released")])

    def disarm(self) -> None:
        """Forget those that have not happened."""
        for file in self.folder.glob("*.armed"):
            file.unlink()

    def release(self) -> None:
        """Let all that is held go on."""
        for file in self.folder.glob("*.fired"):
            file.rename(file.with_suffix(".released"))

    def take(self, rank: int, due: Callable[[Fault], bool]) -> tuple[Fault, Path] | None:
        """The first armed fault of a rank that is due; from here on it counts as fired."""
        for file in sorted(self.folder.glob(f"*-{rank}.armed")):
            fault = Fault(**json.loads(file.read_text()))
            if due(fault):
                fired = file.with_suffix(".fired")
                file.rename(fired)
                return fault, fired
        return None

    def run(self, arguments: ShardArguments) -> None:
        """`run_shard`, for a process that may end before it says its first word."""
        happen(self.take(arguments.rank, lambda fault: fault.moment == "begin"))
        run_shard(arguments)

    def __call__(self, config: EngineConfig, rank: int, world_size: int, collectives: Collectives) -> FaultyShard:
        return FaultyShard(self, Shard(config, rank, world_size, collectives))


class FaultyShard:
    """A `Shard`, and what `faults` holds for its rank."""

    def __init__(self, faults: Faults, shard: Shard) -> None:
        self.faults = faults
        self.shard = shard
        self.rank = shard.spec.rank
        self._all_reduce = shard.collectives.all_reduce
        self._in_collective: tuple[Fault, Path] | None = None
        self._calls = 0
        shard.collectives.all_reduce = self._faulty_all_reduce  # type: ignore[method-assign]

    def load(self) -> Loaded:
        self._happen(lambda fault: fault.moment == "load")
        return self.shard.load()

    def allocate(self, num_pages: int) -> Ready:
        self._happen(lambda fault: fault.moment == "allocate")
        return self._with_collectives(lambda fault: fault.moment == "warm up", lambda: self.shard.allocate(num_pages))

    def begin(self, plan: StepPlan) -> PendingStep:
        self._happen(lambda fault: fault.moment == "before" and fault.is_due_in(plan))
        result = self._with_collectives(
            lambda fault: fault.moment == "collective" and fault.is_due_in(plan), lambda: self.shard.begin(plan)
        )
        self._happen(lambda fault: fault.moment == "after" and fault.is_due_in(plan))
        return result

    def close(self) -> None:
        self.shard.close()

    def _happen(self, due: Callable[[Fault], bool]) -> None:
        happen(self.faults.take(self.rank, due))

    def _with_collectives(self, due: Callable[[Fault], bool], work: Callable[[], T]) -> T:
        self._in_collective, self._calls = self.faults.take(self.rank, due), 0
        result = work()
        assert self._in_collective is None, "the step had not so many collectives"
        return result

    def _faulty_all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        call, self._calls = self._calls, self._calls + 1
        if self._in_collective is not None and call == self._in_collective[0].nth_collective:
            taken, self._in_collective = self._in_collective, None
            happen(taken)
        return self._all_reduce(x)


def happen(taken: tuple[Fault, Path] | None) -> None:
    """Do to this process what a fault says, if there is one."""
    if taken is None:
        return
    fault, note = taken
    if fault.kind in SIGNALS:
        os.kill(os.getpid(), SIGNALS[fault.kind])
    elif fault.kind == "exit":
        os._exit(0)
    elif fault.kind == "sleep":
        time.sleep(3600)
    elif fault.kind == "hold":
        while note.exists():
            time.sleep(HOLD_POLL_S)
    else:
        raise ERRORS[fault.kind]()


SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
ERRORS: dict[str, Callable[[], Exception]] = {
    "raise": lambda: RuntimeError("the device has met an illegal address"),
    "memory": lambda: MemoryError("no room for the activations"),
    "collective error": lambda: CollectiveError("all_reduce did not complete: Connection reset by peer"),
}
