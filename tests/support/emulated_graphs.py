"""CUDA graphs on a CPU, for the Triton path in the interpreter: what was captured is run again, op by op, in place.

As on a GPU, a replay runs no line of Python of the captured function: what the host computed while it was captured, sizes,
scalars, and which kernels are launched, stays what it was. Unlike there, capturing computes, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from tests.support.aten_ops import OpRecorder, computes, new_tensors, tensors_in


class Tape(OpRecorder):
    """Notes every op and every Triton launch as something that can be done again."""

    def __init__(self) -> None:
        super().__init__()
        self.actions: list[Callable[[], Any]] = []

    def note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if not computes(func, args, kwargs, out):
            return
        made, own = tensors_in(out), new_tensors(args, kwargs, out)
        assert made, f"{func} gives the host something that a replay would not renew"

        def again() -> None:
            anew = tensors_in(func(*args, **kwargs))
            for place in own:
                made[place].copy_(anew[place])

        self.actions.append(again)


class EmulatedGraph:
    """Stands for `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.actions: list[Callable[[], Any]] = []

    def replay(self) -> None:
        assert self.actions, "nothing was captured, or it was reset"
        for action in self.actions:
            action()

    def reset(self) -> None:
        self.actions.clear()


class Nowhere:
    """Stands for a stream, or a pool: on a CPU there is one order."""

    def __init__(self, *_: Any) -> None: ...

    def wait_stream(self, other: Nowhere) -> None: ...


@contextmanager
def emulated_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, `torch.cuda`'s graphs are emulated. Ops must run by Triton in the interpreter: torch's own read on the host."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__
    tapes: list[Tape] = []

    @contextmanager
    def capture(graph: EmulatedGraph, *_: Any, **__: Any) -> Iterator[None]:
        tapes.append(Tape())
        with tapes[-1]:
            yield
        graph.actions = tapes.pop().actions

    def noted_launch(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        if not tapes:
            launch(self, *args, **kwargs)
            return
        tape = tapes[-1]
        tape.actions.append(lambda: launch(self, *args, **kwargs))
        tape.is_paused = True
        try:
            launch(self, *args, **kwargs)
        finally:
            tape.is_paused = False

    with monkeypatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", noted_launch)
        patch.setattr(torch.cuda, "CUDAGraph", EmulatedGraph)
        patch.setattr(torch.cuda, "graph", capture)
        patch.setattr(torch.cuda, "stream", nullcontext)
        for name in ("Stream", "current_stream", "graph_pool_handle"):
            patch.setattr(torch.cuda, name, Nowhere)
        yield
