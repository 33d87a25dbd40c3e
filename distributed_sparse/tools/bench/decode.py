"""decode: the whole engine's time per output token over a filled cache, beside transformers and the limit by bytes.

No prompt is computed; the cache is filled with random keys and values (`synthetic`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch

from distributed_sparse.model.sharding import ShardSpec, tensor_slices
from distributed_sparse.tools.bench.contestants import Contestant, Engine, Round, Task, Transformers, Vllm
from distributed_sparse.tools.bench.failures import caught
from distributed_sparse.tools.bench.flashinfer_dense import METHOD as FLASHINFER
from distributed_sparse.tools.bench.layer import LayerSettings, make_inputs
from distributed_sparse.tools.bench.models import ATTENTION_HEAVY, BenchModel, bench_model
from distributed_sparse.tools.bench.ops.base import Shape
from distributed_sparse.tools.bench.peers import import_flashinfer, tensor_cores_are_faster
from distributed_sparse.tools.bench.synthetic import FILL_FROM
from distributed_sparse.tools.bench.timing import (
    Times,
    Unavailable,
    available_bytes,
    check_memory,
    read_bandwidth,
    torch_threads,
)
from distributed_sparse.tools.bench.transformers_peer import TransformersDecode, Truth
from distributed_sparse.tools.planner.plan import sparse_sections
from distributed_sparse.utils.validation import check_choice

PEERS = ("transformers", "flashinfer", "vllm")

OUTPUT_LEN = {"cpu": 16, "cuda": 256}
"""Tokens of a round."""

MEMORY_SHARE = 0.85
"""Contestants are open together if they take at most this share of free memory."""


@dataclass(frozen=True)
class DecodeSettings:
    """The grid and the contestants. `tensor_parallel_size` applies to this engine alone; transformers has one process."""

    model: str = ATTENTION_HEAVY
    context: tuple[int, ...] = (32768,)
    batch: tuple[int, ...] = (1,)
    method: tuple[str, ...] = ("dense", "quest")
    tensor_parallel_size: tuple[int, ...] = (1,)
    peer: tuple[str, ...] = ("transformers",)
    set: tuple[str, ...] = ()
    """Overrides for all sparse methods: "sparse.token_budget=1024"."""
    dtype: str = "auto"
    device: str = "cpu"
    threads: int | None = None
    """torch threads of each rank and of transformers; None: all cores for one process, equal shares for several."""
    page_size: int = 16
    rounds: int = 3
    output_len: int | None = None
    """Tokens that each sequence generates in a round; None: 16 on a CPU, 256 on a GPU."""
    warm_up_s: float = 0.3
    ttft: tuple[int, ...] = ()
    """Also measure the time to first token of prompts of so many tokens, which are computed."""
    max_num_batched_tokens: int = 2048
    """For engines whose time to first token is measured."""

    def __post_init__(self) -> None:
        for name in self.peer:
            check_choice("--peer", name, PEERS)
        if self.output_len is None:
            object.__setattr__(self, "output_len", OUTPUT_LEN[check_choice("--device", self.device, list(OUTPUT_LEN))])
        assert self.output_len is not None
        for name, least in (("output_len", 4), ("rounds", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is below {least}; give {least} or more")
        shortest = max(2 * self.output_len + 2, FILL_FROM + self.output_len // 2)
        for context in self.context:
            if context < shortest:
                raise ValueError(
                    f"--context {context} is too short for --output-len {self.output_len}: a filled prompt has "
                    f"{FILL_FROM} tokens or more and is half a round shorter than the context; give {shortest} or more"
                )

    def sections(self) -> dict[str, dict[str, Any]]:
        return sparse_sections(self.method, self.set)


def bench_decode(
    settings: DecodeSettings, on_row: Callable[[dict[str, Any]], object] = lambda row: None
) -> list[dict[str, Any]]:
    """Time every method at every point of the grid. All contestants of a point take turns.

    Args:
        on_row: called with each row as soon as its point is done.

    Returns:
        Rows of "contestant", "tensor_parallel_size", "context", "batch", and either

        - "tpot_ms" (median over the steps of all rounds, without warm-up) with "p10_ms" and "p90_ms"; "MB_per_step" (of one
          rank: weights, and attention by the engine's own counters); "bytes_ms" (their time at the read bandwidth measured in
          this run; on a CPU the ranks share it); "over_bytes" (tpot over it); "speedup_over_dense" (median of the rounds'
          ratios to dense at the same tensor_parallel_size) and "bytes_limit" (the same ratio of the bytes);
          "speedup_over_transformers" (its faster cache), "speedup_over_one_rank", "in_turns" and "checked"; or
        - "unavailable" with the reason; or
        - "wrong" with the difference, or with the failure of an engine of this project.
    """
    sections = settings.sections()
    rows: list[dict[str, Any]] = []
    num_ranks = max(settings.tensor_parallel_size)
    with benchmarked(settings.model, settings.dtype, settings.device, settings.threads, num_ranks) as (model, threads):
        bandwidths = _bandwidths(settings, model.device, threads)
        truth, unchecked = _truth(model)
        for context, batch in product(settings.context, settings.batch):
            assert settings.output_len is not None
            task = Task(
                model, context, batch,
                settings.output_len, settings.warm_up_s, settings.page_size, settings.threads,
            )  # fmt: skip
            contestants, absent = _contestants(task, settings, sections, truth, unchecked)
            point = Point(contestants, settings.rounds)
            point.run(truth)
            again = _bandwidths(settings, model.device, threads)  # load can only lower a measurement: keep the higher one
            bandwidths = {ranks: max(found, again[ranks]) for ranks, found in bandwidths.items()}
            of_point = [*point.rows(bandwidths, unchecked), *absent]
            for row in of_point:
                row |= {"context": context, "batch": batch, "dtype": model.dtype_name}
                on_row(row)
            rows += of_point
    return rows


@contextmanager
def benchmarked(model: str, dtype: str, device: str, threads: int | None, num_ranks: int) -> Iterator[tuple[BenchModel, int]]:
    """The model and the torch threads of a benchmark, with one Ray for all of its engines (none for a single rank)."""
    with ExitStack() as opened:
        found = opened.enter_context(bench_model(model, dtype, device))
        count = opened.enter_context(torch_threads(threads))
        if num_ranks > 1:
            from distributed_sparse.ray_backend.session import ensure_ray

            opened.callback(ensure_ray(num_ranks).release)
        yield found, count


def _bandwidths(settings: DecodeSettings, device: torch.device, threads: int) -> dict[int, float]:
    """Read bandwidth per rank, by number of ranks. On a CPU, that of all ranks' threads together over the ranks."""
    if device.type != "cpu":
        return dict.fromkeys({1, *settings.tensor_parallel_size}, read_bandwidth(device))
    found = {}
    for ranks in {1, *settings.tensor_parallel_size}:
        each = settings.threads or max(1, threads // ranks)
        with torch_threads(each * ranks):
            found[ranks] = read_bandwidth(device) / ranks
    return found


def _truth(model: BenchModel) -> tuple[Truth | None, str | None]:
    """transformers with the engine's weights, or the reason why it is unavailable."""
    slices = tensor_slices(model.config, ShardSpec(0, 1)).values()
    num_bytes = sum(part.num_read for part in slices) * model.dtype.itemsize
    with caught("transformers", is_peer=True) as failed:
        check_memory("transformers' model", num_bytes, model.device)
        return Truth(model), None
    return None, failed["unavailable"]


def _contestants(
    task: Task, settings: DecodeSettings, sections: dict[str, dict[str, Any]], truth: Truth | None, unchecked: str | None
) -> tuple[list[Contestant], list[dict[str, Any]]]:
    """The contestants, and rows of peers that are unavailable."""
    sizes = settings.tensor_parallel_size
    found: list[Contestant] = [Engine(task, name, sections[name], size, truth) for name, size in product(sections, sizes)]
    absent: list[dict[str, Any]] = []
    for peer in settings.peer:
        with caught(peer, is_peer=True) as failed:
            if peer == "flashinfer":
                found += [one for size in sizes for one in _flashinfer(task, size, truth)]
            elif peer == "vllm":
                found.append(Vllm(task))
            elif truth is None:
                raise Unavailable(unchecked or "")
            else:
                shared: dict[str, TransformersDecode] = {}
                found += [Transformers(task, kind, truth, shared) for kind in ("static", "dynamic")]
        if failed:
            absent.append({"contestant": peer, "tensor_parallel_size": 1, **failed})
    return found, absent


def _flashinfer(task: Task, size: int, truth: Truth | None) -> list[Contestant]:
    """The engine with the faster of flashinfer's kernels, and this engine's dense attention, both without CUDA graphs.

    flashinfer plans on the host, so that its steps cannot be captured.

    Raises:
        Unavailable: flashinfer is not installed or not on this device.
    """
    import_flashinfer(task.device)
    use_tensor_cores = _tensor_cores_are_faster(task, size)
    name = f"dense by flashinfer/{'tensor' if use_tensor_cores else 'cuda'} cores"
    sparse = {"method": FLASHINFER, "dense_layers": 0, "use_tensor_cores": use_tensor_cores}
    return [
        Engine(task, name, sparse, size, truth, is_peer=True),
        Engine(task, "dense eager", {"method": "dense"}, size, truth, enforce_eager=True),
    ]


@torch.inference_mode()
def _tensor_cores_are_faster(task: Task, size: int) -> bool:
    """Whether flashinfer's tensor-core kernel is the faster one for a layer of one rank at the task's batch and context."""
    geometry = replace(task.engine(None, size).rank.geometry, device=task.device)
    shape = Shape(
        context=task.context,
        batch=task.batch,
        token_budget=task.context,
        page_size=task.page_size,
        num_heads=geometry.num_kv_heads * geometry.group_size,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        prefill_tokens=0,
        dtype=task.model.dtype,
        device=task.device,
    )
    layer = LayerSettings.of(geometry, task.context, task.batch)
    return tensor_cores_are_faster(make_inputs(layer, geometry, (), seed=0, contiguous=False), shape)


class Point:
    """One context and batch: the contestants, their rounds, and their failures."""

    def __init__(self, contestants: list[Contestant], num_rounds: int) -> None:
        self.contestants = contestants
        self.num_rounds = num_rounds
        self.rounds: dict[str, list[Round]] = {one.key: [] for one in contestants}
        self.failed: dict[str, dict[str, str]] = {}
        self.in_turns = True

    def run(self, truth: Truth | None) -> None:
        """Run all in turns; if they do not fit together, or each rank needs its own GPU, one contestant after the other."""
        together = [one for one in self.contestants if not one.alone]
        apart = [one for one in self.contestants if one.alone]
        device = self.contestants[0].task.device
        one_gpu_each = device.type == "cuda" and any(one.tensor_parallel_size > 1 for one in together)
        loaded = any(isinstance(one, Transformers) for one in together)
        needed = sum(one.num_bytes for one in together)
        if one_gpu_each or needed > MEMORY_SHARE * available_bytes(device):
            self.in_turns, together, apart = False, [], [*self.contestants]
        if truth is not None and not (loaded and self.in_turns):
            truth.drop()
        if together:
            self.take_turns(together)
        if apart and truth is not None:
            truth.drop()  # a contestant that runs alone gets the whole memory
        for one in _grouped(apart):
            self.take_turns(one)
            if truth is not None:
                truth.drop()

    def take_turns(self, contestants: Sequence[Contestant]) -> None:
        """Open these contestants, run all rounds in turns, and close them; a failed one takes no further part."""
        with ExitStack() as opened:
            running = []
            for one in contestants:
                opened.callback(self._close, one)
                with self._may_fail(one):
                    one.open()
                    running.append(one)
            for _ in range(self.num_rounds):
                for one in running:
                    if one.key not in self.failed:
                        with self._may_fail(one):
                            self.rounds[one.key].append(one.round())
            for one in running:
                with self._may_fail(one):
                    self.failed |= {key: {"wrong": why} for key, why in one.judge(self.rounds).items()}

    def _close(self, one: Contestant) -> None:
        with self._may_fail(one):
            one.close()

    @contextmanager
    def _may_fail(self, one: Contestant) -> Iterator[None]:
        """Keep a contestant's first failure; the others go on."""
        with caught(one.name, one.is_peer) as failed:
            yield
        if failed:
            self.failed.setdefault(one.key, failed)

    def rows(self, bandwidths: dict[int, float], unchecked: str | None) -> list[dict[str, Any]]:
        """One row per contestant."""
        done = {one.key: one for one in self.contestants if self.rounds[one.key] and one.key not in self.failed}
        best = min(
            (name for name, one in done.items() if isinstance(one, Transformers)),
            key=lambda name: float(np.median([own.median for own in self.rounds[name]])),
            default=None,
        )
        rows = []
        for one in self.contestants:
            key, size = one.key, one.tensor_parallel_size
            row: dict[str, Any] = {"contestant": one.name, "tensor_parallel_size": size}
            rows.append(row)
            if key not in done:
                row |= self.failed.get(key, {"unavailable": "no round was finished"})
                continue
            taken = Times([gap for own in self.rounds[key] for gap in own.gaps])
            spread, num_bytes = taken.ms, one.bytes_per_step
            bytes_s = num_bytes / bandwidths[size]
            dense = f"dense {size}"
            row |= {
                "tpot_ms": spread.pop("ms"),
                **spread,
                "steps": len(taken.samples),
                "MB_per_step": num_bytes / 1e6,
                "bytes_ms": bytes_s * 1e3,
                "over_bytes": taken.median / bytes_s,
                "speedup_over_dense": self._ratio(dense if dense in done else None, key),
                "bytes_limit": done[dense].bytes_per_step / num_bytes if dense in done else None,
                "speedup_over_transformers": self._ratio(best, key),
                "speedup_over_one_rank": self._ratio(f"{one.name} 1" if f"{one.name} 1" in done and size > 1 else None, key),
                "read_bandwidth_GB_per_s": bandwidths[size] / 1e9,
                "in_turns": self.in_turns,
                "checked": one.checked if unchecked is None else f"not checked: {unchecked}",
            }
        return rows

    def _ratio(self, other: str | None, own: str) -> float | None:
        """The other's time over this one's: the median over rounds of the ratio within a round."""
        if other is None:
            return None
        return float(np.median([theirs.median / mine.median for theirs, mine in zip(self.rounds[other], self.rounds[own])]))


def _grouped(contestants: Sequence[Contestant]) -> list[list[Contestant]]:
    """Each contestant alone, except that transformers' two caches share what they are filled with."""
    shared: list[Contestant] = [one for one in contestants if isinstance(one, Transformers)]
    return [[one] for one in contestants if one not in shared] + ([shared] if shared else [])
