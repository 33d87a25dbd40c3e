"""OpRecorder, recorded_ops: the aten ops that run inside a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALLOCATES = ("empty", "new_empty", "empty_like", "empty_strided")


class OpRecorder(TorchDispatchMode):
    """Notes ops as they have run.

    Attributes:
        names: "aten.copy_.default" and the like, in order.
        is_paused: what is dispatched meanwhile is not noted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.is_paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.is_paused:
            self.note(func, args, kwargs or {}, out)
        return out

    def note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """One op that has run."""
        self.names.append(str(func))


@contextmanager
def recorded_ops() -> Iterator[list[str]]:
    """The names of what runs inside."""
    recorder = OpRecorder()
    with recorder:
        yield recorder.names


def new_tensors(args: Any, kwargs: Any, out: Any) -> list[int]:
    """Of an op's output tensors, flattened, those that lie in memory that none of its inputs lies in."""
    given = {storage_of(leaf) for leaf in tensors_in((args, kwargs))}
    return [place for place, leaf in enumerate(tensors_in(out)) if storage_of(leaf) not in given]


def computes(func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Whether an op writes anything, into new memory or in place. (What its schema calls a view may copy: reshape, to.)"""
    if func.overloadpacket.__name__ in ALLOCATES:
        return False
    return func._schema.is_mutable or bool(new_tensors(args, kwargs, out))


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
