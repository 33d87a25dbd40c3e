"""dispatch: route a call of an op to its implementation: Triton on a GPU, C++ or torch on a CPU."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, ParamSpec, TypeVar, overload

from torch import Tensor

from distributed_sparse.kernels import native

P = ParamSpec("P")
R = TypeVar("R")


@overload
def op(contract: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def op(*, native: Callable[[Tensor], bool]) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def op(contract: Any = None, /, *, native: Callable[[Tensor], bool] = native.serves) -> Any:
    """Declare an op: decorates a function with the op's signature and docstring and an empty body.

    The op ``attend`` in ``attend.py`` is implemented by ``attend_torch`` in ``attend_torch.py``, ``attend_triton`` in
    ``attend_triton.py`` and, if the op has C++ code, ``attend_native`` in ``attend_native.py``. The first tensor argument
    selects the implementation: Triton for a CUDA tensor, C++ if ``native`` returns True, torch otherwise. Implementation
    modules are imported on first use, so a CPU process never imports Triton.

    Args:
        native: predicate on the first tensor: can the C++ code take it? `native.serves` by default.
    """
    if contract is None:
        return functools.partial(_dispatched, serves=native)
    return _dispatched(contract, native)


def _dispatched(contract: Callable[P, R], serves: Callable[[Tensor], bool]) -> Callable[P, R]:
    name, first_parameter = contract.__name__, next(iter(inspect.signature(contract).parameters))

    @functools.cache
    def module(kind: str) -> ModuleType | None:
        path = f"{contract.__module__}_{kind}"
        try:
            return importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name != path:
                raise
            return None

    @functools.wraps(contract)
    def call(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else kwargs[first_parameter]
        while isinstance(first, tuple):
            first = first[0]
        function = None
        if first.is_cuda:
            function = getattr(module("triton"), f"{name}_triton", None)
            if function is None:
                raise NotImplementedError(f"{name} has no CUDA implementation; run it on a CPU")
        elif serves(first):
            function = getattr(module("native"), f"{name}_native", None)
        if function is None:
            function = vars(module("torch"))[f"{name}_torch"]
        return function(*args, **kwargs)

    return call
