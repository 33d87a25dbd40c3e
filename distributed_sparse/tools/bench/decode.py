"""decode: the whole engine's time per output token over a filled cache, beside transformers and beside the bytes' limit.

No prompt is computed: random keys and values stand in its place (`synthetic`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch

from distributed_sparse.config import set_override
from distributed_sparse.model.limits import resolve_device, resolve_dtype
from distributed_sparse.model.sharding import ShardSpec, tensor_slices
from distributed_sparse.selection import resolve_sparse_config
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
from distributed_sparse.tools.planner.rank import RankCostModel
from distributed_sparse.utils.validation import check_choice

PEERS = ("transformers", "flashinfer", "vllm")

OUTPUT_LEN = {"cpu": 16, "cuda": 256}
"""Tokens of a round."""

MEMORY_SHARE = 0.85
"""Of the free memory: contestants are open together where they take no more."""


@dataclass(frozen=True)
class DecodeSettings:
    """The grid, and who takes part. `tensor_parallel_size` is of this engine alone; transformers has one process."""

    model: str = ATTENTION_HEAVY
    context: tuple[int, ...] = (32768,)
    batch: tuple[int, ...] = (1,)
    method: tuple[str, ...] = ("dense", "quest")
    tensor_parallel_size: tuple[int, ...] = (1,)
    peer: tuple[str, ...] = ("transformers",)
    set: tuple[str, ...] = ()
    """Keys of the sparse methods: "sparse.token_budget=1024"."""
    dtype: str = "auto"
    device: str = "cpu"
    threads: int | None = None
    """torch threads of each rank, and of transformers; None: all cores for one process, its share for each of several."""
    page_size: int = 16
    rounds: int = 3
    output_len: int | None = None
    """Tokens that each sequence generates in a round; None: 16 on a CPU, 256 on a GPU."""
    warm_up_s: float = 0.3
    ttft: tuple[int, ...] = ()
    """Also the time to the first token of prompts of so many tokens, truly computed."""
    max_num_batched_tokens: int = 2048
    """Of the engine whose time to the first token is taken."""

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
                    f"--context {context} is too short for --output-len {self.output_len}: a prompt that is filled "
                    f"has {FILL_FROM} tokens or more, and half a round comes before the context; give {shortest} or more"
                )

    def sections(self) -> dict[str, dict[str, Any] | None]:
        """A `sparse:` section for each method, with what `set` changes in all of them. Raises ValueError by name."""
        found: dict[str, dict[str, Any] | None] = {}
        for method in self.method:
            run: dict[str, Any] = {"sparse": {"method": method}}
            for override in self.set if method != "dense" else ():
                set_override(run, override)
            if set(run) != {"sparse"} or run["sparse"].get("method") != method:
                raise ValueError(
                    f"--set {','.join(self.set)}: only keys of sparse methods can be set: sparse.token_budget=1024"
                )
            resolve_sparse_config(run["sparse"])  # what is wrong with it is said before anything is loaded
            found[method] = run["sparse"]
        return found


def bench_decode(settings: DecodeSettings, told: Callable[[dict[str, Any]], object] = lambda row: None) -> list[dict[str, Any]]:
    """Time every method at every point of the grid, in rounds: all of a point's contestants take turns.

    Args:
        told: is given each row as soon as its point is done.

    Returns:
        Rows of "contestant", "tensor_parallel_size", "context", "batch", and either "tpot_ms" (median over all rounds' steps,
        after the warm-up) with "p10_ms" and "p90_ms", "MB_per_step" (of one rank: weights, and what attention reads by the
        engine's own counters), "bytes_ms" (their time at the read bandwidth measured in this run; on a CPU all ranks share it),
        "over_bytes" (tpot over it), "speedup_over_dense" (median of the rounds' ratios, to dense at the same
        tensor_parallel_size) beside "bytes_limit" (the same ratio of the bytes), "speedup_over_transformers" (the better of its
        caches), "speedup_over_one_rank", "in_turns" and "checked"; or "unavailable", the reason; or "wrong", what differs, or
        how an engine of this project failed.
    """
    device = resolve_device(settings.device)
    sections = settings.sections()
    rows: list[dict[str, Any]] = []
    with bench_model(settings.model) as model, torch_threads(settings.threads) as threads, one_ray(settings):
        dtype = resolve_dtype(settings.dtype, model.config.dtype)
        bandwidths = _bandwidths(settings, device, threads)
        truth, unchecked = _truth(model, dtype, device)
        for context, batch in product(settings.context, settings.batch):
            assert settings.output_len is not None
            task = Task(
                model,
                dtype,
                device,
                context,
                batch,
                settings.output_len,
                settings.warm_up_s,
                settings.page_size,
                settings.threads,
            )
            contestants, absent = _contestants(task, settings, sections, truth, unchecked)
            point = Point(contestants, settings.rounds)
            point.run(truth)
            again = _bandwidths(settings, device, threads)  # a busy moment lowers one of the two, and nothing raises it
            bandwidths = {ranks: max(found, again[ranks]) for ranks, found in bandwidths.items()}
            of_point = [*point.rows(bandwidths, unchecked), *absent]
            for row in of_point:
                row |= {"context": context, "batch": batch, "dtype": str(dtype).removeprefix("torch.")}
                told(row)
            rows += of_point
    return rows


@contextmanager
def one_ray(settings: DecodeSettings) -> Iterator[None]:
    """One Ray for all engines of several ranks."""
    if max(settings.tensor_parallel_size) == 1:
        yield
        return
    from distributed_sparse.ray_backend.session import ensure_ray

    session = ensure_ray(max(settings.tensor_parallel_size))
    try:
        yield
    finally:
        session.release()


def _bandwidths(settings: DecodeSettings, device: torch.device, threads: int) -> dict[int, float]:
    """Read bandwidth per rank: on a CPU of so many threads as all ranks have together, shared among them."""
    if device.type != "cpu":
        return dict.fromkeys({1, *settings.tensor_parallel_size}, read_bandwidth(device))
    found = {}
    for ranks in {1, *settings.tensor_parallel_size}:
        each = settings.threads or max(1, threads // ranks)
        with torch_threads(each * ranks):
            found[ranks] = read_bandwidth(device) / ranks
    return found


def _truth(model: BenchModel, dtype: torch.dtype, device: torch.device) -> tuple[Truth | None, str | None]:
    """transformers with these weights, or why not."""
    slices = tensor_slices(model.config, ShardSpec(0, 1)).values()
    num_bytes = sum(part.num_read for part in slices) * dtype.itemsize
    with caught("transformers", is_peer=True) as failed:
        check_memory("transformers' model", num_bytes, device)
        return Truth(model, dtype, device), None
    return None, failed["unavailable"]


def _contestants(
    task: Task, settings: DecodeSettings, sections: dict[str, dict[str, Any] | None], truth: Truth | None, unchecked: str | None
) -> tuple[list[Contestant], list[dict[str, Any]]]:
    """Who takes part, and rows of those that cannot."""
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
    """The engine with the faster of flashinfer's kernels, whose steps cannot be captured, and beside it our own dense, eager.

    Raises:
        Unavailable: flashinfer cannot be had.
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
    """Which of flashinfer's kernels is the faster one for a layer of one rank, at the task's batch and context."""
    geometry = replace(RankCostModel(task.model.config, size, None, task.page_size, task.dtype).geometry, device=task.device)
    shape = Shape(
        context=task.context,
        batch=task.batch,
        token_budget=task.context,
        page_size=task.page_size,
        num_heads=geometry.num_kv_heads * geometry.group_size,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        prefill_tokens=0,
        dtype=task.dtype,
        device=task.device,
    )
    layer = LayerSettings(
        context=shape.context,
        batch=shape.batch,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        page_size=shape.page_size,
    )
    return tensor_cores_are_faster(make_inputs(layer, geometry, (), seed=0, contiguous=False), shape)


class Point:
    """One context and batch: its contestants, their rounds, and who had to give up."""

    def __init__(self, contestants: list[Contestant], num_rounds: int) -> None:
        self.contestants = contestants
        self.num_rounds = num_rounds
        self.rounds: dict[str, list[Round]] = {_key(one): [] for one in contestants}
        self.failed: dict[str, dict[str, str]] = {}
        self.in_turns = True

    def run(self, truth: Truth | None) -> None:
        """All open together, in turns; where they do not fit together, or may not share a GPU, one after the other."""
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
            self._run(together)
        if apart and truth is not None:
            truth.drop()  # who runs alone has the whole memory
        for one in _grouped(apart):
            self._run(one)
            if truth is not None:
                truth.drop()

    def _run(self, contestants: Sequence[Contestant]) -> None:
        with ExitStack() as opened:
            running = []
            for one in contestants:
                opened.callback(self._close, one)
                with self._may_fail(one):
                    one.open()
                    running.append(one)
            for _ in range(self.num_rounds):
                for one in running:
                    if _key(one) not in self.failed:
                        with self._may_fail(one):
                            self.rounds[_key(one)].append(one.round())
            for one in running:
                with self._may_fail(one):
                    self.failed |= {key: {"wrong": why} for key, why in one.judge(self.rounds).items()}

    def _close(self, one: Contestant) -> None:
        with self._may_fail(one):
            one.close()

    @contextmanager
    def _may_fail(self, one: Contestant) -> Iterator[None]:
        """What ends one contestant ends none of the others; what failed first is told."""
        with caught(one.name, one.is_peer) as failed:
            yield
        if failed:
            self.failed.setdefault(_key(one), failed)

    def rows(self, bandwidths: dict[int, float], unchecked: str | None) -> list[dict[str, Any]]:
        """One per contestant."""
        done = {_key(one): one for one in self.contestants if self.rounds[_key(one)] and _key(one) not in self.failed}
        best = min(
            (name for name, one in done.items() if isinstance(one, Transformers)),
            key=lambda name: float(np.median([own.median for own in self.rounds[name]])),
            default=None,
        )
        rows = []
        for one in self.contestants:
            key, size = _key(one), one.tensor_parallel_size
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
        """How many times as long the other takes: the median over rounds, each measured close to the other's."""
        if other is None:
            return None
        return float(np.median([theirs.median / mine.median for theirs, mine in zip(self.rounds[other], self.rounds[own])]))


def _key(one: Contestant) -> str:
    return f"{one.name} {one.tensor_parallel_size}"


def _grouped(contestants: Sequence[Contestant]) -> list[list[Contestant]]:
    """One by one, but for transformers' caches, which share what they are filled with."""
    shared: list[Contestant] = [one for one in contestants if isinstance(one, Transformers)]
    return [[one] for one in contestants if one not in shared] + ([shared] if shared else [])
