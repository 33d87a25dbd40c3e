"""outputs: results of requests. RequestOutput holds one CompletionOutput per completion; names are vLLM's."""

from dataclasses import dataclass, field

import numpy as np

from distributed_sparse.metrics import RequestMetrics
from distributed_sparse.trace import TraceStep


@dataclass
class Logprob:
    """Log-probability of one token: natural log of the model's softmax, before temperature and masks.

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
        text: the text so far, without special tokens; "" without a tokenizer.
        token_ids: the tokens so far, including the token that ended the output.
        finish_reason: "stop" (end of sequence, stop token or stop string), "length", "abort", "error"; None while running.
        stop_reason: the stop string or stop token id that ended the output; None for end of sequence and other reasons.
        logprobs: one dict per token, token id -> Logprob, which always contains the sampled token; None if not requested.
        cumulative_logprob: sum of the sampled tokens' log-probabilities; None if not requested.
        trace: the traced decode steps so far, in an engine with trace=True. Steps of decode_last_prompt_tokens are in index 0.
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
        """Whether the completion has ended."""
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """A request and its results so far.

    Attributes:
        request_id: the request's id.
        prompt: the prompt's text; None if the prompt was given as token ids.
        prompt_token_ids: the prompt's tokens, including special tokens that the tokenizer added.
        prompt_logprobs: one dict per prompt token, None for the first (nothing predicts it); None if not requested.
        outputs: the completions in index order; for a rejected request a single one, with finish_reason "error" and no tokens.
        finished: whether every completion has ended.
        metrics: timestamps and token counts; None if the request was rejected.
        error: message that explains why the request was rejected or failed; None if it succeeded.
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
    """Log-probability (natural log) of each token of one sequence, given the tokens before it.

    Attributes:
        token_ids: the sequence of n tokens.
        first: index of the first scored token.
        token_logprobs: float32 [n - first]; entry i belongs to token first + i.
        logprobs: float32 [n - first, vocab_size]; None unless whole_vocabulary was requested.
        trace: decode steps of the tokens that went through sparse decode, in an engine with trace=True.
    """

    token_ids: list[int]
    first: int = 1
    token_logprobs: np.ndarray = field(init=False)
    logprobs: np.ndarray | None = None
    trace: list[TraceStep] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.token_logprobs = np.full(max(len(self.token_ids) - self.first, 0), np.nan, dtype=np.float32)

    def add(self, position: int, logprobs: np.ndarray, whole_vocabulary: bool) -> None:
        """Store log-probabilities of the tokens from `position` on: float32 [tokens, 1], or [tokens, vocab_size]."""
        logprobs, position = logprobs[max(self.first - position, 0) :], max(self.first, position)
        rows = slice(position - self.first, position - self.first + len(logprobs))
        if not whole_vocabulary:
            self.token_logprobs[rows] = logprobs[:, 0]
            return
        if self.logprobs is None:
            self.logprobs = np.full((len(self.token_logprobs), logprobs.shape[1]), np.nan, dtype=np.float32)
        self.logprobs[rows] = logprobs
        self.token_logprobs[rows] = logprobs[np.arange(len(logprobs)), self.token_ids[position : position + len(logprobs)]]
