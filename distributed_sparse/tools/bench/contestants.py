"""contestants: who decodes in `decode`, in turns: engines of this project, transformers, vLLM."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import partial
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
from distributed_sparse.tools.bench.synthetic import SyntheticLLM, SyntheticShard
from distributed_sparse.tools.bench.timing import Unavailable, check_memory
from distributed_sparse.tools.bench.transformers_peer import TransformersDecode, Truth
from distributed_sparse.tools.common.latency import RequestTimes
from distributed_sparse.tools.common.load import send
from distributed_sparse.tools.planner.rank import RankCostModel

CACHED_SHARE = 0.9
"""Of a prompt, so much must come from vLLM's prefix cache: it reuses whole blocks alone, and computes the rest."""

BUNCHED = 0.1
"""Tokens closer than this share of the mean gap were handed over together."""

TIMEOUT_S = 3600.0
"""Of a step: filling a cache takes longer than any decode step."""


@dataclass(frozen=True)
class Task:
    """What every contestant does in a round: `batch` sequences decode `num_tokens` each, around `context` tokens."""

    model: BenchModel
    dtype: torch.dtype
    device: torch.device
    context: int
    batch: int
    num_tokens: int
    warm_up_s: float
    page_size: int = 16
    threads: int | None = None

    @property
    def prompt_len(self) -> int:
        """So that the contexts of a round's steps are `context` on average."""
        return self.context - self.num_tokens // 2

    @property
    def prompts(self) -> list[list[int]]:
        """Of a fixed seed; but for their last tokens they are never read."""
        generator = np.random.default_rng(0)
        return [generator.integers(3, self.model.config.vocab_size, self.prompt_len).tolist() for _ in range(self.batch)]

    @property
    def prompt_ends(self) -> list[int]:
        return [prompt[-1] for prompt in self.prompts]


@dataclass
class Round:
    """What a contestant did in one turn."""

    gaps: list[float]
    """Seconds of steps in which every sequence got a token, those of the warm-up left out."""
    tokens: list[list[int]] = field(default_factory=list)
    """Of each sequence."""

    @property
    def median(self) -> float:
        return float(np.median(self.gaps))


def step_gaps(arrivals: list[list[float]], warm_up_s: float) -> list[float]:
    """Seconds between tokens while all sequences decode, from `warm_up_s` after the last one's first token on.

    Where a round is too short for that, its second half; where no two tokens came apart, each sequence's mean.

    Args:
        arrivals: of each sequence, when each of its tokens was there.
    """
    whole = [(own[-1] - own[0]) / (len(own) - 1) for own in arrivals]
    arrivals = [without_bunches(own) for own in arrivals]
    begin, end = max(own[0] for own in arrivals), min(own[-1] for own in arrivals)
    begin = min(begin + warm_up_s, begin + (end - begin) / 2)
    pairs = (pair for own in arrivals for pair in pairwise(own))
    return [later - earlier for earlier, later in pairs if earlier >= begin and later <= end] or whole


def without_bunches(arrivals: list[float]) -> list[float]:
    """Spread tokens that a client on a busy machine was handed together evenly over the time since the last one.

    Their gaps would be 0, and the one before them several steps: a median of such gaps says nothing of a step.
    """
    near = BUNCHED * (arrivals[-1] - arrivals[0]) / max(len(arrivals) - 1, 1)
    bunches: list[list[float]] = []
    for arrival in arrivals:
        if bunches and arrival - bunches[-1][-1] < near:
            bunches[-1].append(arrival)
        else:
            bunches.append([arrival])
    spread = [bunches[0][-1]]  # of tokens that came with the first one nobody knows when they were there
    for bunch in bunches[1:]:
        before, count = spread[-1], len(bunch)
        spread += [before + (bunch[-1] - before) * place / count for place in range(1, count + 1)]
    return spread


