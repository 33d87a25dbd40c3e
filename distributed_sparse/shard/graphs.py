"""graphs: decode steps at a few fixed shapes, captured as CUDA graphs; and which shape a step takes, decided on the host."""

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
    """A shape that decode steps run at. Nothing else of a step changes what is launched: counts are data."""

    num_rows: int
    """Sequences; a step of fewer is padded."""
    max_context_len: int
    """Tokens of the longest context that it serves."""


def buckets(max_num_seqs: int) -> list[int]:
    """Numbers of rows that decode steps are padded to, ascending: 1, 2, 4, 8, then every eighth; the last one fits all."""
    return [rows for rows in (1, 2, 4, *range(8, max_num_seqs, 8)) if rows < max_num_seqs] + [max_num_seqs]


def dense_until(policies: list[Policy], page_size: int, max_model_len: int) -> int:
    """The longest context that the host knows to be dense in every layer, and every shorter one with it; 0: none is."""

    def is_sparse(context_len: int) -> bool:
        return any(policy.config.attended_tokens(context_len, page_size) != context_len for policy in policies)

    return bisect.bisect_left(range(1, max_model_len + 1), True, key=is_sparse)


def why_eager(enforce_eager: bool, policies: list[Policy], method: str) -> str | None:
    """Why a GPU's decode steps are not captured; None: they are."""
    if enforce_eager:
        return "enforce_eager is true"
    if not all(policy.graph_safe for policy in policies):
        return f"sparse.method={method!r} reads what the device computed on the host"
    return None


class DecodeShapes:
    """The shapes of an engine: per bucket one for contexts that are dense in every layer, and one that the device decides.

    Args:
        max_num_seqs: rows of the largest step.
        longest_dense: as of `dense_until`; 0: there is no set for it.
        max_model_len: tokens of the longest context.
    """

    def __init__(self, max_num_seqs: int, longest_dense: int, max_model_len: int) -> None:
        self.rows = buckets(max_num_seqs)
        self.context_lens = sorted({length for length in (longest_dense, max_model_len) if length > 0})

    def __iter__(self) -> Iterator[DecodeShape]:
        """All of them, the largest first: smaller ones find room in the memory that it has left behind."""
        return (DecodeShape(rows, length) for rows in reversed(self.rows) for length in reversed(self.context_lens))

    def __len__(self) -> int:
        return len(self.rows) * len(self.context_lens)

    def of(self, plan: StepPlan) -> DecodeShape | None:
        """The shape that serves a step; None: only the step's own does (prompt tokens, traces, times of its parts)."""
        if not plan.decode or plan.prefill or plan.profile or any(row.trace for row in plan.decode):
            return None
        longest = max(row.end for row in plan.decode)
        rows = self.rows[bisect.bisect_left(self.rows, len(plan.decode))]
        return DecodeShape(rows, self.context_lens[bisect.bisect_left(self.context_lens, longest)])


class HostCounts(NamedTuple):
    """What the host counts in a step while it queues it, and would miss where a captured step is replayed."""

    dense_layers: list[int]
    all_reduce_calls: int
    all_reduce_bytes: int


class DecodeGraphs:
    """Runs decode steps at their shapes: captured once each, then replayed.

    All graphs share one memory pool, since no two of them run at once, and copy their results out of it. They hold the ranks'
    communicator and the addresses of slots, cache, counters and inputs: where one of these is made anew, so are they.

    Args:
        shapes: what steps run at.
        model, attention, slots, collectives: what a step is computed with. `attention` counts from zero after `prepare`.
        inputs: where the step's arrays are uploaded to, at the same addresses whenever they come first.
        is_captured: False captures nothing and computes each step anew: the same numbers at no gain.
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
        """Capture shapes on the null page. Each has been run once before: kernels are compiled, libraries have their memory."""
        if not self._is_captured:
            return
        arrays = {}
        for shape in wanted:
            plan = warm_up_plan(shape.num_rows, 1, [])  # what is launched is told by the shape alone
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
            hidden states [num_rows, D], logits float32 [num_rows, V]; valid until the next step.
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
        """Give back the graphs, and their memory to torch's allocator."""
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()
        self._attention.forget()  # the batch of the last capture lies in the pool

    def _warm_up(self, shape: DecodeShape, views: Mapping[str, Tensor]) -> None:
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._compute(shape, views)
        torch.cuda.current_stream().wait_stream(self._stream)

    def _capture(self, shape: DecodeShape, views: Mapping[str, Tensor]) -> None:
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads of the process (NCCL's watchdog) may ask the device meanwhile
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            self._compute(shape, views)
        self._graphs[shape] = graph

    def _compute(self, shape: DecodeShape, views: Mapping[str, Tensor]) -> None:
        """What is captured: a decode step from its inputs to the logits of all rows."""
        layout = StepLayout.of_decode(shape.num_rows, shape.max_context_len)
        batch = make_batch(layout, views, self._slots, self._page_size)
        self._attention.begin(batch)
        hidden = self._model.forward(batch.token_ids, batch.positions, batch.rope_lengths, self._attention)
        self._hidden[: shape.num_rows].copy_(hidden)
        self._logits[: shape.num_rows].copy_(self._model.logits(hidden))


def held_bytes(make: Callable[[], DecodeGraphs], device: torch.device) -> int:
    """Bytes that all graphs will hold on a GPU, told from those of the largest bucket.

    Args:
        make: makes them, with nothing captured yet. No batch may be left from before: what goes meanwhile would hide as much.
    """
    found = 0
    for _ in range(2):  # the first time what all graphs share is loaded
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
    """Bytes that all graphs will take, after the largest ones have been captured.

    The pool is theirs once, as smaller graphs run in what the largest ones need; what the driver keeps of a graph, each has
    of its own.

    Args:
        pool_bytes: by which torch's reserved memory has grown.
        free_before, free_after: free bytes of the device.
        num_captured: graphs between the two.
        num_graphs: of all shapes.
    """
    of_graphs = max(free_before - free_after - pool_bytes, 0)
    return pool_bytes + -(-of_graphs * num_graphs // num_captured)
