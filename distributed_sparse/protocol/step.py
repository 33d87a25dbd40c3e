"""Messages between the Driver and the shards: msgspec structs in msgpack. A step plan holds only what changed since the last.

Start-up: a shard sends `Hello`; the Driver checks all of them and sends `Join`; the shard answers `Loaded`, gets
`AllocateCache`, and answers `Ready`. Then each `StepPlan` is answered by a `StepResult`, until `Stop`, or `Failed` from the
shard. After another rank's failure the Driver sends `Regroup`, and start-up begins again with the `Hello` of the next
generation. From the beginning the shard also sends `Alive` regularly, from a separate thread.
"""

from __future__ import annotations

import msgspec


class Message(msgspec.Struct, tag=True, array_like=True):
    """A message; it is encoded with its class name as a tag."""


class Part(msgspec.Struct, array_like=True):
    """A component of a message."""


# ---- driver -> shard ------------------------------------------------------------------------------------------------


class SlotSetup(Part):
    """Assigns a slot of the batch to a new sequence; the slot's former state is dropped. Filled by the Scheduler."""

    slot: int
    prompt_length: int
    """Random draws of a sparse method at positions below it use sample index 0, whichever sample computes the prompt."""
    prefill_length: int
    """Prompt tokens that are prefilled; length-dependent rope types use at least this as the sequence length."""
    seed: int
    sample_index: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    logprobs: int | None
    """Return log-probabilities of this many top tokens with each sampled one; None: none at all."""
    suppressed: list[int]
    """Token ids (EOS, stop_token_ids) that are not sampled at positions below `suppress_until`."""
    suppress_until: int


class DecodeRow(Part):
    """One token of a sequence through the decode path, which uses sparse attention."""

    slot: int
    position: int
    token: int | None
    """None: the token that the shard sampled last for this slot."""
    samples: list[int]
    """Slots that sample their next token from this row's logits; empty while the last prompt tokens are decoded."""
    target: int | None = None
    """The known next token, if its log-probability is wanted (prompt_logprobs)."""
    prompt_logprobs: int = 0
    """With `target`: also return this many top tokens; -1: the whole vocabulary."""
    trace: bool = False
    """Return a `TraceBlock` of this row from every rank: what its attention missed."""

    @property
    def num_tokens(self) -> int:
        return 1

    @property
    def end(self) -> int:
        """One past the position of its last token."""
        return self.position + 1


class PrefillChunk(Part):
    """Consecutive prompt tokens of one sequence, with dense attention."""

    slot: int
    start: int
    tokens: list[int]
    samples: list[int]
    """Slots that sample from the last token's logits; empty unless the chunk ends the prompt."""
    targets: list[int] | None = None
    """The next token of each of `tokens`, if known and prompt_logprobs are wanted."""
    prompt_logprobs: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def end(self) -> int:
        """One past the position of its last token."""
        return self.start + len(self.tokens)


class StepPlan(Message):
    """One step: changes since the last step, and the tokens to run. Shards apply the fields in order."""

    step: int
    generation: int
    setups: list[SlotSetup] = []
    new_pages: list[tuple[int, list[int]]] = []
    """(slot, page ids appended to its page table)."""
    page_copies: list[tuple[int, int]] = []
    """(from, to): the whole page with its metadata, in every layer."""
    decode: list[DecodeRow] = []
    prefill: list[PrefillChunk] = []
    report: bool = False
    """Return a `ShardReport` with the result."""
    profile: bool = False
    """Measure select, attend and all-reduce in this step, which synchronises the device."""

    @property
    def parts(self) -> list[DecodeRow | PrefillChunk]:
        """The batch in order: decode rows, then prompt chunks."""
        return [*self.decode, *self.prefill]

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens of all prompt chunks."""
        return sum(chunk.num_tokens for chunk in self.prefill)

    @property
    def num_ids(self) -> int:
        """Number of token and page ids in it, which determines its encoded size besides the number of rows."""
        tokens = sum(len(chunk.tokens) + len(chunk.targets or ()) for chunk in self.prefill)
        return tokens + sum(len(pages) for _, pages in self.new_pages) + 2 * len(self.page_copies)


class Join(Message):
    """All ranks have sent equal `Hello`s: set up the collectives and load the weights unless loaded."""


class Regroup(Message):
    """Another rank has failed: send `Hello` for this generation. The old collective group is left at the next `Join`."""

    generation: int


class AllocateCache(Message):
    """Allocate the cache with as many pages as fit on every rank, the null page (page 0) included."""

    num_pages: int


class Stop(Message):
    """Return from `run_shard`."""


# ---- shard -> driver ------------------------------------------------------------------------------------------------


class Hello(Message):
    """A shard's first message. Ranks with different versions or weights are refused with an error that names them."""

    rank: int
    generation: int
    node_id: str
    hostname: str
    pid: int
    versions: dict[str, str]
    weights_fingerprint: str


