"""graphs: captures decode steps of a few fixed shapes as CUDA graphs, chooses the shape of each step, replays its graph."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from distributed_sparse.model.transformer import Transformer
from distributed_sparse.protocol.step import StepPlan
from distributed_sparse.selection.base import Policy
from distributed_sparse.shard.attention import SparseAttention
from distributed_sparse.shard.batch import StepLayout, build_layout, make_batch
from distributed_sparse.shard.collectives.collectives import Collectives
from distributed_sparse.shard.inputs import StepInputs
from distributed_sparse.shard.memory import warm_up_plan
from distributed_sparse.shard.slots import SlotTable


class DecodeShape(NamedTuple):
    """Shape of a captured decode step. It alone determines which kernels are launched; all counts are data on the device."""

    num_rows: int
    """Decode rows; a step with fewer is padded."""
    max_context_len: int
    """Tokens of the longest context that the shape serves."""


def buckets(max_num_seqs: int) -> list[int]:
    """Numbers of decode rows that are captured, ascending: 1, 2, 4, then multiples of 8; the last is max_num_seqs."""
    return [rows for rows in (1, 2, 4, *range(8, max_num_seqs, 8)) if rows < max_num_seqs] + [max_num_seqs]


def dense_until(policies: list[Policy], page_size: int, max_model_len: int) -> int:
    """The longest context up to which every context is known to be dense in every layer; 0: there is none."""

    def is_sparse(context_len: int) -> bool:
        return any(policy.config.attended_tokens(context_len, page_size) != context_len for policy in policies)

    return bisect.bisect_left(range(1, max_model_len + 1), True, key=is_sparse)


def why_eager(enforce_eager: bool, policies: list[Policy], method: str) -> str | None:
    """The reason why a GPU's decode steps are not captured; None: they are."""
    if enforce_eager:
        return "enforce_eager is true"
    if not all(policy.graph_safe for policy in policies):
        return f"sparse.method={method!r} reads device values on the host"
    return None


class DecodeShapes:
    """All shapes of an engine: per bucket, one for contexts that are dense in every layer, and one for all contexts.

    Args:
        max_num_seqs: decode rows of the largest step.
        longest_dense: see `dense_until`; 0: no shapes for dense contexts.
        max_model_len: tokens of the longest context.
    """

    def __init__(self, max_num_seqs: int, longest_dense: int, max_model_len: int) -> None:
        self.rows = buckets(max_num_seqs)
        self.context_lens = sorted({length for length in (longest_dense, max_model_len) if length > 0})

    def __iter__(self) -> Iterator[DecodeShape]:
        """All shapes, the largest first: smaller graphs then reuse the memory of the pool."""
        return (DecodeShape(rows, length) for rows in reversed(self.rows) for length in reversed(self.context_lens))

    def __len__(self) -> int:
        return len(self.rows) * len(self.context_lens)

    def of(self, plan: StepPlan) -> DecodeShape | None:
        """The shape that serves a step plan; None if it must run eagerly (prompt chunks, traces, profile)."""
        if not plan.decode or plan.prefill or plan.profile or any(row.trace for row in plan.decode):
            return None
        longest = max(row.end for row in plan.decode)
        rows = self.rows[bisect.bisect_left(self.rows, len(plan.decode))]
        return DecodeShape(rows, self.context_lens[bisect.bisect_left(self.context_lens, longest)])


class HostCounts(NamedTuple):
    """What Python code counts while a step is captured; replaying the graph does not run that code."""

    dense_layers: list[int]
    all_reduce_calls: int
    all_reduce_bytes: int


