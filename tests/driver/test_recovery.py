"""Shards fail at any moment: the group is rebuilt, what ran before replays, and no token is published twice or left out."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from distributed_sparse.config import EngineConfig
from distributed_sparse.driver import recovery as recovery_module
from distributed_sparse.driver.driver import Driver, Updates
from distributed_sparse.driver.pages import pages_for
from distributed_sparse.driver.recovery import KEPT_RECORDS, Recovery
from distributed_sparse.protocol.client import ModelInfo, NewRequest, RequestUpdate
from distributed_sparse.protocol.step import PrefillChunk, StepPlan, StepResult
from distributed_sparse.ranks.base import ShardFailure
from distributed_sparse.sampling_params import SamplingParams
from tests.support.patience import WAIT_S
from tests.support.scripted_group import VOCAB_SIZE, ScriptedGroup, expected_tokens

PAGE_SIZE = 16
MAX_MODEL_LEN = 160
INFO = ModelInfo(VOCAB_SIZE, num_layers=1, num_kv_heads=1, eos_token_ids=(), max_model_len=MAX_MODEL_LEN)
PROMPT = [5, 6, 7, 8]


def failure(cause: str = "rank 0 was killed by SIGKILL", traceback: str = "", detect_s: float = 0.0) -> ShardFailure:
    made = ShardFailure((0,), cause, traceback)
    made.detect_s = detect_s
    return made


def make_config(**engine_args: Any) -> EngineConfig:
    return EngineConfig.from_dict({"model": "m", "max_num_seqs": 4, **engine_args})


def request(request_id: str, max_tokens: int = 8, prompt: list[int] = PROMPT, **params: Any) -> NewRequest:
    return NewRequest(request_id, prompt, SamplingParams(max_tokens=max_tokens, temperature=0, **params))


class Loop:
    """A Driver with its Recovery, and steps that are taken one by one, as the service's thread takes them."""

    def __init__(self, group: ScriptedGroup | None = None, **engine_args: Any) -> None:
        self.group = group or ScriptedGroup()
        self.driver = Driver(make_config(**engine_args), INFO, None, self.group)
        self.woken = threading.Event()
        self.recovery = Recovery(self.driver, self.take, self.woken.set)
        self.updates: dict[str, list[RequestUpdate]] = {}

    def take(self, updates: Updates) -> None:
        for update in itertools.chain.from_iterable(updates.values()):
            self.updates.setdefault(update.request_id, []).append(update)

    def add(self, new: NewRequest) -> None:
        assert self.driver.add_request("c", new) is None

    def fail(self, error: ShardFailure | None = None) -> None:
        """The next step fails."""

        def once(plan: StepPlan) -> None:
            self.group.before_step = None
            raise error or failure()

        self.group.before_step = once
        assert self.recovery.run(self.driver.step) is None
        assert not self.recovery.up

    def come_back(self) -> None:
        """Wait for the rebuild, then take a step. Raises what has ended it."""
        deadline = time.monotonic() + WAIT_S
        while self.recovery.run(self.step) is None:
            assert time.monotonic() < deadline, "the rebuild does not end"
            self.woken.wait(0.01)

    def step(self) -> bool:
        self.take(self.driver.step())
        return True

    def finish(self) -> None:
        for _ in range(1000):
            if not self.driver.has_work:
                return
            self.come_back()
        raise AssertionError("work is left that never ends")

    def tokens(self, request_id: str) -> list[int]:
        return [token for update in self.updates[request_id] for sample in update.samples for token in sample.token_ids]


