"""graphs: decode steps at a few fixed shapes, captured as CUDA graphs; and which shape a step takes, decided on the host."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from distributed_sparse.driver.messages import StepPlan
from distributed_sparse.selection.base import Policy


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


Forward = Callable[[DecodeShape, Mapping[str, Tensor]], tuple[Tensor, Tensor]]
"""forward(shape, views of the step's inputs) -> hidden states [num_rows, D], logits float32 [num_rows, V]."""


class DecodeGraphs:
    """Runs decode steps at their shapes: captured once each, then replayed; or, without capture, by the same function.

    All graphs share one memory pool, since no two of them run at once, and copy their results out of it.

    Args:
        shapes: what is captured.
        forward: what a step computes. It reads its inputs at the addresses that `capture` was given.
        hidden: [max_num_seqs, D], logits: float32 [max_num_seqs, V]: where every step's results are put.
        is_captured: False runs `forward` anew in every step, for tests on a CPU.
    """

    def __init__(
        self, shapes: DecodeShapes, forward: Forward, hidden: Tensor, logits: Tensor, is_captured: bool = True
    ) -> None:
        self.shapes = shapes
        self._forward = forward
        self._hidden, self._logits = hidden, logits
        self._is_captured = is_captured
        self._graphs: dict[DecodeShape, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if is_captured else None
        self._stream = torch.cuda.Stream(hidden.device) if is_captured else None

    def warm_up(self, shape: DecodeShape, views: Mapping[str, Tensor]) -> None:
        """Run a shape once as it will be captured, so that its kernels are compiled and its libraries have their memory."""
        if self._stream is None:
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._compute(shape, views)
        torch.cuda.current_stream().wait_stream(self._stream)

    def capture(self, shape: DecodeShape, views: Mapping[str, Tensor]) -> None:
        """Capture a shape that has been warmed up. Nothing is computed."""
        if not self._is_captured:
            return
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads of the process (NCCL's watchdog) may ask the device meanwhile
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            self._compute(shape, views)
        self._graphs[shape] = graph

    def run(self, shape: DecodeShape, views: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Run a step whose inputs have been uploaded.

        Returns:
            hidden states [num_rows, D], logits float32 [num_rows, V]; valid until the next step.
        """
        if self._is_captured:
            self._graphs[shape].replay()
        else:
            self._compute(shape, views)
        return self._hidden[: shape.num_rows], self._logits[: shape.num_rows]

    def close(self) -> None:
        """Give back the graphs, and their memory to torch's allocator."""
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()

    def _compute(self, shape: DecodeShape, views: Mapping[str, Tensor]) -> None:
        hidden, logits = self._forward(shape, views)
        self._hidden[: shape.num_rows].copy_(hidden)
        self._logits[: shape.num_rows].copy_(logits)


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
