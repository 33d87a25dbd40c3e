"""What crosses between a client (`LLM`) and the Driver: requests in, updates out. Plain msgspec structs, so picklable."""

from __future__ import annotations

import msgspec

from distributed_sparse.metrics import RequestMetrics
from distributed_sparse.protocol.step import LogprobBlock, TraceBlock
from distributed_sparse.sampling_params import SamplingParams


class NewRequest(msgspec.Struct):
    """A request as the client hands it over; the Driver checks it again, and refuses it alone if it is wrong."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    score: bool = False
    """Only the log-probabilities of the prompt are wanted: nothing is sampled (`params.prompt_logprobs` says how many)."""
    first_scored: int = 1
    """Of such a prompt, the first token whose log-probability is wanted."""
    profile: bool = False
    """Steps that decode it, and no prompt beside it, take the times of their parts, whatever `profile_interval` says."""


class SampleUpdate(msgspec.Struct):
    """What one commit added to one of a request's `n` samples."""

    index: int
    token_ids: list[int]
    text: str
    """New text, held back while it may be the start of a stop string; never half a UTF-8 character."""
    logprobs: list[LogprobBlock]
    finish_reason: str | None = None
    """stop, length, abort or error."""
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended it; None for EOS and length."""


class TraceUpdate(msgspec.Struct):
    """A traced decode row of one of a request's samples, as every rank saw it, in rank order."""

    index: int
    ranks: list[TraceBlock]


class RequestUpdate(msgspec.Struct):
    """What one commit added to one request. `finished` comes once, last."""

    request_id: str
    samples: list[SampleUpdate] = []
    prompt_logprobs: list[LogprobBlock] = []
    traces: list[TraceUpdate] = []
    finished: bool = False
    error: str | None = None
    """The request was refused, or ended by a failure of the engine; the tokens so far have been published."""
    error_kind: str | None = None
    """"invalid" (the request's own fault), "timeout" (its `timeout_s` has passed) or "engine"."""
    metrics: RequestMetrics | None = None
    """With `finished`."""


class ModelInfo(msgspec.Struct, frozen=True):
    """What the Driver knows of the model."""

    vocab_size: int
    num_layers: int
    num_kv_heads: int
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    name: str = ""
    """What the user calls it: the label of its metrics."""
