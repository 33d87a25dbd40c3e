"""decode: the whole engine's time per output token over a filled cache, beside transformers and beside the bytes' limit.

No prompt is computed: random keys and values stand in its place (`synthetic`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch

from distributed_sparse.bench.accuracy import WrongResult
from distributed_sparse.bench.contestants import Contestant, Engine, Round, Task, Transformers, Vllm
from distributed_sparse.bench.flashinfer_dense import METHOD as FLASHINFER
from distributed_sparse.bench.measure import (
    Times,
    Unavailable,
    available_bytes,
    check_memory,
    out_of_memory_is_unavailable,
    read_bandwidth,
    torch_threads,
)
from distributed_sparse.bench.models import ATTENTION_HEAVY, BenchModel, bench_model
from distributed_sparse.bench.peers import import_flashinfer
from distributed_sparse.bench.transformers_peer import TransformersDecode, Truth
from distributed_sparse.client import EngineError
from distributed_sparse.config import set_override
from distributed_sparse.model.limits import resolve_device, resolve_dtype
from distributed_sparse.model.sharding import ShardSpec, tensor_slices
from distributed_sparse.selection import resolve_sparse_config
from distributed_sparse.validation import check_choice

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
        for name, least in (("output_len", 4), ("rounds", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is below {least}; give {least} or more")

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
        caches), "speedup_over_one_rank", "in_turns" and "checked"; or "unavailable", the reason; or "wrong", what differs.
    """
    device = resolve_device(settings.device)
    sections = settings.sections()
    rows: list[dict[str, Any]] = []
    with bench_model(settings.model) as model, torch_threads(settings.threads) as threads, one_ray(settings):
        dtype = resolve_dtype(settings.dtype, model.config.dtype)
        bandwidths = _bandwidths(settings, device, threads)
        truth, unchecked = _truth(model, dtype, device)
        for context, batch in product(settings.context, settings.batch):
            if context // 2 <= settings.output_len:  # type: ignore[operator]
                raise ValueError(f"--context {context} is too short for --output-len {settings.output_len}")
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
    from distributed_sparse.driver.actor import ensure_ray

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
    try:
        check_memory("transformers' model", num_bytes, device)
        with out_of_memory_is_unavailable():
            return Truth(model, dtype, device), None
    except Unavailable as reason:
        return None, str(reason)


def _contestants(
    task: Task, settings: DecodeSettings, sections: dict[str, dict[str, Any] | None], truth: Truth | None, unchecked: str | None
) -> tuple[list[Contestant], list[dict[str, Any]]]:
    """Who takes part, and rows of those that cannot."""
    found: list[Contestant] = []
    absent: list[dict[str, Any]] = []
    sizes = settings.tensor_parallel_size
    for name, size in product(sections, sizes):
        found.append(Engine(task, name, sections[name], size, truth))
    for peer in settings.peer:
        try:
            if peer == "flashinfer":
                import_flashinfer(task.device)
                sparse = {"method": FLASHINFER, "dense_layers": 0}
                found += [Engine(task, "dense by flashinfer", sparse, size, truth) for size in sizes]
            elif peer == "vllm":
                found.append(Vllm(task))
            elif truth is None:
                raise Unavailable(unchecked or "")
            else:
                shared: dict[str, TransformersDecode] = {}
                found += [Transformers(task, kind, truth, shared) for kind in ("static", "dynamic")]
        except Unavailable as reason:
            absent.append({"contestant": peer, "tensor_parallel_size": 1, "unavailable": str(reason)})
    return found, absent


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
        for one in _grouped(apart):
            self._run(one)
            if truth is not None:
                truth.drop()

    def _run(self, contestants: Sequence[Contestant]) -> None:
        with ExitStack() as opened:
            running = []
            for one in contestants:
                with self._may_fail(one):
                    opened.callback(one.close)
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

    @contextmanager
    def _may_fail(self, one: Contestant) -> Iterator[None]:
        """What ends one contestant ends none of the others."""
        try:
            with out_of_memory_is_unavailable():
                yield
        except WrongResult as error:
            self._fail(one, "wrong", str(error))
        except (Unavailable, EngineError, ValueError) as error:
            self._fail(one, "unavailable", str(error))

    def _fail(self, one: Contestant, how: str, why: str) -> None:
        self.failed[_key(one)] = {how: why}

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
                "checked": unchecked or one.checked,
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
