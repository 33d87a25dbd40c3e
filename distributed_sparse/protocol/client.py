"""Messages between a client (`LLM`) and the Driver: requests and updates, as plain msgspec structs, so picklable."""

from __future__ import annotations

import msgspec

from distributed_sparse.metrics import RequestMetrics
from distributed_sparse.protocol.step import LogprobBlock, TraceBlock
from distributed_sparse.sampling_params import SamplingParams


class NewRequest(msgspec.Struct):
    """A request as sent by the client. The Driver validates it again and refuses only this request if it is invalid."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    score: bool = False
    """Only compute the prompt's log-probabilities (`params.prompt_logprobs` of them per token); nothing is sampled."""
    first_scored: int = 1
    """With `score`: the first prompt token whose log-probability is wanted."""
    profile: bool = False
    """Steps that decode it, and hold no prompt chunk, are profile steps, whatever `profile_interval` is."""


class SampleUpdate(msgspec.Struct):
    """What one committed step added to one of a request's `n` samples."""

    index: int
    token_ids: list[int]
    text: str
    """New text. Text that may be the start of a stop string is held back, and so are incomplete UTF-8 characters."""
    logprobs: list[LogprobBlock]
    finish_reason: str | None = None
    """stop, length, abort or error."""
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended it; None for EOS and length."""


class TraceUpdate(msgspec.Struct):
    """The trace of one decode row of one of a request's samples."""

    index: int
    ranks: list[TraceBlock]
    """One per rank, in rank order."""


class RequestUpdate(msgspec.Struct):
    """What one committed step added to one request. `finished` is set in the last update only."""

    request_id: str
    samples: list[SampleUpdate] = []
    prompt_logprobs: list[LogprobBlock] = []
    traces: list[TraceUpdate] = []
    finished: bool = False
    error: str | None = None
    """Why the request was refused or ended early; the tokens so far have been published."""
    error_kind: str | None = None
    """"invalid" (the request is invalid), "timeout" (its `timeout_s` has passed) or "engine"."""
    metrics: RequestMetrics | None = None
    """Set with `finished`."""


class ModelInfo(msgspec.Struct, frozen=True):
    """The model's properties that the Driver needs."""

    vocab_size: int
    num_layers: int
    num_kv_heads: int
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    name: str = ""
    """The user's name for the model; the metrics' label."""
