"""The only messages that cross between the Driver and a shard: msgspec structs in msgpack, deltas only.

Start-up: shard `Hello` -> driver checks it, `Join` -> shard `Loaded` -> driver `AllocateCache` -> shard `Ready`.
Then one `StepPlan` down and one `StepResult` up per step, until `Stop`, or `Failed`. After another rank's failure the driver
sends `Regroup`, and the start-up begins again with the `Hello` of the next generation. From its first word on a shard also
says `Alive`, from a thread of its own.
"""

from __future__ import annotations

import msgspec


class Message(msgspec.Struct, tag=True, array_like=True):
    """A message; its class name travels with it."""


class Part(msgspec.Struct, array_like=True):
    """A piece of a message."""


# ---- driver -> shard ------------------------------------------------------------------------------------------------


class SlotSetup(Part):
    """A slot of the batch is given to a new sequence: whatever it held before is forgotten. Filled by the Scheduler."""

    slot: int
    prompt_length: int
    """Positions below it are the prompt's: what a method draws for them is sample 0's, whichever sample computes it."""
    prefill_length: int
    """Prompt tokens that are prefilled at once in effect: what length-dependent rope types count as the length."""
    seed: int
    sample_index: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    logprobs: int | None
    """Log-probabilities of so many best tokens beside each sampled one (None: none at all)."""
    suppressed: list[int]
    """Token ids (EOS, stop_token_ids) that may not be sampled at positions below `suppress_until`."""
    suppress_until: int


class DecodeRow(Part):
    """One token of a sequence through the decode path, where the sparse method applies."""

    slot: int
    position: int
    token: int | None
    """None: the token that the shard itself sampled last for this slot."""
    samples: list[int]
    """Slots that sample their next token from this row's logits: none while a prompt's last tokens are decoded."""
    target: int | None = None
    """The known next token, whose log-probability is wanted (prompt_logprobs)."""
    prompt_logprobs: int = 0
    """With `target`: so many best tokens beside it; -1: the whole vocabulary."""
    trace: bool = False
    """Say what this row's attention missed: a `TraceBlock` from every rank."""

    @property
    def num_tokens(self) -> int:
        return 1

    @property
    def end(self) -> int:
        """One past the position of its last token."""
        return self.position + 1


class PrefillChunk(Part):
    """Consecutive prompt tokens of one sequence, attended densely."""

    slot: int
    start: int
    tokens: list[int]
    samples: list[int]
    """Slots that sample from the last token's logits: non-empty only where the chunk ends the prompt."""
    targets: list[int] | None = None
    """The tokens that follow each of `tokens`, as far as they are known (prompt_logprobs)."""
    prompt_logprobs: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def end(self) -> int:
        """One past the position of its last token."""
        return self.start + len(self.tokens)


class StepPlan(Message):
    """One step: what changed since the last one, and which tokens run. Applied in the order of the fields."""

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
    """Answer with a `ShardReport`."""
    profile: bool = False
    """Take the times of select, attend and all-reduce in this step (synchronises the device)."""

    @property
    def parts(self) -> list[DecodeRow | PrefillChunk]:
        """What runs, in the order of the batch: decode rows, then prompt chunks."""
        return [*self.decode, *self.prefill]

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens of all prompt chunks."""
        return sum(chunk.num_tokens for chunk in self.prefill)

    @property
    def num_ids(self) -> int:
        """Tokens and pages that it names: what its size on the wire grows with, beside its rows."""
        tokens = sum(len(chunk.tokens) + len(chunk.targets or ()) for chunk in self.prefill)
        return tokens + sum(len(pages) for _, pages in self.new_pages) + 2 * len(self.page_copies)


class Join(Message):
    """Every rank has said hello, and they agree: meet the others, and load what is not loaded yet."""


class Regroup(Message):
    """Another rank has failed: say hello as a rank of this generation. The old collective group is left when they meet."""

    generation: int


class AllocateCache(Message):
    """The number of pages that every rank has room for (page 0, the null page, included)."""

    num_pages: int


class Stop(Message):
    """End run() in good order."""


# ---- shard -> driver ------------------------------------------------------------------------------------------------


class Hello(Message):
    """First word of a shard. Ranks with unequal versions or weights are refused by name."""

    rank: int
    generation: int
    node_id: str
    hostname: str
    pid: int
    versions: dict[str, str]
    weights_fingerprint: str


class Alive(Message):
    """This process runs, whatever it is busy with: one that has been stopped, or whose node has gone, falls silent."""

    rank: int


class Loaded(Message):
    """The weights are in place."""

    rank: int
    device: str
    dtype: str
    """Of weights and cache, such as "float16"."""
    kv_heads: tuple[int, int]
    """This rank's KV heads: first, and one past the last."""
    weight_bytes: int
    page_bytes: int
    """Bytes of one page over all layers of this rank: K, V and metadata."""
    max_pages: int
    """Pages that fit into this rank's memory."""
    evict_window: tuple[int, int] | None = None
    """(sink, recent) pages where the method reads no others at decode, so that the Driver frees them; None: all are kept."""
    copy_on_fork: bool = False
    """Whether samples of a request may not share pages, since the method changes what it keeps in them as it reads."""