@pytest.fixture
def started() -> Iterator[Callable[..., Loop]]:
    """Loops whose shards are up; their threads end with the test."""
    loops: list[Loop] = []

    def start(group: ScriptedGroup | None = None, **engine_args: Any) -> Loop:
        loops.append(Loop(group, **engine_args))
        loops[-1].recovery.start()
        return loops[-1]

    yield start
    for loop in loops:
        loop.recovery.cancel()
        loop.recovery.close()


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery_module, "RETRY_PAUSE_S", 0.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The clock of the recovery, which stands still until a test turns it."""
    clock = SimpleNamespace(now=1000.0)
    fake = SimpleNamespace(monotonic=lambda: clock.now, time=lambda: clock.now)
    monkeypatch.setattr(recovery_module, "time", fake)
    return clock


# ---- in plain sentences


def test_a_request_goes_on_where_it_was_and_publishes_every_token_once(started: Callable[..., Loop]) -> None:
    loop = started()
    loop.add(request("1", 8))
    for _ in range(3):
        loop.come_back()
    loop.fail()
    loop.finish()
    assert loop.tokens("1") == expected_tokens(PROMPT, 8)
    assert (loop.group.generation, loop.recovery.count, loop.recovery.up) == (1, 1, True)
    metrics = loop.updates["1"][-1].metrics
    assert metrics is not None and metrics.num_replayed_tokens == len(PROMPT) + 2


def test_no_step_is_taken_and_the_loop_is_not_held_up_while_shards_are_rebuilt(started: Callable[..., Loop]) -> None:
    loop = started()
    loop.add(request("1"))
    back = threading.Event()
    loop.group.before_rebuild = lambda: assert_true(back.wait(WAIT_S))
    loop.fail()
    began, steps = time.monotonic(), len(loop.group.plans)
    assert loop.recovery.busy
    assert [loop.recovery.run(loop.step) for _ in range(50)] == [None] * 50
    assert (len(loop.group.plans), loop.recovery.up) == (steps, False)
    assert time.monotonic() - began < 5
    back.set()
    assert loop.woken.wait(WAIT_S), "the loop is told that the rebuild has ended"
    loop.finish()
    assert loop.tokens("1") == expected_tokens(PROMPT, 8)


def assert_true(value: bool) -> None:
    assert value


def test_requests_that_come_and_go_during_a_rebuild_are_taken_in_and_forgotten(started: Callable[..., Loop]) -> None:
    loop = started()
    for name in ("stays", "goes"):
        loop.add(request(name))
    loop.come_back()
    back = threading.Event()
    loop.group.before_rebuild = lambda: assert_true(back.wait(WAIT_S))
    loop.fail()
    loop.add(request("new", prompt=[9, 9]))
    loop.add(request("new and gone"))
    loop.take({"c": loop.driver.abort(["goes", "new and gone"])})
    back.set()
    loop.finish()
    assert loop.tokens("stays") == expected_tokens(PROMPT, 8)
    assert loop.tokens("new") == expected_tokens([9, 9], 8)
    assert loop.tokens("goes") == expected_tokens(PROMPT, 1) and loop.tokens("new and gone") == []
    assert (loop.driver.allocator.used, loop.driver.allocator.reserved) == (0, 0)


@pytest.mark.parametrize("engine_args", [{"max_rebuilds": 2}, {"max_rebuilds": 2, "rebuild_window_s": 30.0}])
def test_one_failure_more_than_max_rebuilds_within_the_window_ends_the_engine(
    started: Callable[..., Loop], clock: SimpleNamespace, engine_args: dict[str, Any]
) -> None:
    loop = started(**engine_args)
    loop.add(request("1"))
    for _ in range(2):
        clock.now += 10
        loop.fail()
        loop.come_back()
    loop.fail()
    window = engine_args.get("rebuild_window_s", 600.0)
    with pytest.raises(
        ShardFailure, match=rf"SIGKILL \(failure 3 within rebuild_window_s={window:g}, and max_rebuilds=2\)"
    ) as caught:
        loop.come_back()
    assert caught.value.ranks == (0,)
    assert loop.group.generation == 2, "there is no third rebuild"
    for updates in loop.driver.fail_all(caught.value).values():
        assert [update.error_kind for update in updates] == ["engine"]


def test_a_failure_older_than_the_window_does_not_count(started: Callable[..., Loop], clock: SimpleNamespace) -> None:
    loop = started(max_rebuilds=1, rebuild_window_s=30.0)
    loop.add(request("1", 30))
    for _ in range(4):
        loop.fail()
        loop.come_back()
        clock.now += 30.5
    loop.fail()
    loop.come_back()
    clock.now += 29.5
    loop.fail()
    with pytest.raises(ShardFailure, match=r"failure 2 within rebuild_window_s=30, and max_rebuilds=1"):
        loop.come_back()


def test_with_no_rebuild_allowed_the_first_failure_ends_the_engine_with_the_shards_own_error(
    started: Callable[..., Loop],
) -> None:
    loop = started(max_rebuilds=0)
    loop.add(request("1"))
    loop.fail(failure("rank 0 failed: ArithmeticError: boom", "Traceback of the shard"))
    with pytest.raises(ShardFailure, match=r"boom \(failure 1 within .*max_rebuilds=0\)") as caught:
        loop.come_back()
    assert "Traceback of the shard" in str(caught.value)
    assert loop.group.generation == 0


@pytest.mark.usefixtures("no_pause")
def test_a_rebuild_in_which_a_shard_fails_is_tried_again_and_counts_as_one_recovery(started: Callable[..., Loop]) -> None:
    loop = started()
    loop.add(request("1"))
    others = iter([failure("rank 0 died again"), failure("and again")])

    def before_rebuild() -> None:
        if (another := next(others, None)) is not None:
            raise another

    loop.group.before_rebuild = before_rebuild
    loop.come_back()
    loop.fail()
    loop.finish()
    assert loop.tokens("1") == expected_tokens(PROMPT, 8)
    (record,) = loop.recovery.records
    assert (record.attempts, record.cause, loop.recovery.count) == (3, "rank 0 was killed by SIGKILL", 1)
    assert loop.group.deadlines[1] is not None
    assert loop.group.deadlines[1:] == [loop.group.deadlines[1]] * 3, "one deadline for all attempts"


@pytest.mark.usefixtures("no_pause")
def test_rebuilds_that_fail_count_towards_max_rebuilds(started: Callable[..., Loop]) -> None:
    loop = started(max_rebuilds=3)
    loop.add(request("1"))

    def before_rebuild() -> None:
        raise failure("rank 0 dies while it loads")

    loop.group.before_rebuild = before_rebuild
    loop.fail()
    with pytest.raises(ShardFailure, match=r"rank 0 dies while it loads \(failure 4 within"):
        loop.come_back()
    assert loop.group.generation == 3


@pytest.mark.usefixtures("no_pause")
def test_a_rebuild_that_fails_behind_its_deadline_is_not_tried_again(
    started: Callable[..., Loop], clock: SimpleNamespace
) -> None:
    loop = started(startup_timeout_s=50.0)
    loop.add(request("1"))

    def before_rebuild() -> None:
        clock.now += 26
        raise failure(f"not ready at {clock.now:g}")

    loop.group.before_rebuild = before_rebuild
    loop.fail()
    with pytest.raises(ShardFailure, match="not ready at 1052"):
        loop.come_back()
    assert loop.group.deadlines[1:] == [1050.0, 1050.0]


def test_a_replacement_that_the_user_must_mend_ends_the_engine_with_its_own_words(started: Callable[..., Loop]) -> None:
    loop = started()
    loop.add(request("1"))

    def before_rebuild() -> None:
        raise ValueError("rank 0 has torch 1 but rank 1 has torch 2; install the same torch on every node")

    loop.group.before_rebuild = before_rebuild
    loop.fail()
    with pytest.raises(ShardFailure, match="rank 0 has torch 1 but rank 1 has torch 2; install the same torch on every node"):
        loop.come_back()
    assert loop.group.generation == 1, "it is not tried again"


def test_a_rebuild_can_be_cancelled(started: Callable[..., Loop]) -> None:
    loop = started()
    loop.add(request("1"))

    def before_rebuild() -> None:
        assert loop.group.cancelled.wait(WAIT_S)
        raise failure("the shards have been stopped")

    loop.group.before_rebuild = before_rebuild
    loop.fail()
    began = time.monotonic()
    loop.recovery.cancel()
    with pytest.raises(ShardFailure, match="the shards have been stopped"):
        loop.come_back()
    loop.recovery.close()
    assert time.monotonic() - began < 5.0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rebuild") and thread.is_alive()]


def test_the_pause_before_another_try_ends_when_it_is_cancelled(
    started: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery_module, "RETRY_PAUSE_S", 600.0)
    loop = started()
    loop.add(request("1"))
    tried = threading.Event()

    def before_rebuild() -> None:
        tried.set()
        raise failure("rank 0 died again")

    loop.group.before_rebuild = before_rebuild
    loop.fail()
    assert tried.wait(WAIT_S)
    assert loop.recovery.run(loop.step) is None and loop.recovery.busy, "it pauses"
    began = time.monotonic()
    loop.recovery.cancel()
    with pytest.raises(ShardFailure, match="rank 0 died again"):
        loop.come_back()
    assert time.monotonic() - began < 5.0 and loop.group.generation == 1


def test_after_a_cancel_a_failure_is_not_followed_by_a_rebuild(started: Callable[..., Loop]) -> None:
    loop = started()
    loop.add(request("1"))
    loop.recovery.cancel()
    loop.fail()
    with pytest.raises(ShardFailure, match="SIGKILL"):
        loop.come_back()
    assert loop.group.generation == 0


# ---- what is told


def recoveries_told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for record in caplog.records if (line := record.getMessage()).startswith("recovered in generation")]


def test_a_recovery_is_told_in_one_line_once_everything_stands_where_it_was(
    started: Callable[..., Loop], clock: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "distributed_sparse.driver.recovery")
    loop = started()
    loop.add(request("1", 12))
    for _ in range(4):
        loop.come_back()

    def before_rebuild() -> None:
        clock.now += 3

    loop.group.before_rebuild = before_rebuild
    clock.now += 5
    loop.fail(failure("rank 0 (node n, host h, pid 1) was killed by SIGKILL", detect_s=0.04))
    loop.come_back()
    assert recoveries_told(caplog) == [], "the replay is not over"
    assert "rebuilding the group: rank 0 (node n" in caplog.records[0].getMessage(), "one that lasts is not silent"
    assert loop.recovery.stats()["recovery_log"][0]["replay_s"] is None
    clock.now += 2
    for _ in range(8):
        loop.come_back()
    (line,) = recoveries_told(caplog)
    assert line == (
        "recovered in generation 1: rank 0 (node n, host h, pid 1) was killed by SIGKILL; noticed within 0.04 s, "
        "rebuilt in 3.00 s (1 attempt(s)), 7 tokens replayed in 2.00 s"
    )
    assert loop.recovery.stats() == {
        "recoveries": 1,
        "recovery_log": [
            {
                "ranks": (0,),
                "cause": "rank 0 (node n, host h, pid 1) was killed by SIGKILL",
                "noticed": 1005.0,
                "detect_s": 0.04,
                "further_causes": (),
                "attempts": 1,
                "rebuild_s": 3.0,
                "replay_s": 2.0,
                "replayed_tokens": 7,
            }
        ],
    }


def test_a_replay_that_the_next_failure_cuts_off_says_so(
    started: Callable[..., Loop], caplog: pytest.LogCaptureFixture
) -> None:
    loop = started()
    loop.add(request("1", 12))
    for _ in range(4):
        loop.come_back()
    loop.fail(failure("the first"))
    loop.come_back()
    loop.fail(failure("the second"))
    loop.finish()
    lines = recoveries_told(caplog)
    assert len(lines) == 2
    assert "generation 1: the first;" in lines[0] and "4 tokens replayed until the next failure" in lines[0]
    assert "generation 2: the second;" in lines[1] and "7 tokens replayed in" in lines[1]
    assert [record.cause for record in loop.recovery.records] == ["the first", "the second"]
    assert (loop.recovery.records[0].replay_s, loop.recovery.count) == (None, 2)
    assert loop.tokens("1") == expected_tokens(PROMPT, 12)


def test_an_idle_engine_recovers_with_nothing_to_replay(started: Callable[..., Loop], caplog: pytest.LogCaptureFixture) -> None:
    loop = started()
    loop.fail()
    loop.come_back()
    (line,) = recoveries_told(caplog)
    assert "0 tokens replayed" in line


def test_the_records_of_the_last_recoveries_are_kept_and_all_are_counted(
    started: Callable[..., Loop], clock: SimpleNamespace
) -> None:
    loop = started(rebuild_window_s=1.0)
    for number in range(KEPT_RECORDS + 3):
        clock.now += 10
        loop.fail(failure(f"failure {number}"))
        loop.come_back()
    stats = loop.recovery.stats()
    assert stats["recoveries"] == KEPT_RECORDS + 3
    assert [record["cause"] for record in stats["recovery_log"]] == [f"failure {i}" for i in range(3, KEPT_RECORDS + 3)]


# ---- the first start


def test_a_shard_that_dies_at_the_first_start_is_replaced(started: Callable[..., Loop]) -> None:
    def before_start() -> None:
        raise failure("rank 0 was killed by SIGKILL while it loaded")

    group = ScriptedGroup()
    group.before_start = before_start
    loop = started(group)
    loop.add(request("1"))
    loop.finish()
    assert loop.tokens("1") == expected_tokens(PROMPT, 8)
    assert (group.generation, loop.recovery.count) == (1, 1)
    (record,) = loop.recovery.records
    assert record.cause == "rank 0 was killed by SIGKILL while it loaded"
    assert record.replayed_tokens == 0 and record.replay_s is not None
    assert group.deadlines == [group.deadlines[0]] * 2, "the deadline of the start holds for both"


@pytest.mark.parametrize(
    "error", [failure("rank 0 failed: MemoryError", "Traceback ..."), ValueError("the checkpoint lacks a tensor")]
)
def test_a_shard_that_says_itself_why_it_cannot_start_is_not_tried_again(error: Exception) -> None:
    def before_start() -> None:
        raise error

    loop = Loop()
    loop.group.before_start = before_start
    with pytest.raises(type(error)) as caught:
        loop.recovery.start()
    assert caught.value is error and loop.group.generation == 0
    loop.recovery.close()


@pytest.mark.usefixtures("no_pause")
def test_a_first_start_that_always_dies_ends_after_max_rebuilds() -> None:
    def die() -> None:
        raise failure()

    loop = Loop(max_rebuilds=2)
    loop.group.before_start = loop.group.before_rebuild = die
    with pytest.raises(ShardFailure, match=r"failure 3 within .*max_rebuilds=2"):
        loop.recovery.start()
    assert loop.group.generation == 2
    loop.recovery.close()


# ---- a smaller cache


def test_of_requests_that_the_rebuilt_caches_have_no_room_for_only_those_end_that_never_fit(
    started: Callable[..., Loop],
) -> None:
    loop = started(ScriptedGroup(num_pages=12))
    prompts = {"large": [3] * 40, "first": [4] * 20, "second": [5] * 20}
    loop.add(request("large", 40, prompts["large"]))  # 5 pages
    loop.add(request("first", 20, prompts["first"]))  # 3 pages
    loop.add(request("second", 20, prompts["second"]))
    for _ in range(4):
        loop.come_back()
    assert loop.driver.allocator.reserved == 11, "they run together"
    loop.group.cache_pages = 5
    loop.fail()
    loop.finish()
    last = loop.updates["large"][-1]
    assert (last.finished, last.error_kind) == (True, "engine")
    assert last.error is not None and "after a recovery, the request needs 5 pages of 16 tokens" in last.error
    assert "the cache has 4; lower max_tokens or n, or raise kv_cache_memory_bytes" in last.error
    assert loop.tokens("large") == expected_tokens(prompts["large"], 4), "its tokens so far stay"
    for name in ("first", "second"):
        assert loop.tokens(name) == expected_tokens(prompts[name], 20)
    assert loop.driver.stats()["requests"] == {"running": 0, "waiting": 0, "finished": 2, "aborted": 0, "failed": 1}
    assert (loop.driver.allocator.used, loop.driver.allocator.reserved) == (0, 0)


# ---- in any order


class Rank(ScriptedGroup):
    """Fails before or after it has done a step, and remembers how each token was computed, from one generation to the next."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.fails: str | None = None
        self.computed: dict[tuple[int, int, int], tuple[int, int] | str] = {}

    def collect(self, timeout: float = float("inf")) -> list[StepResult]:
        when, self.fails = self.fails, None
        if when == "before":
            self._failure = failure()
            raise self._failure
        plan = self._uncollected[0]
        results = super().collect(timeout)
        if when == "after":  # rank 0 has sampled; another one has not answered
            self._failure = failure()
            raise self._failure
        self._remember(plan)
        return results

    def _remember(self, plan: StepPlan) -> None:
        for part in plan.parts:
            setup = self.cache.setups[part.slot]
            for position in range(part.end - part.num_tokens, part.end):
                how = (part.end - part.num_tokens, part.end) if isinstance(part, PrefillChunk) else "decode"
                of_prompt = position < setup.prompt_length
                key = (setup.seed, 0 if of_prompt else setup.sample_index, position)
                assert self.computed.setdefault(key, how) == how, f"{key} was computed in another way than at first"


