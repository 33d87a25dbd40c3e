"""Request and Sequence: the Driver's state of unfinished requests, sufficient to replay them after a rebuild."""

from __future__ import annotations

from dataclasses import dataclass, field

from distributed_sparse.driver.detokenizer import CompletionText
from distributed_sparse.driver.pages import NULL_PAGE
from distributed_sparse.metrics import RequestMetrics
from distributed_sparse.sampling_params import SamplingParams


@dataclass(eq=False)
class Request:
    """A prompt with its parameters and samples. Owned by the Driver; the Scheduler moves it from waiting to running."""

    request_id: str
    client_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    max_tokens: int
    """Maximum number of tokens to sample; 0 if the prompt is only scored."""
    metrics: RequestMetrics
    stop_token_ids: frozenset[int]
    """Token ids that end a sequence: EOS (unless `ignore_eos`) and `stop_token_ids`."""
    deadline: float | None = None
    first_scored: int = 1
    """First prompt token whose log-probability is wanted; prefill chunks that end before it compute no prompt_logprobs."""
    profile: bool = False
    """Its decode steps are profile steps."""
    chunk_borders: list[int] = field(default_factory=list)
    """End position of each prefill chunk; a replay uses the same chunks."""
    sequences: list[Sequence] = field(init=False)

    def __post_init__(self) -> None:
        self.sequences = [Sequence(self, index) for index in range(self.num_samples)]

    @property
    def num_samples(self) -> int:
        return 1 if self.score else self.params.n

    @property
    def prefill_length(self) -> int:
        """Prompt tokens that are prefilled. The rest (`decode_last_prompt_tokens`) go through sparse decode, one per step."""
        return len(self.prompt_token_ids) - self.params.decode_last_prompt_tokens

    @property
    def score(self) -> bool:
        """Whether only the prompt's log-probabilities are computed."""
        return self.max_tokens == 0

    def traces(self, position: int) -> bool:
        """Whether an engine with trace=True records the decode step at this position."""
        steps = self.params.trace_steps
        return steps is None or position - self.prefill_length in steps

    @property
    def unfinished(self) -> list[Sequence]:
        return [sequence for sequence in self.sequences if sequence.finish_reason is None]

    @property
    def leader(self) -> Sequence:
        """The first unfinished sample. It computes the prompt; the others fork from it at the prompt's end."""
        return next(sequence for sequence in self.sequences if sequence.finish_reason is None)

    @property
    def finished(self) -> bool:
        return not self.unfinished

    @property
    def replays(self) -> bool:
        """Whether some of its tokens are still to be recomputed after a rebuild."""
        return any(sequence.replays for sequence in self.unfinished)

    def restart(self) -> None:
        """Prepare for a replay on shards with empty caches."""
        for sequence in self.unfinished:
            sequence.restart()


@dataclass(eq=False)
class Sequence:
    """One of a request's `n` samples."""

    request: Request
    index: int
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    """Page ids in logical order; the null page for evicted ones."""
    evicted_end: int = 0
    """One past the last evicted logical page. The pages before it are evicted, too, down to the sink pages."""
    num_computed: int = 0
    """Tokens in the KV cache once all scheduled plans have run."""
    num_committed: int = 0
    """Tokens in the KV cache after the last committed step."""
    num_output_placeholders: int = 0
    """Output tokens that plans in flight sample."""
    replay_end: int = 0
    """Tokens computed before the last rebuild. They are recomputed in the same steps, without sampling, scoring or tracing,
    since the results have been published."""
    known_end: int = 0
    """Positions below it have tokens from before the last rebuild, which plans must name: the shards did not sample them."""
    output_token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    text: CompletionText | None = None
    published_tokens: int = 0
    last_token_time: float | None = None
    forked: bool = False
    """Whether it holds pages of its own. False for the leader, and until the leader has computed the prompt."""

    @property
    def held_pages(self) -> list[int]:
        """The pages that it holds a reference to."""
        return [page for page in self.pages if page != NULL_PAGE]

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_tokens_with_placeholders(self) -> int:
        """Number of tokens once all scheduled plans have run."""
        return self.num_tokens + self.num_output_placeholders

    @property
    def ends_at(self) -> int:
        """Number of tokens that it computes unless it stops early: all but the last sampled one."""
        return len(self.request.prompt_token_ids) + max(self.request.max_tokens - 1, 0)

    @property
    def replays(self) -> bool:
        """Whether it is still recomputing tokens from before the last rebuild (committed steps)."""
        return self.num_committed < self.replay_end

    @property
    def replays_next(self) -> bool:
        """Whether the next token to schedule was computed before the last rebuild."""
        return self.num_computed < self.replay_end

    @property
    def in_prefill(self) -> bool:
        return self.num_computed < self.request.prefill_length

    @property
    def in_prompt(self) -> bool:
        return self.num_computed < len(self.request.prompt_token_ids)

    def token(self, position: int) -> int:
        """The token at a position, of the prompt or of the output."""
        prompt = self.request.prompt_token_ids
        return prompt[position] if position < len(prompt) else self.output_token_ids[position - len(prompt)]

    def restart(self) -> None:
        """See `Request.restart`."""
        self.replay_end = max(self.replay_end, self.num_committed)
        self.known_end = self.num_tokens
        self.slot, self.pages, self.evicted_end = -1, [], 0
        self.num_computed, self.num_committed, self.num_output_placeholders = 0, 0, 0
        self.forked = False