class Ready(Message):
    """The cache is allocated, warm-up is done; a StepPlan may come."""

    rank: int
    cache_bytes: int
    metadata_bytes: int


class LogprobBlock(Part):
    """Log-probabilities for consecutive positions of one slot, as little-endian arrays: numpy.frombuffer reads them."""

    slot: int
    position: int
    """Position of the predicted token of the first row."""
    rows: int
    width: int
    token_ids: bytes
    """int32 [rows, width]: the sampled or target token, then the best ones; empty where the row is the whole vocabulary."""
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
    """int32: one KV head's after the other's, without those of heads that read all of their context."""
    details: dict[str, bytes]
    """float32 [H_kv] or [H_q]."""


class TraceBlock(Part):
    """A traced row on one rank."""

    slot: int
    position: int
    num_kv_heads: int
    """Of this rank."""
    layers: list[LayerTraceBlock]


class ShardReport(Part):
    """What this rank has counted since it started."""

    rows_dense: int
    rows_sparse: int
    tokens_attended: list[list[int]]
    """[layer][local KV head], over all decode rows."""
    tokens_in_context: int
    """What each of them would have attended if dense."""
    bytes_read: int
    """Cache bytes that decode attention and selection read: K, V of attended tokens and the metadata scored."""
    all_reduce_calls: int
    all_reduce_bytes: int
    time_ms: dict[str, float]
    """Means per profile step in ms: shard, append, select, attend, all_reduce, and the parts of select."""


class BadLogits(Part):
    """Logits of one sequence that are NaN or infinite: its request ends."""

    slot: int
    position: int
    """Of the token that was read."""
    value: float
    """What the best logit is, or the token's hidden state."""


class StepResult(Message):
    """What a rank did. Only rank 0 fills tokens, bad logits and log-probabilities; every rank its traces."""

    step: int
    rank: int
    tokens: list[int] = []
    """One per entry of every `samples` list: decode rows in order, then prefill chunks in order. Always ids of the vocabulary:
    where the logits are bad, the step that is already queued behind this one needs one, too."""
    bad_logits: list[BadLogits] = []
    logprobs: list[LogprobBlock | None] = []
    """Beside each of `tokens` (empty if no slot wants any)."""
    prompt_logprobs: list[LogprobBlock] = []
    traces: list[TraceBlock] = []
    """From every rank: one per decode row that is traced, in the plan's order."""
    started: float = 0.0
    """When the rank began with the plan, on its machine's monotonic clock."""
    step_ms: float = 0.0
    report: ShardReport | None = None
    prefill_from_store: int = 0
    """Prompt tokens of the plan that were read from the prefill store and not computed; the same on every rank."""


class Failed(Message):
    """This rank could not do what it was told; `error` is for the user, with the traceback behind it."""

    rank: int
    error: str
    traceback: str = ""
    waits: bool = False
    """Only its collective group has broken: the process waits for `Regroup`. Otherwise it ends."""


ToShard = StepPlan | Join | AllocateCache | Regroup | Stop
FromShard = Hello | Alive | Loaded | Ready | StepResult | Failed

encode = msgspec.msgpack.Encoder().encode
decode_to_shard = msgspec.msgpack.Decoder(ToShard).decode
decode_from_shard = msgspec.msgpack.Decoder(FromShard).decode