class Alive(Message):
    """Heartbeat. A stopped process, or one whose node is lost, sends none."""

    rank: int


class Loaded(Message):
    """The weights are loaded."""

    rank: int
    device: str
    dtype: str
    """dtype of weights and cache, such as "float16"."""
    kv_heads: tuple[int, int]
    """This rank's KV heads: first, and one past the last."""
    weight_bytes: int
    page_bytes: int
    """Bytes of one page over all layers of this rank: K, V and metadata."""
    max_pages: int
    """Pages that fit into this rank's memory."""
    evict_window: tuple[int, int] | None = None
    """(sink, recent) pages, if the method reads no others at decode, so the Driver frees them; None: no pages are freed."""
    copy_on_fork: bool = False
    """Whether samples of a request must not share pages, since the method modifies pages as it reads them."""


class Ready(Message):
    """The cache is allocated and warm-up is done; the shard accepts a `StepPlan`."""

    rank: int
    cache_bytes: int
    metadata_bytes: int


class LogprobBlock(Part):
    """Log-probabilities at consecutive positions of one slot, as little-endian arrays for `numpy.frombuffer`."""

    slot: int
    position: int
    """Position of the token that the first row predicts."""
    rows: int
    width: int
    token_ids: bytes
    """int32 [rows, width]: the sampled or target token, then the top tokens; empty if a row is the whole vocabulary."""
    logprobs: bytes
    """float32 [rows, width]."""
    ranks: bytes
    """int32 [rows]: 1-based rank of the sampled or target token among all."""


class LayerTraceBlock(Part):
    """One layer's attention of a traced row over this rank's heads, as little-endian arrays. See `trace.LayerTrace`."""

    captured_mass: bytes
    """float32 [H_q], as the next two."""
    relative_error: bytes
    entropy: bytes
    tokens_for_mass: bytes
    """int32 [H_q, 4]."""
    counts: bytes
    """int32 [H_kv]."""
    indices: bytes
    """int32, concatenated over KV heads, without heads that attend their whole context."""
    details: dict[str, bytes]
    """float32 [H_kv] or [H_q]."""


class TraceBlock(Part):
    """The trace of one decode row on one rank."""

    slot: int
    position: int
    num_kv_heads: int
    """Number of KV heads on this rank."""
    layers: list[LayerTraceBlock]


class ShardReport(Part):
    """This rank's counters since the start of the generation."""

    rows_dense: int
    rows_sparse: int
    tokens_attended: list[list[int]]
    """[layer][local KV head], over all decode rows."""
    tokens_in_context: int
    """What each of these heads would have attended with dense attention."""
    bytes_read: int
    """KV cache bytes read by decode attention and selection: K, V of attended tokens and the metadata scored."""
    all_reduce_calls: int
    all_reduce_bytes: int
    time_ms: dict[str, float]
    """Means per profile step in ms: shard, append, select, attend, all_reduce, and the parts of select."""


class BadLogits(Part):
    """One sequence's logits are NaN or infinite; the Driver ends its request."""

    slot: int
    position: int
    """Position of the input token."""
    value: float
    """The largest logit, or the offending value of the token's hidden state."""


class StepResult(Message):
    """The result of a step. Tokens, bad logits and log-probabilities come from rank 0 only, traces from every rank."""

    step: int
    rank: int
    tokens: list[int] = []
    """One per entry of every `samples` list: decode rows in order, then prefill chunks in order. Always valid token ids, even
    where the logits are bad, since the step queued behind this one feeds them."""
    bad_logits: list[BadLogits] = []
    logprobs: list[LogprobBlock | None] = []
    """One entry per token in `tokens`; empty if no slot wants log-probabilities."""
    prompt_logprobs: list[LogprobBlock] = []
    traces: list[TraceBlock] = []
    """One per traced decode row, in the plan's order; from every rank."""
    started: float = 0.0
    """When the rank began the plan, on its machine's monotonic clock."""
    step_ms: float = 0.0
    report: ShardReport | None = None
    prefill_from_store: int = 0
    """Prompt tokens of the plan that were read from the prefill store instead of computed; the same on every rank."""


class Failed(Message):
    """This rank failed. `error` is shown to the user; the traceback is logged."""

    rank: int
    error: str
    traceback: str = ""
    waits: bool = False
    """Only its collective group broke off, and the process waits for `Regroup`. If False, the process ends."""


ToShard = StepPlan | Join | AllocateCache | Regroup | Stop
FromShard = Hello | Alive | Loaded | Ready | StepResult | Failed

encode = msgspec.msgpack.Encoder().encode
decode_to_shard = msgspec.msgpack.Decoder(ToShard).decode
decode_from_shard = msgspec.msgpack.Decoder(FromShard).decode
