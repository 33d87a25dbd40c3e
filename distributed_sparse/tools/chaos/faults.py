"""faults: the kinds of faults that a soak injects into shards, their order, and the injector."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from distributed_sparse.tools.chaos.processes import SHARD, marked_processes

if TYPE_CHECKING:
    from distributed_sparse.llm import LLM

T = TypeVar("T")

KINDS = {
    "kill": "SIGKILL of one shard",
    "kill_all": "SIGKILL of all",
    "stop": "SIGSTOP of one: it hangs",
    "node": "the node of one is removed, and another added later",
}
DURING_RECOVERY = ("kill", "kill_all")
"""Kinds that are also injected while the engine recovers from another fault."""


class Nodes(Protocol):
    """The cluster nodes that shards run on."""

    def remove(self, node_id: str) -> None:
        """Kill a node and all of its processes."""

    def add(self) -> None:
        """Add a node; return when it is up."""


@dataclass(frozen=True)
class Fault:
    """One fault that was injected."""

    kind: str
    at: float
    """Seconds since the epoch."""
    during_recovery: bool
    target: str
    """The killed or stopped processes, or the removed node, for people to read."""


def parse_kinds(text: str) -> tuple[str, ...]:
    """Parse a list such as "kill,stop".

    Raises:
        ValueError: an unknown kind, or none.
    """
    kinds = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"--faults {text!r} names {', '.join(unknown) or 'no fault'}; choose from {','.join(KINDS)}")
    return kinds


def in_turns(choices: Sequence[T], rng: random.Random) -> Iterator[T]:
    """Yield the choices in random order, each once per round, without end; so a short soak covers all of them."""
    while True:
        yield from rng.sample(choices, len(choices))


class Injector:
    """Injects faults into one engine, whose processes carry `mark` (see `processes`)."""

    def __init__(self, llm: LLM, nodes: Nodes | None, mark: str, rng: random.Random) -> None:
        self._llm = llm
        self._nodes = nodes
        self._mark = mark
        self._rng = rng

    def inject(self, kind: str, during_recovery: bool = False) -> Fault | None:
        """Inject one fault; None if no shard is running, as may happen briefly during a recovery."""
        if kind == "node":
            return self._remove_node(during_recovery)
        pids = sorted(marked_processes(self._mark, (SHARD,)))  # stats()["ranks"] lacks shards that are still starting
        if not pids:
            return None
        if kind != "kill_all":
            pids = [self._rng.choice(pids)]
        at = time.time()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP if kind == "stop" else signal.SIGKILL)
        return Fault(kind, at, during_recovery, f"pid {', '.join(map(str, pids))}")

    def _remove_node(self, during_recovery: bool) -> Fault:
        assert self._nodes is not None
        ranks = self._llm.stats()["ranks"]
        node_id = self._rng.choice(sorted({rank["node_id"] for rank in ranks}))
        at = time.time()
        for rank in ranks:
            if rank["node_id"] == node_id:  # at once, as in a power cut, not when they miss their raylet
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank["pid"], signal.SIGKILL)
        self._nodes.remove(node_id)
        return Fault("node", at, during_recovery, f"node {node_id[:8]}")
