"""The scheduler says who runs and which pages they hold; a cache of tokens replays its plans and finds what it mixed up."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from distributed_sparse.driver.pages import NULL_PAGE, PageAllocator, pages_for
from distributed_sparse.driver.requests import Request, Sequence
from distributed_sparse.driver.scheduler import Scheduler
from distributed_sparse.metrics import RequestMetrics
from distributed_sparse.protocol.step import DecodeRow, PrefillChunk, StepPlan
from distributed_sparse.sampling_params import SamplingParams
from tests.support.scripted_group import VOCAB_SIZE, CacheModel, expected_tokens

PAGE_SIZE = 16
numbers = itertools.count()


def make_request(
    prompt: list[int], max_tokens: int = 4, stop_token_ids: frozenset[int] = frozenset(), **params: Any
) -> Request:
    """`max_tokens=0`: the prompt is only scored."""
    return Request(
        request_id=str(next(numbers)),
        client_id="c",
        prompt_token_ids=prompt,
        params=SamplingParams(**params),
        seed=0,
        max_tokens=max_tokens,
        metrics=RequestMetrics(0.0),
        stop_token_ids=stop_token_ids,
    )


class ReservedAllocator(PageAllocator):
    """Says at once when more pages are taken than were reserved, and not only where none is left."""

    def take(self, count: int) -> list[int]:
        assert self.used + count <= self.reserved, f"take({count}) with {self.used} used and {self.reserved} reserved"
        return super().take(count)


class Engine:
    """Scheduler and CacheModel, with the stop conditions of the Driver that matter here: stop tokens and max_tokens."""

    def __init__(
        self,
        num_pages: int = 64,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 64,
        evict_window: tuple[int, int] | None = None,
        copy_on_fork: bool = False,
        chunk_multiple: int = 1,
    ) -> None:
        self.num_pages = num_pages
        self.evict_window = evict_window
        self._settings: dict[str, Any] = {
            "page_size": PAGE_SIZE,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "evict_window": evict_window,
            "copy_on_fork": copy_on_fork,
            "chunk_multiple": chunk_multiple,
        }
        self._come_up()
        self.steps = 0
        self.scored: Counter[Request] = Counter()
        self.checked: Counter[Sequence] = Counter()
        self.targets: dict[Request, list[tuple[int, int]]] = {}

    def _come_up(self) -> None:
        self.uncollected: deque[StepPlan] = deque()
        self.allocator = ReservedAllocator(self.num_pages)
        self.scheduler = Scheduler(self.allocator, **self._settings)
        self.cache = CacheModel(self.num_pages, PAGE_SIZE, self.evict_window)

    def rebuild(self, num_pages: int | None = None) -> None:
        """The shards have lost everything; what is unfinished begins again, in the order in which it came."""
        before = [*self.scheduler.running, *self.scheduler.waiting]
        self.num_pages = num_pages or self.num_pages
        self._come_up()
        for request in before:
            request.restart()
            self.scheduler.waiting.append(request)

    def add(self, prompt: list[int], max_tokens: int = 4, **params: Any) -> Request:
        request = make_request(prompt, max_tokens, **params)
        self.scheduler.add(request)
        return request

    def plan(self) -> StepPlan:
        self.steps += 1
        return self.scheduler.schedule(self.steps, 0)

    def run(self, plan: StepPlan) -> None:
        result = self.cache.step(plan)
        for found in result.prompt_logprobs:
            request = self.scheduler.in_flight[0].sequences[found.slot].request
            tokens = memoryview(found.token_ids).cast("i").tolist()
            if not request.finished:
                self.targets.setdefault(request, []).extend(zip(itertools.count(found.position), tokens))
        for committed in self.scheduler.commit(plan, result.tokens):
            sequence, token = committed.sequence, committed.token
            assert token is None or token == result.tokens[committed.place]
            if token is None:
                self.scored[sequence.request] += 1
                self.scheduler.finish(sequence, "length")
            elif token in sequence.request.stop_token_ids:
                self.scheduler.finish(sequence, "stop", token)
            elif len(sequence.output_token_ids) == sequence.request.max_tokens:
                self.scheduler.finish(sequence, "length")

    def step(self) -> StepPlan:
        plan = self.plan()
        self.run(plan)
        return plan

    def finish(self) -> None:
        for _ in range(1000):
            if not self.has_work:
                return
            self.step()
        raise AssertionError("work is left that never ends")

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self.uncollected)

    def abort(self, request: Request) -> None:
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                self.scheduler.finish(sequence, "abort")

    def check_outputs(self, request: Request) -> None:
        """Every sample holds the tokens that it would get alone, as far as it came."""
        for sequence in request.sequences:
            tokens, known = sequence.output_token_ids, self.checked[sequence]
            context = request.prompt_token_ids + tokens[:known]
            assert tokens[known:] == expected_tokens(
                context,
                len(tokens) - known,
                sequence.index,
                evict_window=self.evict_window,
                prefill_length=request.prefill_length,
            )
            self.checked[sequence] = len(tokens)

    def is_empty(self) -> bool:
        return self.allocator.used == 0 and self.allocator.reserved == 0


def tokens_of(length: int, seed: int = 0) -> list[int]:
    return [(seed * 31 + i * 7) % VOCAB_SIZE for i in range(length)]


# ---- in plain sentences


def test_a_prompt_longer_than_the_token_budget_is_prefilled_in_chunks_and_its_borders_are_kept() -> None:
    engine = Engine(max_num_batched_tokens=10)
    request = engine.add(tokens_of(25))
    plans = [engine.step() for _ in range(3)]
    assert [(plan.prefill[0].start, plan.prefill[0].end) for plan in plans] == [(0, 10), (10, 20), (20, 25)]
    assert [plan.prefill[0].samples for plan in plans] == [[], [], [0]]
    assert request.chunk_borders == [10, 20, 25]


def test_evenly_cut_chunks_have_the_same_borders_whatever_decodes_beside_them() -> None:
    borders = []
    for decoding in (1, 3, 5):
        engine = Engine(num_pages=200, max_num_batched_tokens=64, chunk_multiple=16)
        for _ in range(decoding):
            engine.add(tokens_of(1), max_tokens=40)
        engine.step()
        prompts = [engine.add(tokens_of(length)) for length in (150, 52, 100)]
        engine.finish()
        borders.append([request.chunk_borders for request in prompts])
    assert borders[0] == borders[1] == borders[2] == [[48, 96, 150], [52], [48, 100]]


def test_an_evenly_cut_chunk_is_cut_anywhere_where_decode_rows_leave_less_than_its_multiple() -> None:
    engine = Engine(max_num_batched_tokens=8, chunk_multiple=16)
    request = engine.add(tokens_of(30))
    engine.finish()
    assert request.chunk_borders == [8, 16, 24, 30]


def test_running_sequences_decode_while_a_long_prompt_is_prefilled() -> None:
    engine = Engine(max_num_batched_tokens=10)
    first = engine.add(tokens_of(5), max_tokens=20)
    engine.step()
    engine.add(tokens_of(30))
    plan = engine.step()
    assert [row.slot for row in plan.decode] == [first.sequences[0].slot]
    assert plan.prefill[0].num_tokens == 9


def test_the_second_sampled_token_comes_from_the_device_and_not_from_the_plan() -> None:
    engine = Engine()
    engine.add(tokens_of(5))
    engine.step()
    (row,) = engine.step().decode
    assert (row.token, row.position) == (None, 5)


def test_requests_are_admitted_in_order_even_where_a_later_one_would_fit() -> None:
    engine = Engine(num_pages=5)
    running = engine.add(tokens_of(20), max_tokens=20)  # 3 of the 4 pages
    large = engine.add(tokens_of(20), max_tokens=20)
    small = engine.add(tokens_of(2), max_tokens=2)
    engine.step()
    assert engine.scheduler.running == [running]
    assert list(engine.scheduler.waiting) == [large, small]
    engine.finish()
    for request in (running, large, small):
        engine.check_outputs(request)
    assert engine.is_empty()


def test_a_request_waits_until_there_is_a_slot_for_each_of_its_samples() -> None:
    engine = Engine(max_num_seqs=4)
    engine.add(tokens_of(3), max_tokens=3, n=2)
    late = engine.add(tokens_of(3, seed=1), max_tokens=3, n=3)
    engine.step()
    assert list(engine.scheduler.waiting) == [late]
    engine.finish()
    engine.check_outputs(late)


def test_a_request_that_can_never_fit_is_refused_with_both_numbers() -> None:
    engine = Engine(num_pages=5)
    with pytest.raises(
        ValueError, match=r"needs 5 pages of 16 tokens \(prompt of 20 tokens, max_tokens=60, n=1\).*cache has 4"
    ):
        engine.add(tokens_of(20), max_tokens=60)
    # 1 full prompt page is shared, each sample needs 2 of its own
    with pytest.raises(ValueError, match=r"needs 5 pages .*n=2.*lower max_tokens or n, or raise kv_cache_memory_bytes"):
        engine.add(tokens_of(20), max_tokens=20, n=2)
    assert not engine.scheduler.has_work


def test_samples_share_the_full_pages_of_the_prompt_and_copy_the_partial_one() -> None:
    engine = Engine()
    request = engine.add(tokens_of(20), max_tokens=30, n=3)
    engine.step()
    first, *others = request.sequences
    assert engine.allocator.used == 1 + 3
    assert all(sequence.pages[0] == first.pages[0] for sequence in others)
    assert len({sequence.pages[1] for sequence in request.sequences}) == 3
    plan = engine.plan()
    assert plan.page_copies == [(first.pages[1], sequence.pages[1]) for sequence in others]
    engine.run(plan)
    assert engine.step().page_copies == []
    engine.finish()
    engine.check_outputs(request)
    assert engine.is_empty()


def test_samples_of_a_prompt_that_ends_with_a_page_copy_nothing() -> None:
    engine = Engine()
    request = engine.add(tokens_of(32), max_tokens=20, n=3)
    engine.step()
    plan = engine.step()
    assert plan.page_copies == []
    assert engine.allocator.used == 2 + 3
    engine.finish()
    engine.check_outputs(request)


def test_a_sample_that_ends_with_its_first_token_leaves_no_copy_behind() -> None:
    prompt = tokens_of(20)
    firsts = [expected_tokens(prompt, 1, index)[0] for index in range(3)]
    assert len(set(firsts)) == 3
    for index in range(3):
        engine = Engine()
        request = engine.add(prompt, max_tokens=20, n=3, stop_token_ids=frozenset({firsts[index]}))
        engine.step()
        ended = request.sequences[index]
        assert (ended.finish_reason, ended.pages) == ("stop", [])
        late = engine.add(tokens_of(40, seed=5), max_tokens=20)  # takes the pages that have just become free
        plan = engine.step()
        assert len({target for _, target in plan.page_copies}) == (2 if index == 0 else 1)
        engine.finish()
        for finished in (request, late):
            engine.check_outputs(finished)
        assert engine.is_empty()


def test_the_page_of_a_sample_that_ended_may_be_reused_in_the_step_that_copies_from_it() -> None:
    prompt = tokens_of(20)
    first = expected_tokens(prompt, 1, 0)[0]
    engine = Engine(num_pages=6)
    request = engine.add(prompt, max_tokens=12, n=2, stop_token_ids=frozenset({first}))
    engine.step()
    assert request.sequences[0].finish_reason == "stop"
    late = engine.add(tokens_of(20, seed=3), max_tokens=4)
    plan = engine.plan()
    (source, _target) = plan.page_copies[0]
    given = {page for _, pages in plan.new_pages for page in pages}
    assert source in given, "the test wants the source to be given to another sequence in this very step"
    engine.run(plan)
    engine.finish()
    for finished in (request, late):
        engine.check_outputs(finished)


def test_the_last_tokens_of_a_prompt_go_through_decode_and_sample_once_at_its_end() -> None:
    engine = Engine()
    prompt = tokens_of(20)
    request = engine.add(prompt, max_tokens=3, n=2, decode_last_prompt_tokens=3)
    plans = [engine.step() for _ in range(4)]
    assert plans[0].prefill[0].end == 17
    assert [[(row.position, row.token) for row in plan.decode] for plan in plans[1:]] == [
        [(17, prompt[17])],
        [(18, prompt[18])],
        [(19, prompt[19])],
    ]
    assert [len(part.samples) for plan in plans for part in plan.parts] == [0, 0, 0, 2]
    assert request.chunk_borders == [17]
    engine.finish()
    engine.check_outputs(request)


def test_a_prompt_that_is_only_scored_ends_with_its_last_token_and_samples_nothing() -> None:
    engine = Engine(max_num_batched_tokens=10)
    prompt = tokens_of(25)
    request = engine.add(prompt, max_tokens=0, prompt_logprobs=0, decode_last_prompt_tokens=2)
    engine.finish()
    assert engine.scored[request] == 1
    assert engine.targets[request] == list(enumerate(prompt))[1:]
    assert request.sequences[0].output_token_ids == []
    assert engine.is_empty()


@pytest.mark.parametrize(("first", "scored_from"), [(10, 1), (11, 11), (20, 11), (23, 21), (24, 24), (25, 25)])
def test_chunks_before_the_first_scored_token_predict_nothing(first: int, scored_from: int) -> None:
    """Chunks end at 10, 20 and 23 tokens; the two last tokens are decoded."""
    engine = Engine(max_num_batched_tokens=10)
    prompt = tokens_of(25)
    request = engine.add(prompt, max_tokens=0, prompt_logprobs=0, decode_last_prompt_tokens=2)
    request.first_scored = first
    engine.finish()
    assert engine.scored[request] == 1
    assert engine.targets.get(request, []) == list(enumerate(prompt))[scored_from:]


@pytest.mark.parametrize("steps", range(6))
def test_an_aborted_request_gives_everything_back_at_once(steps: int) -> None:
    engine = Engine(max_num_batched_tokens=10)
    request = engine.add(tokens_of(25), max_tokens=9, n=3)
    for _ in range(steps):
        engine.step()
    engine.abort(request)
    assert engine.is_empty()
    assert not engine.scheduler.has_work
    plan = engine.plan()
    assert (plan.setups, plan.new_pages, plan.page_copies, plan.parts) == ([], [], [], [])


def test_a_token_more_than_the_plan_samples_is_an_error() -> None:
    engine = Engine()
    engine.add(tokens_of(4))
    plan = engine.plan()
    with pytest.raises(AssertionError, match="tokens do not match the plan's samples"):
        engine.scheduler.commit(plan, [1, 2])


# ---- with eviction


def test_pages_outside_the_window_are_freed_as_soon_as_prefill_has_ended() -> None:
    engine = Engine(max_num_batched_tokens=30, evict_window=(1, 2))
    request = engine.add(tokens_of(100), max_tokens=300)
    used = [(engine.step(), engine.allocator.used)[1] for _ in range(4)]
    assert used == [2, 4, 6, 7], "prompt chunks attend to all of the prompt"
    pages = list(request.sequences[0].pages)
    for _ in range(200):
        engine.step()
        assert engine.allocator.used == 3
    (sequence,) = request.sequences
    assert len(sequence.pages) == pages_for(sequence.num_computed, PAGE_SIZE) == 19
    assert sequence.held_pages == [pages[0], *sequence.pages[-2:]]
    engine.finish()
    engine.check_outputs(request)
    assert engine.is_empty()


def test_a_context_that_the_window_covers_loses_nothing() -> None:
    engine = Engine(evict_window=(1, 3))
    engine.add(tokens_of(40), max_tokens=60)
    used = [(engine.step(), engine.allocator.used)[1] for _ in range(40)]
    assert (used[0], used[23], used[24], used[25], used[39]) == (3, 4, 4, 4, 4)
    engine = Engine(evict_window=(1, 3))
    covered = engine.add(tokens_of(40), max_tokens=24)
    engine.step()
    for _ in range(20):
        engine.step()
        assert covered.sequences[0].held_pages == covered.sequences[0].pages


def test_two_requests_run_together_that_only_fit_because_of_eviction() -> None:
    kept = (1, 1)
    for evict_window, together in ((kept, 2), (None, 1)):
        engine = Engine(num_pages=15, evict_window=evict_window)
        requests = [engine.add(tokens_of(20, seed), max_tokens=150) for seed in range(2)]  # 11 pages each
        engine.step()
        assert len(engine.scheduler.running) == together
        engine.finish()
        for request in requests:
            engine.check_outputs(request)


def test_a_request_longer_than_the_cache_runs_where_its_window_fits() -> None:
    with pytest.raises(ValueError, match=r"needs 32 pages .* the cache has 7"):
        Engine(num_pages=8).add(tokens_of(10), max_tokens=500)
    engine = Engine(num_pages=8, evict_window=(1, 3))
    request = engine.add(tokens_of(10), max_tokens=500)
    engine.finish()
    assert len(request.sequences[0].output_token_ids) == 500
    engine.check_outputs(request)
    with pytest.raises(ValueError, match=r"needs 10 pages .* the cache has 7"):
        engine.add(tokens_of(100), max_tokens=500)


def test_a_page_that_samples_share_is_free_when_the_last_of_them_has_evicted_it() -> None:
    engine = Engine(evict_window=(1, 2))
    request = engine.add(tokens_of(64), max_tokens=60, n=3)
    engine.step()
    assert engine.allocator.used == 4
    engine.step()  # context 65: the fifth page begins, and each sample lets the second and the third go
    first, *others = request.sequences
    assert all(sequence.pages[:4] == [first.pages[0], 0, 0, first.pages[3]] for sequence in others)
    assert engine.allocator.used == 2 + 3
    engine.finish()
    engine.check_outputs(request)
    assert engine.is_empty()


def test_samples_fork_from_a_prompt_whose_pages_have_been_evicted() -> None:
    for copy_on_fork in (False, True):
        engine = Engine(max_num_batched_tokens=80, evict_window=(1, 2), copy_on_fork=copy_on_fork)
        request = engine.add(tokens_of(72), max_tokens=60, n=3, decode_last_prompt_tokens=5)
        for _ in range(6):
            engine.step()
        assert [sequence.pages[1:3] for sequence in request.sequences] == [[0, 0]] * 3
        assert all(len(sequence.held_pages) == 3 for sequence in request.sequences)
        assert engine.allocator.used == (9 if copy_on_fork else 2 + 3)
        engine.finish()
        engine.check_outputs(request)
        assert engine.is_empty()


@given(
    prompt=st.integers(1, 200),
    max_tokens=st.integers(0, 200),
    n=st.integers(1, 4),
    evict_window=st.tuples(st.integers(0, 3), st.integers(1, 5)),
    copy_on_fork=st.booleans(),
)
@settings(deadline=None, derandomize=True)
def test_eviction_never_reserves_more_than_no_eviction(
    prompt: int, max_tokens: int, n: int, evict_window: tuple[int, int], copy_on_fork: bool
) -> None:
    reserved = []
    for kept in (evict_window, None):
        engine = Engine(num_pages=200, evict_window=kept, copy_on_fork=copy_on_fork)
        engine.add(tokens_of(prompt), max_tokens=max_tokens, n=n)
        engine.plan()
        reserved.append(engine.allocator.reserved)
    assert reserved[0] <= reserved[1]


def test_samples_share_no_page_where_the_method_changes_what_it_keeps_in_them() -> None:
    engine = Engine(copy_on_fork=True)
    request = engine.add(tokens_of(40), max_tokens=20, n=3)
    engine.step()
    assert engine.allocator.used == 9
    first, *others = request.sequences
    plan = engine.plan()
    assert plan.page_copies == [pair for sequence in others for pair in zip(first.pages, sequence.pages)]
    engine.run(plan)
    engine.finish()
    engine.check_outputs(request)
    assert engine.is_empty()


# ---- replay, after the shards have lost their caches


def chunks(plan: StepPlan) -> list[tuple[int, int]]:
    return [(chunk.start, chunk.end) for chunk in plan.prefill]


def rows(plan: StepPlan) -> list[tuple[int, int | None]]:
    return [(row.position, row.token) for row in plan.decode]


def test_a_prompt_is_replayed_in_the_chunks_in_which_it_was_computed_at_first() -> None:
    engine = Engine(max_num_batched_tokens=10)
    engine.add(tokens_of(7), max_tokens=1)
    engine.step()  # leaves 3 tokens for the next prompt
    engine.add(tokens_of(3, seed=1), max_tokens=1)
    request = engine.add(tokens_of(30), max_tokens=2)
    assert [chunks(engine.step()) for _ in range(3)] == [[(0, 3), (0, 7)], [(7, 17)], [(17, 27)]]
    engine.rebuild()
    assert [chunks(engine.step()) for _ in range(4)] == [[(0, 7)], [(7, 17)], [(17, 27)], [(27, 30)]]
    assert request.chunk_borders == [7, 17, 27, 30]
    assert request.metrics.num_replayed_tokens == 27
    engine.finish()
    engine.check_outputs(request)


def test_output_tokens_are_replayed_one_per_step_and_told_and_nothing_is_sampled_until_the_first_new_one() -> None:
    engine = Engine()
    prompt = tokens_of(20)
    request = engine.add(prompt, max_tokens=6, prompt_logprobs=0, decode_last_prompt_tokens=2)
    for _ in range(5):
        engine.step()  # 18 prompt tokens, 2 more, and 3 tokens sampled, of which 2 are in the cache
    output = list(request.sequences[0].output_token_ids)
    assert len(output) == 3
    engine.rebuild()
    assert request.replays
    plans = [engine.step() for _ in range(7)]
    assert (chunks(plans[0]), rows(plans[0])) == ([(0, 18)], [])
    assert [rows(plan) for plan in plans[1:5]] == [
        [(18, prompt[18])],
        [(19, prompt[19])],
        [(20, output[0])],
        [(21, output[1])],
    ]
    assert [rows(plan) for plan in plans[5:]] == [[(22, output[2])], [(23, None)]], "from then on the device knows it itself"
    assert [bool(part.samples) for plan in plans for part in plan.parts] == [False] * 5 + [True] * 2
    assert all(part.prompt_logprobs == 0 for plan in plans for part in plan.parts)
    assert plans[0].prefill[0].targets is None and all(row.target is None for plan in plans for row in plan.decode)
    assert engine.targets[request] == list(enumerate(prompt))[1:], "each once"
    assert (request.metrics.num_replayed_tokens, engine.scheduler.replayed_tokens) == (22, 22)
    assert not request.replays
    engine.finish()
    engine.check_outputs(request)
    assert engine.is_empty()


def test_what_was_not_computed_before_is_scored_and_traced_after_a_replay() -> None:
    engine = Engine(max_num_batched_tokens=10)
    engine.scheduler.trace = True
    prompt = tokens_of(25)
    request = engine.add(prompt, max_tokens=3, prompt_logprobs=0, decode_last_prompt_tokens=3)
    for _ in range(2):
        engine.step()
    engine.rebuild()
    engine.scheduler.trace = True
    plans = [engine.step() for _ in range(6)]
    assert [chunk.targets for plan in plans for chunk in plan.prefill] == [None, None, prompt[21:23]]
    assert [(row.position, row.trace) for plan in plans for row in plan.decode] == [(22, True), (23, True), (24, True)]
    engine.rebuild()
    engine.scheduler.trace = True
    plans = [engine.step() for _ in range(7)]
    assert [(row.position, row.trace) for plan in plans for row in plan.decode] == [
        (22, False), (23, False), (24, False), (25, True)
    ]  # fmt: skip
    engine.finish()
    assert engine.targets[request] == list(enumerate(prompt))[1:]
    engine.check_outputs(request)


def test_a_rebuild_before_the_first_step_of_a_request_changes_nothing() -> None:
    engine = Engine()
    request = engine.add(tokens_of(20), max_tokens=3, n=2)
    engine.plan()  # its step failed
    engine.rebuild()
    assert not request.replays
    plan = engine.step()
    assert (chunks(plan), len(plan.prefill[0].samples)) == ([(0, 20)], 2)
    engine.finish()
    engine.check_outputs(request)
    assert (request.metrics.num_replayed_tokens, engine.is_empty()) == (0, True)


@pytest.mark.parametrize("evict_window", [None, (1, 2)])
@pytest.mark.parametrize("copy_on_fork", [False, True])
@pytest.mark.parametrize("decoded", [0, 5])
def test_samples_fork_again_from_the_first_that_is_left(
    evict_window: tuple[int, int] | None, copy_on_fork: bool, decoded: int
) -> None:
    prompt = tokens_of(72)
    params: dict[str, Any] = {"max_tokens": 30, "n": 3, "decode_last_prompt_tokens": decoded}
    alone = Engine(max_num_batched_tokens=80, evict_window=evict_window, copy_on_fork=copy_on_fork)
    undisturbed = alone.add(prompt, **params)
    alone.finish()
    engine = Engine(max_num_batched_tokens=80, evict_window=evict_window, copy_on_fork=copy_on_fork)
    request = engine.add(prompt, **params)
    for _ in range(decoded + 4):
        engine.step()
    used = engine.allocator.used
    engine.rebuild()
    for _ in range(decoded + 4):
        engine.step()
    assert engine.allocator.used == used, "the same steps, the same pages"
    engine.scheduler.finish(request.sequences[0], "stop")  # it computed the prompt
    reserved = engine.allocator.reserved
    engine.rebuild()
    for _ in range(decoded + 1):
        engine.step()
    first, second = request.unfinished
    assert (first.index, second.index) == (1, 2)
    shared = 0 if copy_on_fork else len({*first.held_pages} & {*second.held_pages})
    full = 4 if evict_window is None else 4 if decoded == 0 else 2
    assert shared == (0 if copy_on_fork else full)
    assert engine.allocator.reserved == reserved
    engine.finish()
    engine.check_outputs(request)
    for again, before in zip(request.sequences[1:], undisturbed.sequences[1:]):
        assert again.output_token_ids == before.output_token_ids
    assert engine.is_empty()


def test_a_chunk_that_is_replayed_goes_before_decode_rows_but_not_in_two_steps_on_end() -> None:
    engine = Engine(max_num_batched_tokens=10, max_num_seqs=4)
    large = engine.add(tokens_of(30), max_tokens=3)
    for _ in range(2):
        engine.step()
    small = engine.add(tokens_of(4, seed=1), max_tokens=8)
    engine.step()
    engine.step()  # the large prompt had chunks of the whole budget
    assert large.chunk_borders == [10, 20, 30] and small.chunk_borders == [4]
    engine.rebuild()
    engine.scheduler.waiting.rotate(1)  # the small one is first: its rows would be in the way of every chunk
    seen = [engine.step() for _ in range(6)]
    assert [chunks(plan) for plan in seen[:6]] == [[(0, 4)], [(0, 10)], [], [(10, 20)], [], [(20, 30)]]
    assert [len(plan.decode) for plan in seen[:6]] == [0, 0, 1, 0, 1, 0]
    assert all(sum(part.num_tokens for part in plan.parts) <= 10 for plan in seen)
    engine.finish()
    for request in (large, small):
        engine.check_outputs(request)


def test_other_requests_go_on_and_new_ones_begin_while_a_long_output_is_replayed() -> None:
    engine = Engine()
    long = engine.add(tokens_of(20), max_tokens=60)
    for _ in range(40):
        engine.step()
    engine.rebuild()
    new = engine.add(tokens_of(20, seed=1), max_tokens=5)
    for _ in range(5):
        engine.step()
    assert new.finished and long.replays
    engine.finish()
    for request in (long, new):
        engine.check_outputs(request)


def test_requests_that_ran_together_wait_their_turn_in_a_smaller_cache_and_newer_ones_stay_behind_them() -> None:
    engine = Engine(num_pages=7)
    first, second = (engine.add(tokens_of(20, seed), max_tokens=20) for seed in range(2))  # 3 pages each
    for _ in range(5):
        engine.step()
    assert len(engine.scheduler.running) == 2
    engine.rebuild(num_pages=5)
    late = engine.add(tokens_of(2), max_tokens=2)
    engine.step()
    assert (engine.scheduler.running, list(engine.scheduler.waiting)) == ([first], [second, late])
    assert engine.allocator.reserved == 3
    engine.finish()
    for request in (first, second, late):
        engine.check_outputs(request)
    assert engine.is_empty()


def test_a_failure_during_a_replay_loses_nothing_that_is_still_to_be_replayed() -> None:
    engine = Engine()
    request = engine.add(tokens_of(20), max_tokens=12, n=2)
    for _ in range(8):
        engine.step()
    for steps in (3, 1, 0, 8):  # the last one just comes to the end
        engine.rebuild()
        for _ in range(steps):
            engine.step()
        assert request.replays == (steps < 8)
    assert [len(sequence.output_token_ids) for sequence in request.sequences] == [8, 8]
    assert request.metrics.num_replayed_tokens == (20 + 2 * 2) + 20 + 0 + (20 + 2 * 7)
    engine.finish()
    engine.check_outputs(request)
    assert engine.is_empty()


def test_a_replay_can_be_aborted_at_any_step() -> None:
    for steps in range(8):
        engine = Engine(max_num_batched_tokens=10)
        request = engine.add(tokens_of(25), max_tokens=9, n=3)
        for _ in range(6):
            engine.step()
        engine.rebuild()
        for _ in range(steps):
            engine.step()
        engine.abort(request)
        assert engine.is_empty() and not engine.scheduler.has_work
        plan = engine.plan()
        assert (plan.setups, plan.new_pages, plan.page_copies, plan.parts) == ([], [], [], [])


# ---- in any order


class AnyOrder(RuleBasedStateMachine):
    """Requests of every kind come, run and are aborted, and shards lose their caches, at any moment; nothing is lost, mixed
    up or given out twice."""

    @initialize(
        num_pages=st.integers(3, 24),
        max_num_seqs=st.integers(1, 6),
        spare_budget=st.integers(0, 40),
        evict_window=st.none() | st.tuples(st.integers(0, 2), st.integers(1, 3)),
        copy_on_fork=st.booleans(),
        chunk_multiple=st.sampled_from([1, 1, 8, 16]),
        max_in_flight=st.integers(1, 3),
    )
    def start(
        self,
        num_pages: int,
        max_num_seqs: int,
        spare_budget: int,
        evict_window: tuple[int, int] | None,
        copy_on_fork: bool,
        chunk_multiple: int,
        max_in_flight: int,
    ) -> None:
        self.evict_window, self.copy_on_fork = evict_window, copy_on_fork
        self.max_num_seqs = max_num_seqs
        self.budget = max_num_seqs + spare_budget
        self.chunk_multiple = chunk_multiple
        self.engine = Engine(num_pages, max_num_seqs, self.budget, evict_window, copy_on_fork, chunk_multiple)
        self.max_in_flight = max_in_flight
        self.requests: list[Request] = []
        self.admitted: list[Request] = []
        self.chunk_ends: dict[Request, list[int]] = {}
        self.planned_ends: dict[Request, list[int]] = {}
        self.computed: Counter[Sequence] = Counter()
        self.replayed: Counter[Request] = Counter()
        self.waited: set[Sequence] = set()

    # ---- what happens

    @rule(
        prompt_length=st.one_of(st.integers(1, 70), st.sampled_from([15, 16, 17, 32, 48])),
        max_tokens=st.integers(1, 40),
        n=st.integers(1, 4),
        decoded=st.integers(0, 6),
        score=st.booleans(),
        logprobs=st.booleans(),
        stop=st.frozensets(st.integers(0, VOCAB_SIZE - 1), max_size=12),
        seed=st.integers(0, 50),
    )
    def add(
        self,
        prompt_length: int,
        max_tokens: int,
        n: int,
        decoded: int,
        score: bool,
        logprobs: bool,
        stop: frozenset[int],
        seed: int,
    ) -> None:
        request = make_request(
            tokens_of(prompt_length, seed),
            0 if score else max_tokens,
            n=1 if score else min(n, self.max_num_seqs),
            decode_last_prompt_tokens=min(decoded, prompt_length - 1),
            prompt_logprobs=0 if score or logprobs else None,
            stop_token_ids=stop,
        )
        if self.most_pages(request) > self.engine.allocator.total:
            with pytest.raises(ValueError, match="but the cache has"):
                self.engine.scheduler.add(request)
            return
        self.engine.scheduler.add(request)
        self.requests.append(request)

    @precondition(lambda self: self.engine.has_work)
    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.one_step()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.requests))
        self.engine.abort(request)
        assert all(not sequence.pages for sequence in request.sequences)

    @precondition(lambda self: self.engine.scheduler.has_work)
    @rule(in_a_step=st.booleans(), lost_pages=st.sampled_from([0, 0, 0, 1, 3]))
    def rebuild(self, in_a_step: bool, lost_pages: int) -> None:
        if in_a_step:
            self.engine.plan()
        self.engine.rebuild(max(self.engine.num_pages - lost_pages, 2))
        assert self.engine.is_empty()
        self.admitted.clear()
        self.waited.clear()
        self.planned_ends = {request: list(ends) for request, ends in self.chunk_ends.items()}
        for request in list(self.engine.scheduler.waiting):
            if self.most_pages(request) > self.engine.allocator.total:
                with pytest.raises(ValueError, match="but the cache has"):
                    self.engine.scheduler.check_fits(request)
                self.engine.abort(request)
            else:
                self.engine.scheduler.check_fits(request)

    # ---- one step, looked at from all sides

    def one_step(self) -> None:
        """Plan a step, and collect the oldest one once so many are in flight; ranks run them in order, so that when does not
        matter to what they compute."""
        scheduler, uncollected = self.engine.scheduler, self.engine.uncollected
        ready = [
            sequence
            for sequence in self.running_sequences()
            if not sequence.in_prefill and sequence.num_computed < sequence.ends_at
        ]
        plan = self.engine.plan()
        assert sum(part.num_tokens for part in plan.parts) <= self.budget
        assert len({part.slot for part in plan.parts}) == len(plan.parts)
        self.check_decode(plan, ready)
        self.admitted += scheduler.running[len(scheduler.running) - self.count_admitted(plan) :]
        self.check_prefill(plan)
        self.check_that_the_head_of_the_queue_had_to_wait(plan)
        self.check_pages()
        self.check_window(plan)
        self.check_replay(plan)
        assert plan.parts or uncollected or not scheduler.has_work, "work is left, and nobody runs"
        is_empty = not plan.parts and not plan.setups
        if not is_empty:
            uncollected.append(plan)
        if uncollected and (is_empty or len(uncollected) == self.max_in_flight):
            self.collect(uncollected.popleft())

    def collect(self, plan: StepPlan) -> None:
        """Commit a step; what it has computed counts for the sequences that have not ended since it was planned."""
        sequences = self.engine.scheduler.in_flight[0].sequences if plan.parts else {}
        alive = {part.slot: sequences[part.slot] for part in plan.parts if sequences[part.slot].finish_reason is None}
        self.engine.run(plan)
        for part in plan.parts:
            if part.slot not in alive:
                continue
            sequence = alive[part.slot]
            if part.end <= self.computed[sequence]:
                self.replayed[sequence.request] += part.num_tokens
            elif isinstance(part, PrefillChunk):
                self.chunk_ends.setdefault(sequence.request, []).append(part.end)
            self.computed[sequence] = max(self.computed[sequence], part.end)
            if part.end == len(sequence.request.prompt_token_ids):
                for sibling in sequence.request.sequences:
                    self.computed[sibling] = max(self.computed[sibling], part.end)
        self.check_finished()

    def planned(self, slot: int) -> Sequence:
        """Whom a slot of the newest plan stands for."""
        return self.engine.scheduler.in_flight[-1].sequences[slot]

    def count_admitted(self, plan: StepPlan) -> int:
        by_slot = {sequence.slot: sequence for sequence in self.admitted_sequences()}
        by_request = Counter(by_slot[setup.slot].request for setup in plan.setups)
        assert all(len(request.unfinished) == count for request, count in by_request.items())
        return len(by_request)

    def check_decode(self, plan: StepPlan, ready: list[Sequence]) -> None:
        """A running sequence decodes one token in each step, but where a chunk is replayed: then it may wait for one step."""
        rows = [row.slot for row in plan.decode]
        assert len({*rows}) == len(rows)
        waited = {sequence for sequence in ready if sequence.slot not in rows}
        assert len(ready) == len(rows) + len(waited)
        assert not waited & self.waited
        if waited:
            assert sum(part.num_tokens for part in plan.parts) == self.budget
            assert plan.prefill[0].start < self.planned(plan.prefill[0].slot).replay_end
        self.waited = waited

    def check_prefill(self, plan: StepPlan) -> None:
        sequences = [self.planned(chunk.slot) for chunk in plan.prefill]
        order = [self.requests.index(sequence.request) for sequence in sequences]
        if sequences and plan.prefill[0].start < sequences[0].replay_end:
            del order[0]
        assert order == sorted(order), "prompts are prefilled oldest first, but for one that is replayed"
        for place, (sequence, chunk) in enumerate(zip(sequences, plan.prefill)):
            request = sequence.request
            assert sequence is request.leader
            assert chunk.tokens == request.prompt_token_ids[chunk.start : chunk.end]
            assert chunk.tokens and chunk.end <= request.prefill_length
            ends = self.planned_ends.setdefault(request, [])
            if chunk.start < sequence.replay_end:
                assert (chunk.start, chunk.end) in itertools.pairwise([0, *ends]), "the chunks of the first time"
                continue
            is_even = chunk.end % self.chunk_multiple == 0
            if chunk.end < request.prefill_length and not (is_even and self.chunk_multiple > 1):
                assert place == len(plan.prefill) - 1, "only the last chunk may be cut by the budget"
                assert sum(part.num_tokens for part in plan.parts) == self.budget
            assert [chunk.start] == (ends[-1:] or [0]), "what was computed is computed again before anything new"
            ends.append(chunk.end)

    def check_replay(self, plan: StepPlan) -> None:
        """What has been computed before is only computed again: it brings nothing that has been published."""
        for part in plan.parts:
            sequence = self.planned(part.slot)
            if part.end <= self.computed[sequence]:
                assert not part.samples and not part.prompt_logprobs
                if isinstance(part, DecodeRow):
                    assert part.token == sequence.token(part.position) and part.target is None and not part.trace
                else:
                    assert part.targets is None
            else:
                assert part.end > sequence.replay_end

    def check_that_the_head_of_the_queue_had_to_wait(self, plan: StepPlan) -> None:
        scheduler, allocator = self.engine.scheduler, self.engine.allocator
        if not scheduler.waiting:
            return
        head = scheduler.waiting[0]
        used_slots = len(list(self.admitted_sequences()))
        assert (
            sum(part.num_tokens for part in plan.parts) == self.budget
            or used_slots + len(head.unfinished) > self.max_num_seqs
            or allocator.reserved + self.most_pages(head) > allocator.total
        )

    def check_finished(self) -> None:
        for request in self.requests:
            self.engine.check_outputs(request)
            wanted = request.params.prompt_logprobs is not None
            targets = self.engine.targets.get(request, [])
            assert targets == list(enumerate(request.prompt_token_ids))[1 : 1 + len(targets)]
            if request.finished and all(sequence.finish_reason != "abort" for sequence in request.sequences):
                assert len(targets) == (len(request.prompt_token_ids) - 1 if wanted else 0)
                assert self.engine.scored[request] == request.score
        for request, ends in self.chunk_ends.items():
            assert request.chunk_borders == ends
            assert request.metrics.num_replayed_tokens == self.replayed[request]

    # ---- what holds at every moment

    @invariant()
    def pages_and_slots_add_up(self) -> None:
        if hasattr(self, "engine"):
            self.check_pages()
            slots = [sequence.slot for sequence in self.admitted_sequences()]
            assert len(set(slots)) == len(slots)
            assert set(slots) <= set(range(self.max_num_seqs))

    @invariant()
    def requests_are_admitted_in_the_order_of_their_arrival(self) -> None:
        if hasattr(self, "engine"):
            order = [self.requests.index(request) for request in self.admitted]
            assert order == sorted(order)

    def check_pages(self) -> None:
        allocator = self.engine.allocator
        holders: dict[int, list[tuple[Sequence, int]]] = {}
        for sequence in self.admitted_sequences():
            assert len(set(sequence.held_pages)) == len(sequence.held_pages)
            assert len(sequence.pages) >= pages_for(sequence.num_computed, PAGE_SIZE)
            for place, page in enumerate(sequence.pages):
                if page == NULL_PAGE:
                    assert not sequence.in_prefill
                    continue
                holders.setdefault(page, []).append((sequence, place))
        for page, held in holders.items():
            assert 0 < page <= allocator.total
            if len(held) > 1:  # only full pages of one request's prompt, at the same place, once for each sample
                assert len({(sequence.request, place) for sequence, place in held}) == 1
                assert len({sequence for sequence, _ in held}) == len(held)
                assert held[0][1] < len(held[0][0].request.prompt_token_ids) // PAGE_SIZE
                assert not self.copy_on_fork
        assert allocator.used == len(holders), "a page is lost"
        reserved = 0
        for request in self.engine.scheduler.running:
            most = self.most_pages(request)
            assert len({page for sequence in request.sequences for page in sequence.held_pages}) <= most
            reserved += most
        assert allocator.reserved == reserved
        assert allocator.used <= allocator.reserved <= allocator.total

    def admitted_sequences(self) -> list[Sequence]:
        """Those that hold a slot."""
        running = self.engine.scheduler.running
        return [sequence for request in running for sequence in request.sequences if sequence.finish_reason is None]

    def running_sequences(self) -> list[Sequence]:
        """Those that hold pages: the first of a request's, and all once the prompt has been computed."""
        return [
            sequence
            for sequence in self.admitted_sequences()
            if sequence is sequence.request.unfinished[0] or sequence.num_computed > 0
        ]

    def check_window(self, plan: StepPlan) -> None:
        """What a decode row reads is held, and nothing else."""
        for row in plan.decode:
            pages = self.planned(row.slot).pages
            assert len(pages) == pages_for(row.end, PAGE_SIZE)
            held = [place for place, page in enumerate(pages) if page != NULL_PAGE]
            places = list(range(len(pages)))
            if self.evict_window is not None and len(pages) > sum(self.evict_window):
                sink, recent = self.evict_window
                places = places[:sink] + places[-recent:]
            assert held == places

    def most_pages(self, request: Request) -> int:
        """What it can still come to hold, with the samples that it has left."""
        prompt, samples = len(request.prompt_token_ids), len(request.unfinished)
        shared = 0 if self.copy_on_fork else prompt // PAGE_SIZE
        own = pages_for(prompt + request.max_tokens, PAGE_SIZE) - shared
        if self.evict_window is not None:
            window = sum(self.evict_window)
            own = min(own, max(window, pages_for(prompt, PAGE_SIZE)) if self.copy_on_fork else window)
        return shared + samples * own

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            for _ in range(10_000):
                if not self.engine.has_work:
                    break
                self.one_step()
            assert all(request.finished for request in self.requests)
            self.check_finished()
            assert self.engine.is_empty()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=250, stateful_step_count=30, deadline=None, derandomize=True)
