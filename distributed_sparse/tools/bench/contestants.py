"""contestants: what `decode` times in turns: engines of this project, transformers, vLLM."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from distributed_sparse.llm import LLM
from distributed_sparse.protocol.client import NewRequest
from distributed_sparse.sampling_params import SamplingParams
from distributed_sparse.tools.bench.accuracy import WrongResult
from distributed_sparse.tools.bench.models import BenchModel
from distributed_sparse.tools.bench.peers import import_peer
from distributed_sparse.tools.bench.synthetic import FILL_FROM, EngineSpec
from distributed_sparse.tools.bench.timing import Unavailable, check_memory
from distributed_sparse.tools.bench.transformers_peer import TransformersDecode, Truth
from distributed_sparse.tools.common.latency import RequestTimes
from distributed_sparse.tools.common.load import send
from distributed_sparse.tools.planner.rank import RankCostModel

CACHED_SHARE = 0.9
"""Share of a prompt that must come from vLLM's prefix cache, which reuses whole blocks only and recomputes the rest."""

BUNCHED = 0.1
"""Tokens closer together than this share of the mean gap were delivered together."""

TIMEOUT_S = 3600.0
"""Timeout of a step; filling a cache takes longer than any decode step."""


@dataclass(frozen=True)
class Task:
    """A round of every contestant: `batch` sequences decode `num_tokens` each, around `context` tokens."""

    model: BenchModel
    context: int
    batch: int
    num_tokens: int
    warm_up_s: float
    page_size: int = 16
    threads: int | None = None

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def prompt_len(self) -> int:
        """Chosen so that a round's steps have `context` tokens on average."""
        return self.context - self.num_tokens // 2

    @property
    def prompts(self) -> list[list[int]]:
        """Random, from a fixed seed. Engines of this project and transformers read only their last tokens."""
        generator = np.random.default_rng(0)
        return [generator.integers(3, self.model.config.vocab_size, self.prompt_len).tolist() for _ in range(self.batch)]

    @property
    def prompt_ends(self) -> list[int]:
        return [prompt[-1] for prompt in self.prompts]

    def engine(self, sparse: dict[str, Any] | None, tensor_parallel_size: int) -> EngineSpec:
        return EngineSpec(
            model=self.model,
            sparse=sparse,
            tensor_parallel_size=tensor_parallel_size,
            page_size=self.page_size,
            max_model_len=self.context + self.num_tokens,
            max_num_seqs=self.batch,
            threads=self.threads,
        )


@dataclass
class Round:
    """One turn of a contestant."""

    gaps: list[float]
    """Seconds of the steps in which every sequence got a token, without the warm-up."""
    tokens: list[list[int]] = field(default_factory=list)
    """Generated tokens of each sequence."""

    @property
    def median(self) -> float:
        return float(np.median(self.gaps))


def step_gaps(arrivals: list[list[float]], warm_up_s: float) -> list[float]:
    """Seconds between tokens while all sequences decode, from `warm_up_s` after the last sequence's first token on.

    If a round is too short for that, the gaps of its second half; if no two tokens arrived apart, each sequence's mean gap.

    Args:
        arrivals: times of each sequence's tokens.
    """
    whole = [(own[-1] - own[0]) / (len(own) - 1) for own in arrivals]
    arrivals = [without_bunches(own) for own in arrivals]
    begin, end = max(own[0] for own in arrivals), min(own[-1] for own in arrivals)
    begin = min(begin + warm_up_s, begin + (end - begin) / 2)
    pairs = (pair for own in arrivals for pair in pairwise(own))
    return [later - earlier for earlier, later in pairs if earlier >= begin and later <= end] or whole


def without_bunches(arrivals: list[float]) -> list[float]:
    """Spread tokens that a client on a busy machine received together evenly over the time since the previous ones.

    Otherwise their gaps would be 0 and the gap before them that of several steps, and the median would not be a step's time.
    """
    near = BUNCHED * (arrivals[-1] - arrivals[0]) / max(len(arrivals) - 1, 1)
    bunches: list[list[float]] = []
    for arrival in arrivals:
        if bunches and arrival - bunches[-1][-1] < near:
            bunches[-1].append(arrival)
        else:
            bunches.append([arrival])
    spread = [bunches[0][-1]]  # the true times of tokens that came with the first one are unknown
    for bunch in bunches[1:]:
        before, count = spread[-1], len(bunch)
        spread += [before + (bunch[-1] - before) * place / count for place in range(1, count + 1)]
    return spread