class DecodeGraphs:
    """Captures one CUDA graph per shape, then replays it for every decode step of the shape.

    All graphs share one memory pool, as no two run at once, and copy their results out of it. They hold the communicator and
    the addresses of slots, cache, counters and inputs: if one of these is replaced, the graphs must be captured anew.

    Args:
        shapes: all shapes.
        model, attention, slots, collectives: of the shard. `prepare` resets the counters of `attention`.
        inputs: holds the step's arrays, at the same addresses in every step if they are uploaded first.
        is_captured: False runs the same padded computation eagerly, without graphs.
    """

    def __init__(
        self,
        shapes: DecodeShapes,
        model: Transformer,
        attention: SparseAttention,
        slots: SlotTable,
        inputs: StepInputs,
        collectives: Collectives,
        is_captured: bool = True,
    ) -> None:
        self.shapes = shapes
        self._model = model
        self._attention = attention
        self._slots = slots
        self._inputs = inputs
        self._collectives = collectives
        self._page_size = attention.geometry.page_size
        self._is_captured = is_captured
        self._graphs: dict[DecodeShape, torch.cuda.CUDAGraph] = {}
        self._counts: dict[DecodeShape, HostCounts] = {}
        most, device = shapes.rows[-1], attention.geometry.device
        self._hidden = torch.empty((most, model.config.hidden_size), dtype=attention.geometry.dtype, device=device)
        self._logits = torch.empty((most, model.config.vocab_size), dtype=torch.float32, device=device)
        self._pool = torch.cuda.graph_pool_handle() if is_captured else None
        self._stream = torch.cuda.Stream(device) if is_captured else None

    def prepare(self, wanted: Iterable[DecodeShape]) -> None:
        """Capture shapes on the null page. Each runs once before its capture: kernels compile, libraries allocate memory."""
        if not self._is_captured:
            return
        arrays = {}
        for shape in wanted:
            plan = warm_up_plan(shape.num_rows, 1, [])  # any context: the shape determines the launches
            self._slots.apply(plan)
            arrays[shape] = build_layout(plan, self._slots, self._page_size, shape.num_rows).arrays
            self._warm_up(shape, self._inputs.upload(arrays[shape]))
        for shape, of_shape in arrays.items():
            self._collectives.reset_counts()
            self._capture(shape, self._inputs.upload(of_shape))
            self._counts[shape] = HostCounts(
                self._attention.dense_layers, self._collectives.all_reduce_calls, self._collectives.all_reduce_bytes
            )
        self._attention.reset()

    def run(self, shape: DecodeShape, layout: StepLayout, views: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Run a step whose inputs have been uploaded, and count it.

        Returns:
            Hidden states [num_rows, D], logits float32 [num_rows, V]; valid until the next step.
        """
        if self._is_captured:
            self._graphs[shape].replay()
            dense_layers, calls, num_bytes = self._counts[shape]
            self._collectives.all_reduce_calls += calls
            self._collectives.all_reduce_bytes += num_bytes
        else:
            self._compute(shape, views)
            dense_layers = self._attention.dense_layers
        self._attention.account(layout.context_lens, shape.max_context_len, dense_layers)
        return self._hidden[: shape.num_rows], self._logits[: shape.num_rows]

    def close(self) -> None:
        """Free the graphs; their memory goes back to torch's allocator."""
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()
        self._attention.forget()  # the last captured batch is in the pool

    def _warm_up(self, shape: DecodeShape, views: Mapping[str, Tensor]) -> None:
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._compute(shape, views)
        torch.cuda.current_stream().wait_stream(self._stream)

    def _capture(self, shape: DecodeShape, views: Mapping[str, Tensor]) -> None:
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads of the process (NCCL's watchdog) may query the device during the capture
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            self._compute(shape, views)
        self._graphs[shape] = graph

    def _compute(self, shape: DecodeShape, views: Mapping[str, Tensor]) -> None:
        """The captured part of a step: from the uploaded inputs to the logits of all rows."""
        layout = StepLayout.of_decode(shape.num_rows, shape.max_context_len)
        batch = make_batch(layout, views, self._slots, self._page_size)
        self._attention.begin(batch)
        hidden = self._model.forward(batch.token_ids, batch.positions, batch.rope_lengths, self._attention)
        self._hidden[: shape.num_rows].copy_(hidden)
        self._logits[: shape.num_rows].copy_(self._model.logits(hidden))


def held_bytes(make: Callable[[], DecodeGraphs], device: torch.device) -> int:
    """Bytes that all graphs will hold on a GPU, extrapolated from those of the largest bucket.

    Args:
        make: creates the `DecodeGraphs` without capturing. No earlier batch may be alive: memory that it frees meanwhile would
            hide as many bytes of the graphs.
    """
    found = 0
    for _ in range(2):  # the first round also loads what all graphs share; only the second one counts
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        free, reserved = torch.cuda.mem_get_info(device)[0], torch.cuda.memory_reserved(device)
        graphs = make()
        shapes = graphs.shapes
        largest = [shape for shape in shapes if shape.num_rows == shapes.rows[-1]]
        graphs.prepare(largest)
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        grown = torch.cuda.memory_reserved(device) - reserved
        found = reserve(grown, free, torch.cuda.mem_get_info(device)[0], len(largest), len(shapes))
        graphs.close()
        del graphs
    return found


def reserve(pool_bytes: int, free_before: int, free_after: int, num_captured: int, num_graphs: int) -> int:
    """Bytes that all graphs will hold, from a measurement of the largest ones.

    The pool counts once, as smaller graphs fit into the memory of the largest ones. What the CUDA driver allocates counts per
    graph.

    Args:
        pool_bytes: growth of torch's reserved memory.
        free_before, free_after: free bytes of the device before and after the capture.
        num_captured: graphs captured in between.
        num_graphs: graphs of all shapes.
    """
    of_graphs = max(free_before - free_after - pool_bytes, 0)
    return pool_bytes + -(-of_graphs * num_graphs // num_captured)