class Contestant(ABC):
    """Someone to be timed. Life: `open`, `round` after `round`, `judge`, `close`."""

    name: str
    tensor_parallel_size: int = 1
    alone: bool = False
    """Cannot be open beside others."""
    is_peer: bool = False
    """Not this project's: that it fails is told, and is no failure of the benchmark."""
    checked: str = "not checked"
    """What its results were compared with."""

    def __init__(self, task: Task) -> None:
        self.task = task

    @property
    def sparse(self) -> dict[str, Any] | None:
        return None

    @property
    def on_paper(self) -> RankCostModel:
        """One rank, as far as its bytes are concerned."""
        task = self.task
        return RankCostModel(task.model.config, self.tensor_parallel_size, self.sparse, task.page_size, task.dtype)

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Memory that it holds on the device while it is open (on a CPU: that of all ranks)."""

    @abstractmethod
    def open(self) -> None:
        """Bring it up, and check it.

        Raises:
            Unavailable: it cannot be had here.
            WrongResult: it computes something else.
        """

    @abstractmethod
    def round(self) -> Round:
        """One turn."""

    def judge(self, rounds: dict[str, list[Round]]) -> dict[str, str]:
        """After the last round, still open: who of the others, by `rounds`, has computed something else, and what."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """Give everything back. Harmless when called again."""

    @property
    def bytes_per_step(self) -> float:
        """Bytes that a rank must read in a step: its weights, and what attention reads."""
        paper = self.on_paper
        return paper.weight_bytes_read(self.task.batch) + paper.attention([self.task.context] * self.task.batch).read


class Engine(Contestant):
    """This project's engine with one method.

    Args:
        truth: what it is compared with; None: it is not checked.
        enforce_eager: its steps are not captured as CUDA graphs.
        is_peer: another library computes its attention.
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
        self.name = name
        self.tensor_parallel_size = tensor_parallel_size
        self.is_peer = is_peer
        self._enforce_eager = enforce_eager
        self._sparse = sparse
        self._truth = truth
        self._llm: LLM | None = None
        self._bytes_read: list[float] = []

    @property
    def sparse(self) -> dict[str, Any] | None:
        return self._sparse

    @property
    def _max_model_len(self) -> int:
        return self.task.context + self.task.num_tokens

    @property
    def _cache_bytes(self) -> int:
        """One sequence of max_model_len for each of the batch, and the null page."""
        pages = self.task.batch * -(-self._max_model_len // self.task.page_size) + 1
        return pages * sum(self.on_paper.page_bytes)

    @property
    def num_bytes(self) -> int:
        ranks = self.tensor_parallel_size if self.task.device.type == "cpu" else 1
        return ranks * (self.on_paper.weight_bytes + self._cache_bytes)

    def open(self) -> None:
        task = self.task
        check_memory(f"{self.name} at {task.batch} x {task.context} tokens", self.num_bytes, task.device)
        self._llm = SyntheticLLM(
            str(task.model.path),
            partial(SyntheticShard, num_threads=task.threads),
            load_format=task.model.load_format,
            tensor_parallel_size=self.tensor_parallel_size,
            sparse=self._sparse,
            dtype=str(task.dtype).removeprefix("torch."),
            device=task.device.type,
            page_size=task.page_size,
            max_model_len=self._max_model_len,
            max_num_seqs=task.batch,
            max_num_batched_tokens=max(task.batch * task.prompt_len, 2048),  # filling is one step for all of them
            kv_cache_memory_bytes=self._cache_bytes,
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
        before = _attention(llm)
        found: list[RequestTimes] = send(llm, requests, task.batch)
        after = _attention(llm)
        layers, heads = task.model.config.num_hidden_layers, task.model.config.num_key_value_heads
        rows = (after["rows"] - before["rows"]) / (layers * heads)
        self._bytes_read.append((after["bytes_read"] - before["bytes_read"]) / rows * task.batch / self.tensor_parallel_size)
        gaps = step_gaps([request.arrivals for request in found], task.warm_up_s)
        return Round(gaps, [request.token_ids for request in found])

    def close(self) -> None:
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.shutdown()

    @property
    def bytes_per_step(self) -> float:
        """Attention's by the engine's own counters, so also where the data decides what is read."""
        return self.on_paper.weight_bytes_read(self.task.batch) + float(np.mean(self._bytes_read))


def _attention(llm: LLM) -> dict[str, int]:
    counted = llm.stats()["attention"]
    return {"rows": counted["rows_dense"] + counted["rows_sparse"], "bytes_read": counted["bytes_read"]}


class Transformers(Contestant):
    """transformers with one of its caches. Two contestants share a model and a filled cache."""

    is_peer = True

    def __init__(self, task: Task, kind: str, truth: Truth, shared: dict[str, TransformersDecode]) -> None:
        super().__init__(task)
        self.name = f"transformers {kind}"
        self._kind, self._truth, self._shared = kind, truth, shared
        self.checked = "the dense engines' tokens with its own"

    @property
    def num_bytes(self) -> int:
        """The shared part counts with the static cache, a dynamic one's copies with the dynamic."""
        paper, task = self.on_paper, self.task
        cache = 2 * len(paper.policies) * task.batch * (task.prompt_len + task.num_tokens) * (
            paper.geometry.num_kv_heads * paper.geometry.head_dim * task.dtype.itemsize
        )  # fmt: skip
        return cache + (paper.weight_bytes if self._kind == "static" else cache // len(paper.policies))

    def open(self) -> None:
        task = self.task
        if "decode" not in self._shared:
            check_memory(f"{self.name} at {task.batch} x {task.context} tokens", self.num_bytes, task.device)
            self._shared["decode"] = TransformersDecode(self._truth.hf, task.prompt_ends, task.prompt_len, task.num_tokens)

    def round(self) -> Round:
        arrivals, tokens = self._shared["decode"].round(self._kind)
        return Round(step_gaps([arrivals], self.task.warm_up_s), tokens)

    def judge(self, rounds: dict[str, list[Round]]) -> dict[str, str]:
        """The tokens of dense engines over the same cache."""
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
    """vLLM where it is installed. It computes the prompts once, when it is opened; rounds find them in its prefix cache.

    A round generates `num_tokens` for all prompts at once. Its gaps are, by vLLM's own times of each request
    (`RequestOutput.metrics`), the mean time of a token after the first. A version that does not tell them generates twice as
    many tokens once more: the difference of the two times, per token. Either is without the prompts.
    """

    name = "vllm"
    alone = True
    is_peer = True

    def open(self) -> None:
        vllm, task = import_peer("vllm"), self.task
        if task.device.type == "cuda":
            torch.cuda.empty_cache()  # it takes its share of the whole device
        self._sampling = vllm.SamplingParams
        self._llm = vllm.LLM(
            model=str(task.model.path),
            load_format=task.model.load_format,
            skip_tokenizer_init=True,
            dtype=str(task.dtype).removeprefix("torch."),
            max_model_len=task.context + 2 * task.num_tokens,
            max_num_seqs=task.batch,
            enable_prefix_caching=True,
            disable_log_stats=False,  # else it tells no times
        )
        self._generate(1)

    @property
    def num_bytes(self) -> int:
        return self.on_paper.weight_bytes

    def round(self) -> Round:
        """One gap of each request, or one of all of them.

        Raises:
            Unavailable: its cache does not hold the prompts, so that they would be computed among the steps.
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
        """Its outputs for all prompts, `count` tokens each, and the seconds that they took."""
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
    """Mean seconds per token after the first, by vLLM's own times of a request; None where it has none."""
    metrics, tokens = getattr(output, "metrics", None), len(output.outputs[0].token_ids)
    first, last = (getattr(metrics, name, None) for name in ("first_token_ts", "last_token_ts"))
    return (last - first) / (tokens - 1) if first and last and tokens > 1 else None
