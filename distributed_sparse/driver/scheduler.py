"""Scheduler: decides which sequences run in the next step, with which tokens and pages. Pure Python, no torch, no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from distributed_sparse.driver.pages import NULL_PAGE, PageAllocator, pages_for
from distributed_sparse.driver.requests import Request, Sequence
from distributed_sparse.protocol.step import DecodeRow, PrefillChunk, SlotSetup, StepPlan


@dataclass(frozen=True)
class ScheduledStep:
    """A step plan whose result has not been committed."""

    plan: StepPlan
    sequences: dict[int, Sequence]
    """Slot -> sequence at scheduling time, for the plan's parts and their samples; slots may be reused since."""


@dataclass(frozen=True)
class Committed:
    """The result of one step for one sequence."""

    sequence: Sequence
    token: int | None
    """The new token; None at the end of a prompt that is only scored."""
    place: int
    """Index of the token in `StepResult.tokens`."""


class Scheduler:
    """Continuous batching with chunked prefill, first come first served.

    `add` a request, `schedule` a step, `commit` its tokens, `finish` a sequence. Each step has one token budget
    (`max_num_batched_tokens`): every running sequence decodes one token, and the rest goes to prompt chunks, oldest request
    first. A request is admitted when it gets a slot per sample and can reserve every page that it may ever need, so there is no
    preemption.

    The next step may be scheduled before the last one is committed (vLLM's async scheduling). A token that is still to be
    sampled is then an output placeholder, and the shards feed their own sampled token. A sequence that turns out to have ended
    has run one step too many; the extra token is dropped. `finish` frees its pages and slot at once, although plans in flight
    still use them: shards run steps in order, so those plans are done before a later plan's sequence writes there.

    A request that ran before a rebuild is replayed: its prompt in the same chunks, and its output tokens one per step through
    the decode path, as they were computed at first. Replayed tokens count against the budget like any others.

    Args:
        evict_window: (sink, recent) pages. Set if the method never reads other pages at decode, so they are freed; None: no
            pages are freed.
        trace: whether decode rows are traced; `trace_steps` of a request restricts it.
        copy_on_fork: whether samples get copies of the prompt's pages, since the method modifies pages as it reads them.
        chunk_multiple: a chunk that the budget cuts ends at a multiple of this many tokens, and is left to a later step if the
            rest of the budget does not reach one. Chunk borders then do not depend on the number of decode rows, so a prefill
            store finds the chunks again.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        *,
        page_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        evict_window: tuple[int, int] | None = None,
        copy_on_fork: bool = False,
        trace: bool = False,
        chunk_multiple: int = 1,
    ) -> None:
        assert evict_window is None or evict_window[1] > 0, "the page being written is always kept"
        self.allocator = allocator
        self.page_size = page_size
        self.max_num_batched_tokens = max_num_batched_tokens
        self.evict_window = evict_window
        self.copy_on_fork = copy_on_fork
        self.trace = trace
        self.chunk_multiple = chunk_multiple
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._by_slot: dict[int, Sequence] = {}
        self._new_pages: list[tuple[int, list[int]]] = []
        self._page_copies: list[tuple[int, int]] = []
        self.in_flight: deque[ScheduledStep] = deque()
        """Steps with tokens that have been scheduled and not committed, oldest first."""
        self.replayed_tokens = 0
        self._rows_waited = False  # the last step's budget had no room for some decode rows

    # ---- add

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: it could never run: its reservation exceeds the whole cache.
        """
        self.check_fits(request)
        self.waiting.append(request)

    def check_fits(self, request: Request) -> None:
        """Raise ValueError if a request can never run: its reservation exceeds the whole cache."""
        shared, private = self._reservation(request)
        needed = shared + private * len(request.unfinished)
        if needed > self.allocator.total:
            raise ValueError(
                f"the request needs {needed} pages of {self.page_size} tokens (prompt of {len(request.prompt_token_ids)} "
                f"tokens, max_tokens={request.max_tokens}, n={request.num_samples}), but the cache has {self.allocator.total}; "
                "lower max_tokens or n, or raise kv_cache_memory_bytes"
            )

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    # ---- schedule

    def schedule(self, step: int, generation: int) -> StepPlan:
        """The next step plan. Its sequences hold the page ids and slots that it names from now on.

        The plan is empty if every running sequence needs the result of a step that is not committed yet.
        """
        plan = StepPlan(step=step, generation=generation)
        while self.waiting and self.waiting[0].replays and self._admit(self.waiting[0], plan):
            self.running.append(self.waiting.popleft())  # these were running before the rebuild
        budget = self.max_num_batched_tokens
        prompts = [request for request in self.running if request.leader.in_prefill]
        replayed = next((request for request in prompts if request.leader.replays_next), None)
        # A chunk is replayed with its original length. If decode rows came first, the rest of the budget might never be large
        # enough, so the chunk goes first, but not in two consecutive steps.
        if replayed is not None and not self._rows_waited:
            budget -= self._prefill(replayed, budget, plan)
            prompts.remove(replayed)
        budget -= self._decode(budget, plan)
        for request in prompts:
            budget -= self._prefill(request, budget, plan)
        while budget > 0 and self.waiting and self._admit(self.waiting[0], plan):
            request = self.waiting.popleft()
            self.running.append(request)
            budget -= self._prefill(request, budget, plan)
        if plan.parts:
            plan.new_pages, self._new_pages = self._new_pages, []
            plan.page_copies, self._page_copies = self._page_copies, []
            self._advance(plan)
        return plan

    def _advance(self, plan: StepPlan) -> None:
        """Update the sequences as if the plan had run, so that the next one can be scheduled."""
        slots = {slot for part in plan.parts for slot in (part.slot, *part.samples)}
        self.in_flight.append(ScheduledStep(plan, {slot: self._by_slot[slot] for slot in slots}))
        for part in plan.parts:
            sequence = self._by_slot[part.slot]
            sequence.num_computed = part.end
            for slot in part.samples:
                self._by_slot[slot].num_output_placeholders += 1
            if part.end == len(sequence.request.prompt_token_ids):
                for sibling in sequence.request.unfinished:
                    if sibling is not sequence:
                        self._fork(sequence, sibling)

    def _decode(self, budget: int, plan: StepPlan) -> int:
        """Add a decode row for every sequence that decodes, up to the budget; return the number of rows."""
        ready = [
            sequence
            for sequence in self._running_sequences()
            if not sequence.in_prefill and sequence.num_computed < sequence.ends_at
        ]
        plan.decode = [self._decode_row(sequence) for sequence in ready[:budget]]
        self._rows_waited = len(ready) > budget
        return len(plan.decode)

    def _running_sequences(self) -> Iterator[Sequence]:
        """Sequences that hold pages: only the leader while a request's prompt is not computed."""
        for request in self.running:
            leader = request.leader
            for sequence in request.unfinished:
                if sequence is leader or sequence.forked:
                    yield sequence

    def _decode_row(self, sequence: Sequence) -> DecodeRow:
        request, position = sequence.request, sequence.num_computed
        self._evict(sequence, position + 1)
        self._grow(sequence, position + 1)
        row = DecodeRow(slot=sequence.slot, position=position, token=None, samples=[])
        if sequence.in_prompt or position < sequence.known_end:
            row.token = sequence.token(position)
        if sequence.replays_next:
            return row
        row.trace = self.trace and request.traces(position)
        wanted = request.params.prompt_logprobs
        if wanted is not None and request.first_scored <= position + 1 < len(request.prompt_token_ids):
            row.target, row.prompt_logprobs = request.prompt_token_ids[position + 1], wanted
        if position == sequence.num_tokens_with_placeholders - 1:
            row.samples = self._samples(sequence)
        return row

    def _samples(self, sequence: Sequence) -> list[int]:
        """Slots that sample from this sequence's last logits: those of all the request's samples at the end of the prompt."""
        if sequence.request.score:
            return []
        if sequence.output_token_ids or sequence.num_output_placeholders:
            return [sequence.slot]
        return [sibling.slot for sibling in sequence.request.unfinished]

    def _prefill(self, request: Request, budget: int, plan: StepPlan) -> int:
        """Add the request's next prompt chunk to the plan; return its number of tokens."""
        sequence = request.leader
        if not sequence.in_prefill or budget <= 0:
            return 0
        start = sequence.num_computed
        if sequence.replays_next:
            end = next(border for border in request.chunk_borders if border > start)
            if end > start + budget:
                return 0
        else:
            end = min(request.prefill_length, start + budget)
            if end < request.prefill_length:
                border = end - end % self.chunk_multiple
                if border <= start and plan.prefill:
                    return 0
                end = border if border > start else end  # a budget below one multiple, or this chunk would never run
        prompt = request.prompt_token_ids
        self._grow(sequence, end)
        ends_known = end == sequence.num_tokens
        chunk = PrefillChunk(sequence.slot, start, prompt[start:end], self._samples(sequence) if ends_known else [])
        if request.params.prompt_logprobs is not None and end >= request.first_scored and not sequence.replays_next:
            chunk.targets, chunk.prompt_logprobs = prompt[start + 1 : end + 1], request.params.prompt_logprobs
        plan.prefill.append(chunk)
        return end - start

    def _admit(self, request: Request, plan: StepPlan) -> bool:
        """Give the request its slots and reserve its pages. Return False, changing nothing, if there are too few."""
        sequences = request.unfinished
        shared, private = self._reservation(request)
        if len(self._free_slots) < len(sequences) or not self.allocator.reserve(shared + private * len(sequences)):
            return False
        params = request.params
        suppressed = sorted(request.stop_token_ids) if params.min_tokens > 0 else []
        for sequence in sequences:
            sequence.slot = self._free_slots.pop()
            self._by_slot[sequence.slot] = sequence
            plan.setups.append(
                SlotSetup(
                    slot=sequence.slot,
                    prompt_length=len(request.prompt_token_ids),
                    prefill_length=request.prefill_length,
                    seed=request.seed,
                    sample_index=sequence.index,
                    temperature=params.temperature,
                    top_p=params.top_p,
                    top_k=params.top_k,
                    min_p=params.min_p,
                    logprobs=params.logprobs,
                    suppressed=suppressed,
                    suppress_until=len(request.prompt_token_ids) + params.min_tokens,
                )
            )
        return True

    def _reservation(self, request: Request) -> tuple[int, int]:
        """The most pages that the request can hold: (full prompt pages shared by its samples, other pages per sample).

        With eviction, too, `take` never exceeds it: until its prefill ends, and when it forks, a sample holds at most the
        prompt's pages. After that it grows only in `_decode_row`, which evicts first, so it holds at most sink + recent pages.
        """
        prompt = len(request.prompt_token_ids)
        shared = 0 if self.copy_on_fork else prompt // self.page_size
        private = pages_for(prompt + request.max_tokens, self.page_size) - shared
        if self.evict_window is not None:
            private = min(private, max(pages_for(prompt, self.page_size) - shared, sum(self.evict_window)))
        return shared, private

    def _evict(self, sequence: Sequence, num_tokens: int) -> None:
        """Free the pages outside the eviction window of a `num_tokens` long context; later steps do not read them either."""
        if self.evict_window is None:
            return
        sink, recent = self.evict_window
        start, end = max(sequence.evicted_end, sink), pages_for(num_tokens, self.page_size) - recent
        if end > start:
            self.allocator.release(sequence.pages[start:end])
            sequence.pages[start:end] = [NULL_PAGE] * (end - start)
            sequence.evicted_end = end

    def _grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Allocate the pages that the sequence lacks for its first `num_tokens` tokens."""
        missing = pages_for(num_tokens, self.page_size) - len(sequence.pages)
        if missing > 0:
            pages = self.allocator.take(missing)
            sequence.pages += pages
            self._new_pages.append((sequence.slot, pages))

    # ---- commit

    def commit(self, plan: StepPlan, tokens: list[int]) -> list[Committed]:
        """Append the oldest step's sampled tokens to their sequences.

        Args:
            plan: the oldest plan in flight.
            tokens: one per entry of the plan's `samples` lists, in order.

        Returns:
            One entry per new token, and per scored prompt that has ended; none for sequences that have finished since.
        """
        if not plan.parts:
            return []
        assert self.in_flight[0].plan is plan, "steps are committed in the order in which they were scheduled"
        sequences = self.in_flight.popleft().sequences
        assert len(tokens) == sum(len(part.samples) for part in plan.parts), (
            "the step result's tokens do not match the plan's samples"
        )
        committed: list[Committed] = []
        place = -1
        for part in plan.parts:
            sequence = sequences[part.slot]
            if sequence.finish_reason is None:
                self._commit_part(sequence, part)
            for slot in part.samples:
                place += 1
                sampled = sequences[slot]
                if sampled.finish_reason is None:
                    sampled.num_output_placeholders -= 1
                    sampled.output_token_ids.append(tokens[place])
                    committed.append(Committed(sampled, tokens[place], place))
            if sequence.finish_reason is None and sequence.request.score and part.end == sequence.ends_at:
                committed.append(Committed(sequence, None, place))
        return committed

    def _commit_part(self, sequence: Sequence, part: DecodeRow | PrefillChunk) -> None:
        """Record that a part's tokens are in the cache."""
        request = sequence.request
        if sequence.replays:
            request.metrics.num_replayed_tokens += part.num_tokens
            self.replayed_tokens += part.num_tokens
        elif isinstance(part, PrefillChunk):
            request.chunk_borders.append(part.end)
        sequence.num_committed = part.end
        if part.end == len(request.prompt_token_ids):
            for sibling in request.unfinished:
                sibling.num_committed = part.end

    def _fork(self, parent: Sequence, child: Sequence) -> None:
        """Share the parent's full pages with the child and copy the partial one, or copy all. Sent with the next plan."""
        shared = 0 if self.copy_on_fork else parent.num_computed // self.page_size
        child.pages = parent.pages[:shared]
        self.allocator.share(child.held_pages)
        for page in parent.pages[shared:]:
            (own,) = self.allocator.take(1) if page != NULL_PAGE else (NULL_PAGE,)
            child.pages.append(own)
            if own != NULL_PAGE:
                self._page_copies.append((page, own))
        self._new_pages.append((child.slot, list(child.pages)))
        child.num_computed, child.evicted_end = parent.num_computed, parent.evicted_end
        child.forked = True

    # ---- finish

    def finish(self, sequence: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """End a sequence and free its pages and its slot for the next plan."""
        request = sequence.request
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        if sequence.slot < 0:  # never admitted
            if request.finished:
                self.waiting.remove(request)
            return
        self.allocator.release(sequence.held_pages)
        # Drop a fork that has not been sent to the shards: its pages may belong to another sequence by then.
        self._new_pages = [entry for entry in self._new_pages if entry[0] != sequence.slot]
        held = set(sequence.pages)
        self._page_copies = [copy for copy in self._page_copies if copy[1] not in held]
        sequence.pages = []
        shared, private = self._reservation(request)
        self.allocator.unreserve(private)
        del self._by_slot[sequence.slot]
        self._free_slots.append(sequence.slot)
        if request.finished:
            self.allocator.unreserve(shared)
            self.running.remove(request)
