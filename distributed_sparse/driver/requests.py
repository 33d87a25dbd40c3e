"""Request and Sequence: what the Driver remembers of work in progress: all that a rebuild needs, and that a journal would."""

from __future__ import annotations

from dataclasses import dataclass, field

from distributed_sparse.driver.detokenizer import CompletionText
from distributed_sparse.driver.pages import NULL_PAGE
from distributed_sparse.metrics import RequestMetrics
from distributed_sparse.sampling_params import SamplingParams


@dataclass(eq=False)
class Request:
    """A prompt and how to go on from it. Owned by the Driver; the Scheduler moves it from waiting to running."""

    request_id: str
    client_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    max_tokens: int
    """Tokens to sample at most; 0 where the prompt is only scored."""
    metrics: RequestMetrics
    stop_token_ids: frozenset[int]
    """Ids that end a sequence: EOS (unless ignored) and the caller's."""
    deadline: float | None = None
    first_scored: int = 1
    """Prefill chunks that predict no token from this one on compute no prompt_logprobs."""
    profile: bool = False
    """Its decode steps take the times of their parts."""
    chunk_borders: list[int] = field(default_factory=list)
    """Where each prefill chunk ended: after a rebuild it is prefilled with the same ones."""
    sequences: list[Sequence] = field(init=False)

    def __post_init__(self) -> None:
        self.sequences = [Sequence(self, index) for index in range(self.num_samples)]

    @property
    def num_samples(self) -> int:
        return 1 if self.score else self.params.n

    @property
    def prefill_length(self) -> int:
        """Prompt tokens that are prefilled; the rest of the prompt goes through sparse decode, one token per step."""
        return len(self.prompt_token_ids) - self.params.decode_last_prompt_tokens

    @property
    def score(self) -> bool:
        """Only the log-probabilities of the prompt are wanted."""
        return self.max_tokens == 0

    def traces(self, position: int) -> bool:
        """Whether the decode step at a position is one that an engine with trace=True records."""
        steps = self.params.trace_steps
        return steps is None or position - self.prefill_length in steps

    @property
    def unfinished(self) -> list[Sequence]:
        return [sequence for sequence in self.sequences if sequence.finish_reason is None]

    @property
    def leader(self) -> Sequence:
        """The sample that computes the prompt; the others fork from it at the prompt's end. The first that is unfinished."""
        return next(sequence for sequence in self.sequences if sequence.finish_reason is None)

    @property
    def finished(self) -> bool:
        return not self.unfinished

    @property
    def replays(self) -> bool:
        """Some of its tokens were computed before, on shards that have lost them."""
        return any(sequence.replays for sequence in self.unfinished)

    def restart(self) -> None:
        """Nothing of it is in a cache any more: all that it has computed is to be replayed, and then it goes on."""
        for sequence in self.unfinished:
            sequence.restart()


@dataclass(eq=False)
class Sequence:
    """One of a request's `n` samples. One of them computes the prompt, the others fork from it at the prompt's end."""

    request: Request
    index: int
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    """Page ids in logical order; the null page where one has been evicted."""
    evicted_end: int = 0
    """One past the last evicted logical page; those before it, down to the sink pages, are gone too."""
    num_computed: int = 0
    """Tokens whose keys and values are in the cache once every plan that has been made has run."""
    num_committed: int = 0
    """Those of them whose step's result has been taken in."""
    num_output_placeholders: int = 0
    """Output tokens that plans sample whose results have not been taken in."""
    replay_end: int = 0
    """Tokens that were computed before the last rebuild: up to there the same steps are taken again, and nothing is sampled,
    scored or traced, since it has been published."""
    known_end: int = 0
    """Output tokens before this position were sampled before the last rebuild: the shards have to be told."""
    output_token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    text: CompletionText | None = None
    published_tokens: int = 0
    last_token_time: float | None = None
    forked: bool = False
    """Its pages are its own; False for the leader, and for one that still waits for the prompt to be computed."""

    @property
    def held_pages(self) -> list[int]:
        """The pages that it has a reference to."""
        return [page for page in self.pages if page != NULL_PAGE]

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_tokens_with_placeholders(self) -> int:
        """Its tokens when every plan that has been made has run."""
        return self.num_tokens + self.num_output_placeholders

    @property
    def ends_at(self) -> int:
        """Tokens that it computes if nothing stops it: all but the last one sampled."""
        return len(self.request.prompt_token_ids) + max(self.request.max_tokens - 1, 0)

    @property
    def replays(self) -> bool:
        """It has not come again to where it was before the last rebuild."""
        return self.num_committed < self.replay_end

    @property
    def replays_next(self) -> bool:
        """The next token to be computed was computed before the last rebuild."""
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