class Contestant(ABC):
    """Something to be timed: `open`, `round` any number of times, `judge`, `close`."""

    name: str
    tensor_parallel_size: int = 1
    alone: bool = False
    """Cannot be open while others are."""
    is_peer: bool = False
    """Not of this project: a failure is reported, but does not fail the benchmark."""
    checked: str = "not checked"
    """What the results were compared with."""

    def __init__(self, task: Task) -> None:
        self.task = task

    @property
    def key(self) -> str:
        """Unique within a benchmark's point."""
        return f"{self.name} {self.tensor_parallel_size}"

    @cached_property
    def rank(self) -> RankCostModel:
        """The cost model of one rank, for its bytes."""
        return self.task.engine(None, 1).rank

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Device memory while open; on a CPU, of all ranks."""

    @abstractmethod
    def open(self) -> None:
        """Start, and check the results.

        Raises:
            Unavailable: it cannot run here.
            WrongResult: its results are wrong.
        """

    @abstractmethod
    def round(self) -> Round:
        """One turn."""

    def judge(self, rounds: dict[str, list[Round]]) -> dict[str, str]:
        """After the last round, while open: contestants in `rounds` with wrong tokens, and how they differ."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """Release everything. Harmless when called again."""

    @property
    def bytes_per_step(self) -> float:
        """Bytes that a rank must read in a step: its weights, and attention's."""
        rank, task = self.rank, self.task
        return rank.weight_bytes_read(task.batch) + rank.attention([task.context] * task.batch).read


class Engine(Contestant):
    """This project's engine with one method.

    Args:
        truth: the reference; None: the engine is not checked.
        enforce_eager: run steps without CUDA graphs.
        is_peer: another library computes the attention.
    """

    def __init__(
        self,
        task: Task,
        name: str,
        sparse: dict[str, Any] | None,
        tensor_parallel_size: int,
        truth: Truth | None,
        *,
        enforce_eager: bool = False,
        is_peer: bool = False,
    ) -> None:
        super().__init__(task)
        self.name, self.tensor_parallel_size, self.is_peer = name, tensor_parallel_size, is_peer
        self.spec = task.engine(sparse, tensor_parallel_size)
        self._enforce_eager = enforce_eager
        self._truth = truth
        self._llm: LLM | None = None
        self._bytes_read: list[float] = []

    @cached_property
    def rank(self) -> RankCostModel:
        return self.spec.rank

    @property
    def num_bytes(self) -> int:
        return self.spec.num_bytes

    def open(self) -> None:
        task = self.task
        self._llm = self.spec.start(
            f"{self.name} at {task.batch} x {task.context} tokens",
            max_num_batched_tokens=max(task.batch * task.prompt_len, 2048),  # one step fills all sequences
            fill_from=FILL_FROM,
            enforce_eager=self._enforce_eager,
            step_timeout_s=TIMEOUT_S,
        )
        if self._truth is not None:
            self._truth.check(f"{self.name} at tensor_parallel_size={self.tensor_parallel_size}", self._llm)
            self.checked = "log-probabilities of a short sequence with transformers'"

    def round(self) -> Round:
        task, llm = self.task, self._llm
        assert llm is not None
        params = SamplingParams(temperature=0.0, max_tokens=task.num_tokens, ignore_eos=True, seed=0)
        requests = [NewRequest(uuid.uuid4().hex, prompt, params) for prompt in task.prompts]
        before = llm.stats()["attention"]
        found: list[RequestTimes] = send(llm, requests, task.batch)
        after = llm.stats()["attention"]
        layers, heads = task.model.config.num_hidden_layers, task.model.config.num_key_value_heads
        rows = sum(after[name] - before[name] for name in ("rows_dense", "rows_sparse")) / (layers * heads)
        self._bytes_read.append((after["bytes_read"] - before["bytes_read"]) / rows * task.batch / self.tensor_parallel_size)
        gaps = step_gaps([request.arrivals for request in found], task.warm_up_s)
        return Round(gaps, [request.token_ids for request in found])

    def close(self) -> None:
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.shutdown()

    @property
    def bytes_per_step(self) -> float:
        """With attention's bytes by the engine's counters, as they may depend on the data."""
        return self.rank.weight_bytes_read(self.task.batch) + float(np.mean(self._bytes_read))


