"""What a request gives back: RequestOutput, with one CompletionOutput per sample. Names are vLLM's."""

from dataclasses import dataclass, field

import numpy as np

from distributed_sparse.metrics import RequestMetrics
from distributed_sparse.trace import TraceStep


@dataclass
class Logprob:
    """One token's log-probability (natural log, of the model's softmax before temperature and masks).

    `rank` is 1 for the most likely token; `decoded_token` is None without a tokenizer.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One of a request's `n` completions.

    Attributes:
        index: 0..n-1.
        text: the text so far, special tokens left out; "" without a tokenizer.
        token_ids: the tokens so far, the one that ended the output included.
        finish_reason: "stop" (end of sequence, stop token or stop string), "length", "abort", "error"; None while it runs.
        stop_reason: the stop string or stop token id that ended it; None for end of sequence and other reasons.
        logprobs: one dict per token, token id -> Logprob, the sampled token always in it; None when not asked for.
        cumulative_logprob: sum of the sampled tokens' log-probabilities; None when not asked for.
        trace: of an engine with trace=True, its traced decode steps so far; those of a prompt's last tokens stand with index 0.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    trace: list[TraceStep] | None = None

    @property
    def finished(self) -> bool:
        """Whether no more tokens will come."""
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """A request with all that it has produced so far.

    Attributes:
        request_id: the engine's name for it.
        prompt: the prompt's text; None when it was given as token ids.
        prompt_token_ids: the prompt as the model read it.
        prompt_logprobs: one dict per prompt token, the first None (nothing predicts it); None when not asked for.
        outputs: the completions, in index order; of a rejected request one, with finish_reason "error" and no tokens.
        finished: whether every completion has ended.
        metrics: when things happened; None for a request that was never accepted.
        error: why it was rejected or failed, for a reader; None when all went well.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    metrics: RequestMetrics | None = None
    error: str | None = None


@dataclass
class ScoreOutput:
    """Log-probabilities of the tokens of one sequence, each under the tokens before it (natural log).

    Attributes:
        token_ids: the sequence of n tokens.
        first: the first token whose log-probability was asked for.
        token_logprobs: float32 [n - first]: entry i is that of token first + i.
        logprobs: float32 [n - first, vocab_size], or None where the whole vocabulary was not asked for.
        trace: of an engine with trace=True, the steps of the tokens that went through sparse decode.
    """

    token_ids: list[int]
    first: int = 1
    token_logprobs: np.ndarray = field(init=False)
    logprobs: np.ndarray | None = None
    trace: list[TraceStep] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.token_logprobs = np.full(max(len(self.token_ids) - self.first, 0), np.nan, dtype=np.float32)

    def add(self, position: int, logprobs: np.ndarray, whole_vocabulary: bool) -> None:
        """Take in rows for the tokens from `position` on: float32 [rows, 1], or [rows, vocab_size]."""
        logprobs, position = logprobs[max(self.first - position, 0) :], max(self.first, position)
        rows = slice(position - self.first, position - self.first + len(logprobs))
        if not whole_vocabulary:
            self.token_logprobs[rows] = logprobs[:, 0]
            return
        if self.logprobs is None:
            self.logprobs = np.full((len(self.token_logprobs), logprobs.shape[1]), np.nan, dtype=np.float32)
        self.logprobs[rows] = logprobs
        self.token_logprobs[rows] = logprobs[np.arange(len(logprobs)), self.token_ids[position : position + len(logprobs)]]