@dataclasses.dataclass
class Told:
    """What a client has been told of one request."""

    new: NewRequest
    tokens: dict[int, list[int]]
    positions: list[int]
    """Of prompt log-probabilities, as they came."""
    reasons: dict[int, str]
    finished: bool = False
    error: str | None = None
    aborted: bool = False


class AnyFailure(RuleBasedStateMachine):
    """Requests of every kind, aborts, and failures of every kind, also during a replay and on end, with one plan or two under
    way."""

    @initialize(
        num_pages=st.integers(12, 40),
        max_num_seqs=st.integers(1, 6),
        spare_budget=st.one_of(st.integers(0, 6), st.integers(0, 40)),
        evict_window=st.none() | st.tuples(st.integers(0, 2), st.integers(1, 3)),
        copy_on_fork=st.booleans(),
        queues_plans=st.booleans(),
    )
    def start(
        self,
        num_pages: int,
        max_num_seqs: int,
        spare_budget: int,
        evict_window: tuple[int, int] | None,
        copy_on_fork: bool,
        queues_plans: bool,
    ) -> None:
        self.evict_window = evict_window
        self.group = Rank(num_pages=num_pages, evict_window=evict_window, copy_on_fork=copy_on_fork, queues_plans=queues_plans)
        config = make_config(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_seqs + spare_budget)
        self.driver = Driver(config, INFO, None, self.group)
        self.driver.group.start()
        self.driver.resume()
        self.told: dict[str, Told] = {}

    # ---- what happens

    @rule(
        prompt_length=st.one_of(st.integers(1, 70), st.sampled_from([15, 16, 17, 32, 48])),
        max_tokens=st.integers(1, 30),
        n=st.integers(1, 4),
        decoded=st.integers(0, 6),
        score=st.booleans(),
        logprobs=st.booleans(),
        ends=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), max_size=3),
        first=st.integers(0, VOCAB_SIZE - 1),
    )
    def add(
        self,
        prompt_length: int,
        max_tokens: int,
        n: int,
        decoded: int,
        score: bool,
        logprobs: bool,
        ends: list[tuple[int, int]],
        first: int,
    ) -> None:
        """`ends`: (sample, output token) where it stops, so that samples end one after the other."""
        number = len(self.told)
        prompt = [(first + i * 7) % VOCAB_SIZE for i in range(prompt_length)]
        decoded = min(decoded, prompt_length - 1)
        window: dict[str, Any] = {"evict_window": self.evict_window, "prefill_length": prompt_length - decoded}
        stop = {expected_tokens(prompt, place + 1, index, **window)[place] for index, place in ends}
        params = SamplingParams(
            n=1 if score else min(n, self.driver.config.max_num_seqs),
            max_tokens=max_tokens,
            seed=number,
            stop_token_ids=sorted(stop),
            prompt_logprobs=0 if score or logprobs else None,
            logprobs=0 if logprobs and not score else None,
            decode_last_prompt_tokens=decoded,
        )
        new = NewRequest(f"r{number}", prompt, params, score)
        refused = self.driver.add_request("c", new)
        if refused is not None:
            assert refused.error is not None and "but the cache has" in refused.error
            return
        self.told[new.request_id] = Told(new, {i: [] for i in range(params.n)}, [], {})

    @precondition(lambda self: self.driver.has_work)
    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.take(self.driver.step())

    @precondition(lambda self: self.driver.has_work)
    @rule(
        when=st.sampled_from(["before", "after"]),
        steps=st.lists(st.integers(0, 12), min_size=1, max_size=4),
        pages=st.sampled_from([0, 0, 0, 0, 0, 0, 0, -1, -3]),
    )
    def fail(self, when: str, steps: list[int], pages: int) -> None:
        """After each of `steps`: so every one behind the first is likely to cut a replay off."""
        self.group.cache_pages = max(self.group.cache_pages + pages, 4)
        for count in steps:
            for _ in range(count):
                self.take(self.driver.step())
            self.step_into_failure(when)
            self.group.rebuild()
            self.take(self.driver.resume())

    def step_into_failure(self, when: str) -> None:
        self.group.fails = when
        with pytest.raises(ShardFailure):
            for _ in range(2):  # the first may only send a plan
                self.take(self.driver.step())

    @precondition(lambda self: self.told)
    @rule(data=st.data(), late=st.booleans())
    def abort(self, data: st.DataObject, late: bool) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.told)))
        if late:  # between a failure and the rebuild
            self.step_into_failure("before")
        self.told[request_id].aborted |= not self.told[request_id].finished
        self.take({"c": self.driver.abort([request_id])})
        if late:
            self.group.rebuild()
            self.take(self.driver.resume())

    # ---- what a client may be told

    def take(self, updates: Updates) -> None:
        for update in itertools.chain.from_iterable(updates.values()):
            told = self.told[update.request_id]
            assert not told.finished, "an update came after the last one"
            for block in update.prompt_logprobs:
                told.positions += range(block.position, block.position + block.rows)
                wanted = told.new.prompt_token_ids[block.position : block.position + block.rows]
                assert memoryview(block.token_ids).cast("i").tolist() == wanted
            for sample in update.samples:
                assert sample.index not in told.reasons or not sample.token_ids
                told.tokens[sample.index] += sample.token_ids
                scored = [token for block in sample.logprobs for token in memoryview(block.token_ids).cast("i").tolist()]
                assert scored == (sample.token_ids if told.new.params.logprobs is not None else [])
                if sample.finish_reason is not None:
                    assert told.reasons.setdefault(sample.index, sample.finish_reason) == sample.finish_reason
            told.finished, told.error = update.finished, update.error
        for told in self.told.values():
            self.check(told)

    def check(self, told: Told) -> None:
        """Every token and prompt log-probability came once and in order; where it has ended, all of them did."""
        new, params = told.new, told.new.params
        cut_off = told.aborted or told.error is not None
        assert told.positions == list(range(1, 1 + len(told.positions)))
        if told.finished and not cut_off and params.prompt_logprobs is not None:
            assert len(told.positions) == len(new.prompt_token_ids) - 1
        assert told.error is None or "after a recovery, the request needs" in told.error
        if new.score:
            assert not any(told.tokens.values())
            return
        for index, tokens in told.tokens.items():
            whole = self.undisturbed(new, index)
            assert tokens == whole[: len(tokens)]
            if not told.finished:
                continue
            if told.reasons[index] in ("abort", "error"):
                assert cut_off and (told.error is not None or told.reasons[index] == "abort")
            else:
                assert tokens == whole
                assert told.reasons[index] == ("stop" if whole[-1] in (params.stop_token_ids or ()) else "length")

    def undisturbed(self, new: NewRequest, index: int) -> list[int]:
        cache = self.__dict__.setdefault("_undisturbed", {})
        if (new.request_id, index) not in cache:
            params = new.params
            assert params.max_tokens is not None
            tokens = expected_tokens(
                new.prompt_token_ids,
                params.max_tokens,
                index,
                evict_window=self.evict_window,
                prefill_length=len(new.prompt_token_ids) - params.decode_last_prompt_tokens,
            )
            ends = [i for i, token in enumerate(tokens) if token in (params.stop_token_ids or ())]
            cache[new.request_id, index] = tokens[: ends[0] + 1] if ends else tokens
        return cache[new.request_id, index]

    @invariant()
    def pages_are_held_by_running_requests_alone(self) -> None:
        if not hasattr(self, "driver"):
            return
        allocator, scheduler = self.driver.allocator, self.driver.scheduler
        held = Counter(page for request in scheduler.running for s in request.unfinished for page in s.held_pages)
        assert allocator.used == len(held) <= allocator.reserved <= allocator.total
        assert allocator.total == self.group.cache_pages - 1
        unfinished = {request_id for request_id, told in self.told.items() if not told.finished}
        assert {request.request_id for request in (*scheduler.running, *scheduler.waiting)} == unfinished
        for request in scheduler.running:
            for sequence in request.unfinished:
                assert len(sequence.pages) >= pages_for(sequence.num_computed, PAGE_SIZE)

    def teardown(self) -> None:
        if not hasattr(self, "driver"):
            return
        for _ in range(10_000):
            if not self.driver.has_work:
                break
            self.take(self.driver.step())
        assert all(told.finished for told in self.told.values())
        assert not self.driver.replays
        assert (self.driver.allocator.used, self.driver.allocator.reserved) == (0, 0)
        self.driver.check()


TestAnyFailure = AnyFailure.TestCase
TestAnyFailure.settings = settings(max_examples=120, stateful_step_count=25, deadline=None, derandomize=True)
