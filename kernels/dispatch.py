"""dispatch: sends a call of an op to its implementation: Triton on a GPU, C++ or torch on a CPU."""

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
    """Decorate the signature and docstring of an op; its body is empty.

    ``attend`` of ``attend.py`` is implemented by ``attend_torch`` of ``attend_torch.py``, ``attend_triton`` of
    ``attend_triton.py`` and, where an op has C++ code, ``attend_native`` of ``attend_native.py``. Its first tensor decides:
    Triton on CUDA; C++ where ``native`` says so; torch otherwise. Modules are imported when first used, so a CPU never imports
    Triton.

    Args:
        native: whether the C++ code takes a tensor; `native.serves` by default.
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