class Transformers(Contestant):
    """transformers with one of its cache classes. The two contestants share a model and a filled cache."""

    is_peer = True

    def __init__(self, task: Task, kind: str, truth: Truth, shared: dict[str, TransformersDecode]) -> None:
        super().__init__(task)
        self.name = f"transformers {kind}"
        self._kind, self._truth, self._shared = kind, truth, shared
        self.checked = "the dense engines' tokens with its own"

    @property
    def num_bytes(self) -> int:
        """The static contestant counts the shared model and cache, the dynamic one its copies."""
        rank, task = self.rank, self.task
        cache = 2 * len(rank.policies) * task.batch * (task.prompt_len + task.num_tokens) * (
            rank.geometry.num_kv_heads * rank.geometry.head_dim * task.model.dtype.itemsize
        )  # fmt: skip
        return cache + (rank.weight_bytes if self._kind == "static" else cache // len(rank.policies))

    def open(self) -> None:
        task = self.task
        if "decode" not in self._shared:
            check_memory(f"{self.name} at {task.batch} x {task.context} tokens", self.num_bytes, task.device)
            self._shared["decode"] = TransformersDecode(self._truth.hf, task.prompt_ends, task.prompt_len, task.num_tokens)

    def round(self) -> Round:
        arrivals, tokens = self._shared["decode"].round(self._kind)
        return Round(step_gaps([arrivals], self.task.warm_up_s), tokens)

    def judge(self, rounds: dict[str, list[Round]]) -> dict[str, str]:
        """Compare the tokens of dense engines over the same cache."""
        wrong = {}
        for name, own in rounds.items() if self._kind == "static" else ():
            if name.startswith("dense ") and own:
                try:
                    self._shared["decode"].check_tokens(name, own[0].tokens)
                except WrongResult as error:
                    wrong[name] = str(error)
        return wrong

    def close(self) -> None:
        self._shared.clear()


class Vllm(Contestant):
    """vLLM, if installed. `open` computes the prompts once; later rounds find them in the prefix cache.

    A round generates `num_tokens` for all prompts at once. A gap is a request's mean time per token after the first, by vLLM's
    own times (`RequestOutput.metrics`). For a version without these times, a second run generates twice as many tokens, and the
    gap is the difference of the two runs' times per token. Both exclude the prompts.
    """

    name = "vllm"
    alone = True
    is_peer = True

    def open(self) -> None:
        vllm, task = import_peer("vllm"), self.task
        if task.device.type == "cuda":
            torch.cuda.empty_cache()  # vLLM claims a share of the whole device
        self._sampling = vllm.SamplingParams
        self._llm = vllm.LLM(
            model=str(task.model.path),
            load_format=task.model.load_format,
            skip_tokenizer_init=True,
            dtype=task.model.dtype_name,
            max_model_len=task.context + 2 * task.num_tokens,
            max_num_seqs=task.batch,
            enable_prefix_caching=True,
            disable_log_stats=False,  # for the times in RequestOutput.metrics
        )
        self._generate(1)

    @property
    def num_bytes(self) -> int:
        return self.rank.weight_bytes

    def round(self) -> Round:
        """One gap per request, or one of all requests.

        Raises:
            Unavailable: the prefix cache does not hold the prompts, so that steps would include their prefill.
        """
        count = self.task.num_tokens
        outputs, seconds = self._generate(count)
        for output in outputs:
            cached, length = getattr(output, "num_cached_tokens", None), self.task.prompt_len
            if cached is not None and cached < CACHED_SHARE * length:
                raise Unavailable(f"vLLM's prefix cache held {cached} of {length} prompt tokens: its memory is too small")
        gaps = [gap for output in outputs if (gap := vllm_gap(output)) is not None]
        if len(gaps) < len(outputs):
            gaps = [(self._generate(2 * count)[1] - seconds) / count]
        return Round(gaps, [list(output.outputs[0].token_ids) for output in outputs])

    def _generate(self, count: int) -> tuple[list[Any], float]:
        """Outputs of `count` tokens for all prompts, and the seconds that they took."""
        params = self._sampling(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": prompt} for prompt in self.task.prompts]
        started = time.monotonic()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return outputs, time.monotonic() - started

    def close(self) -> None:
        self.__dict__.pop("_llm", None)
        if self.task.device.type == "cuda":
            torch.cuda.empty_cache()


def vllm_gap(output: Any) -> float | None:
    """Mean seconds per token after the first by vLLM's own times of a request, or None without them."""
    metrics, tokens = getattr(output, "metrics", None), len(output.outputs[0].token_ids)
    first, last = (getattr(metrics, name, None) for name in ("first_token_ts", "last_token_ts"))
    return (last - first) / (tokens - 1) if first and last and tokens > 1 else None
