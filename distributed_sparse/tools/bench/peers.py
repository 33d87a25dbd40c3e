"""peers: computations by other libraries on the same data. Each maker returns a function of an op's arguments.

Makers raise `Unavailable` if a library, a device or the contiguous copy of K and V is missing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from distributed_sparse.tools.bench.failures import caught
from distributed_sparse.tools.bench.layer import Inputs
from distributed_sparse.tools.bench.timing import Unavailable, one_line, time_in_turn

if TYPE_CHECKING:
    from distributed_sparse.tools.bench.ops.base import Shape

WORKSPACE_BYTES = 128 << 20
"""Workspace size in flashinfer's own examples."""

Function = Callable[[dict[str, Any]], Tensor]


def import_peer(name: str) -> Any:
    """Import a library that this project does not depend on.

    Raises:
        Unavailable: it is not installed, or does not load.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:  # a library built for other versions may raise anything
        raise Unavailable(f"{name} is not importable here ({one_line(error)})") from error


def import_flashinfer(device: torch.device) -> Any:
    """flashinfer, whose kernels need a GPU. Raises `Unavailable`."""
    if device.type != "cuda":
        raise Unavailable(f"flashinfer has no kernels for {device.type}")
    return import_peer("flashinfer")


def contiguous(data: Inputs, shape: Shape) -> tuple[Tensor, Tensor]:
    """K and V as [B, H_kv, n, d]. Raises `Unavailable` if they did not fit beside the pages."""
    if data.k.shape[2] != shape.context:
        raise Unavailable("out of memory: no room for contiguous K and V beside the pages")
    return data.k, data.v


# ---- decode


def sdpa_decode(data: Inputs, shape: Shape) -> Function:
    """torch SDPA over contiguous K and V with the query group as query positions, its fastest form for decode."""
    k, v = contiguous(data, shape)
    return lambda arguments: F.scaled_dot_product_attention(
        arguments["q"].unflatten(1, (shape.num_kv_heads, shape.group)), k, v
    )


def flex_decode(data: Inputs, shape: Shape) -> Function:
    """FlexAttention over contiguous K and V, compiled."""
    if shape.device.type != "cuda":
        raise Unavailable(f"FlexAttention is no decode kernel on {shape.device.type}; it is timed on cuda")
    k, v = contiguous(data, shape)
    flex = _compiled_flex(shape)
    return lambda arguments: flex(arguments["q"][:, :, None], k, v, scale=shape.scale, enable_gqa=True)


@lru_cache(maxsize=1)
def _compiled_flex(shape: Shape) -> Any:
    """Compile anew for every shape: after `recompile_limit` shapes torch would run it uncompiled."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)  # fullgraph: raise instead of running uncompiled


def flashinfer_decode(data: Inputs, shape: Shape, use_tensor_cores: bool) -> Function:
    """flashinfer's paged decode over the engine's pages, planned once as an engine does per step.

    Args:
        use_tensor_cores: use the kernel for large query groups instead of the one without tensor cores.
    """
    flashinfer = import_flashinfer(shape.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(_workspace(shape.device), "HND", use_tensor_cores=use_tensor_cores)
    indptr, indices = _page_lists(data, shape)
    sizes = (shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.page_size)
    wrapper.plan(
        indptr, indices, data.batch.last_page_len, *sizes,
        q_data_type=shape.dtype, kv_data_type=shape.dtype, sm_scale=shape.scale,
    )  # fmt: skip
    return lambda arguments: wrapper.run(arguments["q"], (data.cache.k_pages, data.cache.v_pages))


def tensor_cores_are_faster(data: Inputs, shape: Shape) -> bool:
    """Whether flashinfer's tensor-core decode kernel is the faster one; a kernel may not support the sizes.

    Raises:
        Unavailable: no kernel supports the sizes, or flashinfer is not installed.
    """
    functions: dict[str, Function] = {}
    for name, use_tensor_cores in (("cuda", False), ("tensor", True)):
        with caught("flashinfer", is_peer=True) as failed:
            function = flashinfer_decode(data, shape, use_tensor_cores)
            function({"q": data.q})
            functions[name] = function
    if not functions:
        raise Unavailable(failed["unavailable"])
    calls = {name: partial(_call, function, {"q": data.q}) for name, function in functions.items()}
    times = time_in_turn(calls, repeats=7, device=shape.device, rotation=1)
    return min(times, key=lambda name: times[name].median) == "tensor"


def _call(function: Function, arguments: dict[str, Any], number: int) -> Tensor:
    return function(arguments)


# ---- prefill


def sdpa_prefill(data: Inputs, shape: Shape) -> Function:
    """torch SDPA over contiguous K and V repeated for all query heads, with a mask aligned to the lower right."""
    k, v = (x[:1].repeat_interleave(shape.group, dim=1) for x in contiguous(data, shape))  # enable_gqa is slow on CPUs
    whole = shape.prefill_tokens == shape.context
    mask = None if whole else causal_lower_right(shape.prefill_tokens, shape.context)

    def run(arguments: dict[str, Any]) -> Tensor:
        q = arguments["q"].transpose(0, 1)[None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=whole)  # type: ignore[arg-type]
        return out[0].transpose(0, 1)

    return run


def flashinfer_prefill(data: Inputs, shape: Shape) -> Function:
    """flashinfer's paged prefill over the engine's pages."""
    flashinfer = import_flashinfer(shape.device)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(shape.device), "HND")
    queries = torch.tensor([0, shape.prefill_tokens], dtype=torch.int32, device=shape.device)
    indptr, indices = _page_lists(data, shape, batch=1)
    sizes = (shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.page_size)
    wrapper.plan(
        queries, indptr, indices, data.batch.last_page_len[:1], *sizes,
        causal=True, q_data_type=shape.dtype, kv_data_type=shape.dtype, sm_scale=shape.scale,
    )  # fmt: skip
    return lambda arguments: wrapper.run(arguments["q"], (data.cache.k_pages, data.cache.v_pages))


# ---- top-k


def torch_topk(shape: Shape) -> Callable[[dict[str, Any]], Tensor]:
    """torch's top-k over the scores: indices only, without forced pages, ascending order or physical ids."""
    return lambda arguments: arguments["scores"].topk(shape.budget_pages, dim=-1).indices


def flashinfer_topk(shape: Shape) -> Callable[[dict[str, Any]], Tensor]:
    """`torch_topk` by flashinfer's radix select."""
    flashinfer = import_flashinfer(shape.device)
    if not hasattr(flashinfer, "top_k"):
        raise Unavailable(f"flashinfer {getattr(flashinfer, '__version__', '')} has no top_k")

    def run(arguments: dict[str, Any]) -> Tensor:
        scores = arguments["scores"]
        return flashinfer.top_k(scores.flatten(0, 1), shape.budget_pages)[1].unflatten(0, scores.shape[:2])

    return run


def _workspace(device: torch.device) -> Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _page_lists(data: Inputs, shape: Shape, batch: int | None = None) -> tuple[Tensor, Tensor]:
    """Whole page tables for flashinfer: indptr int32 [B + 1], indices int32 [B * P]."""
    batch = shape.batch if batch is None else batch
    indptr = torch.arange(batch + 1, dtype=torch.int32, device=shape.device) * shape.pages
    return indptr, data.batch.page_table[:batch].flatten()
