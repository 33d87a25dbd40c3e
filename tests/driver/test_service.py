"""The service between clients and the Driver's thread: nothing published is lost or doubled, and nobody waits for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from distributed_sparse.client.client import Client
from distributed_sparse.config import EngineConfig
from distributed_sparse.driver import service as service_module
from distributed_sparse.driver.pages import pages_for
from distributed_sparse.driver.service import DriverService
from distributed_sparse.protocol.client import ModelInfo, NewRequest, RequestUpdate
from distributed_sparse.protocol.step import StepPlan
from distributed_sparse.ranks.base import ShardFailure
from distributed_sparse.sampling_params import SamplingParams
from tests.support.patience import WAIT_S
from tests.support.scripted_group import VOCAB_SIZE, ScriptedGroup, expected_tokens

PROMPT = [5, 6, 7, 8]
INFO = ModelInfo(VOCAB_SIZE, num_layers=1, num_kv_heads=1, eos_token_ids=(), max_model_len=512)
FAILURE = ShardFailure((0,), "rank 0 (node n, host h, pid 1) failed: ArithmeticError: boom", "Traceback ...")

Start = Callable[..., DriverService]


@pytest.fixture
def start() -> Iterator[Start]:
    """Services that end with the test."""
    started: list[DriverService] = []

    def start(group: ScriptedGroup | None = None, **engine_args: Any) -> DriverService:
        config = EngineConfig.from_dict({"model": "m", "max_num_seqs": 4, **engine_args})
        service = DriverService(config, INFO, None, group or ScriptedGroup())
        service.start()
        started.append(service)
        return service

    yield start
    for service in started:
        service.shutdown()


def request(request_id: str, max_tokens: int = 5, prompt: list[int] = PROMPT, **params: Any) -> NewRequest:
    return NewRequest(request_id, prompt, SamplingParams(max_tokens=max_tokens, temperature=0, **params))


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.002)


def read(
    service: DriverService, client_id: str, *request_ids: str, cursor: int = 0
) -> tuple[int, dict[str, list[RequestUpdate]]]:
    """Follow a client's outputs until the requests have finished: (cursor, updates by request)."""
    found: dict[str, list[RequestUpdate]] = {request_id: [] for request_id in request_ids}
    deadline = time.monotonic() + WAIT_S
    while not all(found[request_id] and found[request_id][-1].finished for request_id in request_ids):
        assert time.monotonic() < deadline, f"unfinished: {found}"
        received = service.next_outputs(client_id, cursor, 1.0)
        assert received is not None, "the service has closed"
        cursor, updates = received
        for update in updates:
            found.setdefault(update.request_id, []).append(update)
    return cursor, found


def tokens(updates: list[RequestUpdate]) -> list[int]:
    return [token for update in updates for sample in update.samples for token in sample.token_ids]


class Gate:
    """Steps wait at it: `pass_steps` lets so many through, `open` all."""

    def __init__(self) -> None:
        self._permits = threading.Semaphore(0)
        self._open = threading.Event()
        self.waiting = threading.Event()

    def __call__(self, plan: StepPlan) -> None:
        self.waiting.set()
        deadline = time.monotonic() + WAIT_S  # a test that has failed opens no more gates
        while not self._open.is_set() and not self._permits.acquire(timeout=0.01) and time.monotonic() < deadline:
            pass
        self.waiting.clear()

    def pass_steps(self, count: int = 1) -> None:
        self._permits.release(count)

    def open(self) -> None:
        self._open.set()


# ---- outputs


def test_tokens_come_in_the_order_in_which_they_were_committed(start: Start) -> None:
    service = start()
    service.submit("a", [request("1", 20), request("2", 8, [9, 9])])
    _, found = read(service, "a", "1", "2")
    assert tokens(found["1"]) == expected_tokens(PROMPT, 20)
    assert tokens(found["2"]) == expected_tokens([9, 9], 8)
    for updates in found.values():
        assert [update.finished for update in updates] == [False] * (len(updates) - 1) + [True]


def test_what_lies_behind_a_cursor_is_given_again_until_the_cursor_has_passed_it(start: Start) -> None:
    service = start()
    service.submit("a", [request("1", 6)])
    wait_until(lambda: service.stats()["requests"]["finished"] == 1, "the end of the request")
    first = service.next_outputs("a", 0, 1.0)
    assert first is not None and first[0] == 6
    assert service.next_outputs("a", 0, 1.0) == first  # the answer was lost on its way: ask again
    half = service.next_outputs("a", 4, 1.0)
    assert half is not None and half == (6, first[1][4:])
    assert service.next_outputs("a", 6, 0.0) == (6, [])


def test_a_client_that_asks_with_nothing_new_waits_for_its_time_and_no_longer(start: Start) -> None:
    service = start()
    started = time.monotonic()
    assert service.next_outputs("a", 0, 0.2) == (0, [])
    assert 0.2 <= time.monotonic() - started < 5


def test_clients_see_their_own_requests_alone(start: Start) -> None:
    service = start()
    service.submit("a", [request("1")])
    service.submit("b", [request("2")])
    assert set(read(service, "a", "1")[1]) == {"1"}
    assert set(read(service, "b", "2")[1]) == {"2"}


def test_a_client_cannot_abort_another_clients_request(start: Start) -> None:
    gate = Gate()
    service = start(ScriptedGroup(before_step=gate))
    service.submit("a", [request("1", 20)])
    gate.pass_steps(2)
    service.abort("b", ["1"])
    service.abort("a", ["unknown"])
    gate.open()
    _, found = read(service, "a", "1")
    assert tokens(found["1"]) == expected_tokens(PROMPT, 20)


def test_a_request_that_is_refused_says_why_and_the_others_of_the_call_go_on(start: Start) -> None:
    service = start()
    service.submit("a", [request("1", prompt=[VOCAB_SIZE]), request("2"), request("3", 600)])
    _, found = read(service, "a", "1", "2", "3")
    assert [update.error_kind for update in found["1"] + found["3"]] == ["invalid", "invalid"]
    assert f"outside the vocabulary of {VOCAB_SIZE}" in str(found["1"][0].error)
    assert "over max_model_len=512" in str(found["3"][0].error)
    assert tokens(found["2"]) == expected_tokens(PROMPT, 5)


def test_an_abort_ends_a_running_request_with_the_tokens_so_far(start: Start) -> None:
    gate = Gate()
    service = start(ScriptedGroup(before_step=gate))
    service.submit("a", [request("1", 100)])
    gate.pass_steps(3)
    wait_until(lambda: len((service.next_outputs("a", 0, 0.1) or (0, []))[1]) == 3, "the third token")
    service.abort("a", ["1"])
    gate.open()
    _, found = read(service, "a", "1")
    got = tokens(found["1"])
    assert found["1"][-1].samples[0].finish_reason == "abort"
    assert 3 <= len(got) < 100 and got == expected_tokens(PROMPT, len(got))
    assert service.stats()["pages"]["used"] == 0


def test_a_waiting_request_runs_out_of_time(start: Start) -> None:
    service = start(ScriptedGroup(before_step=lambda plan: time.sleep(0.005)), max_num_seqs=1)
    service.submit("a", [request("1", 100), request("2", 100, timeout_s=0.1)])
    _, found = read(service, "a", "1", "2")
    assert (tokens(found["2"]), found["2"][-1].error_kind) == ([], "timeout")
    assert tokens(found["1"]) == expected_tokens(PROMPT, 100)


@pytest.mark.parametrize("state", ["waiting", "in prefill", "decoding"])
def test_the_pages_of_an_aborted_request_are_free_within_one_step(start: Start, state: str) -> None:
    gate = Gate()
    steps = {"waiting": 2, "in prefill": 2, "decoding": 6}[state]
    service = start(ScriptedGroup(before_step=gate), max_num_seqs=1 if state == "waiting" else 4, max_num_batched_tokens=16)
    service.submit("a", [request("other", 400), request("1", 100, prompt=[3] * 40, n=1)])
    gate.pass_steps(steps)
    wait_until(lambda: service._driver._stats.steps == steps and gate.waiting.is_set(), "the steps")
    slot = service._driver._requests["1"].leader
    assert {"waiting": slot.slot < 0, "in prefill": 0 < slot.num_committed < 40, "decoding": slot.num_committed > 40}[state]
    service.abort("a", ["1"])
    gate.pass_steps(2)  # the step that runs, and one of `stats`
    stats = service.stats()
    assert stats["steps"] == steps + 1
    assert (stats["requests"]["aborted"], stats["requests"]["running"]) == (1, 1)
    assert stats["pages"]["used"] == 1 and stats["pages"]["reserved"] == pages_for(4 + 400, 16)
    gate.open()
    service.abort("a", ["other"])


# ---- silence


def test_a_client_that_has_gone_silent_has_its_requests_aborted(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "CLIENT_SILENCE_S", 1.0)
    service = start(ScriptedGroup(before_step=lambda plan: time.sleep(0.01)))
    service.submit("gone", [request("1", 400)])
    service.submit("here", [request("2", 150)])
    _, found = read(service, "here", "2")  # it asks all the time, and takes longer than the silence
    assert tokens(found["2"]) == expected_tokens(PROMPT, 150)
    stats = service.stats()
    assert stats["requests"] == {"running": 0, "waiting": 0, "finished": 1, "aborted": 1, "failed": 0}
    assert stats["pages"]["used"] == 0


def test_a_client_that_comes_back_after_a_silence_learns_what_happened_and_can_go_on(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "CLIENT_SILENCE_S", 0.5)
    service = start(ScriptedGroup(before_step=lambda plan: time.sleep(0.005)))
    service.submit("a", [request("0", 3)])
    cursor, _ = read(service, "a", "0")
    service.submit("a", [request("1", 400)])
    wait_until(lambda: service.stats()["requests"]["aborted"] == 1, "the abort")
    time.sleep(0.6)  # silent for longer still, with nothing running
    cursor, found = read(service, "a", "1", cursor=cursor)
    assert found["1"][-1].samples[0].finish_reason == "abort"
    got = tokens(found["1"])
    assert 0 < len(got) < 400 and got == expected_tokens(PROMPT, len(got))
    service.submit("a", [request("2", 4)])
    _, found = read(service, "a", "2", cursor=cursor)
    assert tokens(found["2"]) == expected_tokens(PROMPT, 4)


# ---- failure


def test_a_failing_shard_ends_every_request_with_the_reason_and_later_ones_are_refused_with_it(start: Start) -> None:
    submitted = threading.Event()

    def before_step(plan: StepPlan) -> None:
        assert submitted.wait(WAIT_S)
        if plan.step == 4:
            raise FAILURE

    group = ScriptedGroup(before_step=before_step)
    service = start(group, max_rebuilds=0)
    service.submit("a", [request(str(i), 100) for i in range(6)])  # 4 run, 2 wait
    service.submit("b", [request("b", 100)])
    submitted.set()
    _, found = read(service, "a", *map(str, range(6)))
    found |= read(service, "b", "b")[1]
    for request_id, updates in found.items():
        assert updates[-1].error_kind == "engine"
        assert "rank 0 (node n, host h, pid 1) failed: ArithmeticError: boom" in str(updates[-1].error)
        got = tokens(updates)
        assert got == expected_tokens(PROMPT, len(got)), "tokens of finished steps stay"
        assert len(got) == (4 if request_id in "0123" else 0)
    service.submit("a", [request("late")])
    late = read(service, "a", "late", cursor=sum(map(len, found.values())) - len(found["b"]))[1]["late"]
    assert (late[0].error_kind, late[0].error) == ("engine", found["0"][-1].error)
    assert group.stopped.is_set()
    assert not service.health()
    stats = service.stats()
    assert stats["requests"] == {"running": 0, "waiting": 0, "finished": 0, "aborted": 0, "failed": 8}


def test_an_error_inside_the_driver_ends_requests_too(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(plan: StepPlan) -> None:
        raise KeyError("a bug")

    service = start(ScriptedGroup(before_step=broken))
    service.submit("a", [request("1")])
    (update,) = read(service, "a", "1")[1]["1"]
    assert update.error_kind == "engine" and "internal error of the driver: KeyError('a bug')" in str(update.error)
    assert not service.health()


@pytest.mark.parametrize(("max_rebuilds", "error_kind"), [(1, None), (0, "engine")])
def test_a_failure_while_stats_are_asked_for_leaves_the_question_and_the_requests_behind_it_answered(
    start: Start, max_rebuilds: int, error_kind: str | None
) -> None:
    gate = Gate()

    def before_step(plan: StepPlan) -> None:
        gate(plan)
        if plan.report and not plan.parts:  # the step of `stats`
            raise FAILURE

    service = start(ScriptedGroup(before_step=before_step), max_rebuilds=max_rebuilds)
    service.submit("a", [request("1", 100)])
    assert gate.waiting.wait(WAIT_S)
    answers: list[dict[str, Any]] = []
    asker = threading.Thread(target=lambda: answers.append(service.stats()))
    asker.start()
    wait_until(lambda: len(service._inbox) == 1, "the question")
    service.submit("a", [request("2", 100)])  # in the inbox, behind the call in which the shards fail
    gate.open()
    _, found = read(service, "a", "1", "2")
    assert [updates[-1].error_kind for updates in found.values()] == [error_kind] * 2
    asker.join(WAIT_S)
    assert answers[0]["recovery_log"][0]["cause"] == FAILURE.cause


def test_an_idle_engine_notices_that_a_shard_has_gone(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "IDLE_STEP_S", 0.05)
    monkeypatch.setattr(service_module, "IDLE_POLL_S", 0.02)
    dead = threading.Event()

    def before_step(plan: StepPlan) -> None:
        if dead.is_set():
            raise FAILURE

    group = ScriptedGroup(before_step=before_step)
    service = start(group, max_rebuilds=0)
    wait_until(lambda: len(group.plans) >= 2, "an empty step of the idle engine")
    assert service.health()
    dead.set()
    wait_until(lambda: not service.health(), "the end of health")
    service.submit("a", [request("1")])
    assert read(service, "a", "1")[1]["1"][0].error_kind == "engine"


def test_an_idle_engine_whose_shard_has_gone_is_well_again_before_the_next_request(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "IDLE_POLL_S", 0.02)
    group = ScriptedGroup()
    service = start(group)
    group._failure = FAILURE  # only `check` is asked while there is nothing to do
    wait_until(lambda: group.generation == 1 and service.health(), "the recovery")
    assert group.plans == []
    service.submit("a", [request("1")])
    assert tokens(read(service, "a", "1")[1]["1"]) == expected_tokens(PROMPT, 5)
    assert service.stats()["recoveries"] == 1


# ---- recovery


class Rebuild:
    """A group whose step `number` fails, and whose rebuild then waits until it is let go."""

    def __init__(self, number: int = 3) -> None:
        self.group = ScriptedGroup(before_step=self._before_step)
        self.group.before_rebuild = self._before_rebuild
        self.number = number
        self.begun, self.let_go = threading.Event(), threading.Event()

    def _before_step(self, plan: StepPlan) -> None:
        if plan.step == self.number and not self.begun.is_set():
            raise FAILURE

    def _before_rebuild(self) -> None:
        self.begun.set()
        while not self.let_go.wait(0.01):
            if self.group.cancelled.is_set():
                raise ShardFailure((), "the shards have been stopped")


def test_a_stream_neither_repeats_nor_skips_a_token_when_the_shards_are_rebuilt(start: Start) -> None:
    submitted = threading.Event()
    failed: set[int] = set()

    def before_step(plan: StepPlan) -> None:
        assert submitted.wait(WAIT_S)
        if plan.step in (4, 9, 13) and plan.step not in failed:
            failed.add(plan.step)
            raise FAILURE

    service = start(ScriptedGroup(before_step=before_step))
    service.submit("a", [request(str(i), 30, [i, i]) for i in range(6)])  # 4 run, 2 wait
    submitted.set()
    _, found = read(service, "a", *map(str, range(6)))
    for i in range(6):
        assert tokens(found[str(i)]) == expected_tokens([i, i], 30)
        assert len(found[str(i)]) == 30, "one update for each token"
    stats = service.stats()
    assert (stats["recoveries"], stats["generation"], len(stats["recovery_log"])) == (3, 3, 3)
    assert stats["requests"] == {"running": 0, "waiting": 0, "finished": 6, "aborted": 0, "failed": 0}
    assert (stats["pages"]["used"], stats["pages"]["reserved"]) == (0, 0)
    cut_off = [record["replay_s"] is None for record in stats["recovery_log"]]
    assert cut_off == [False, True, False], "the third failure came before the replay after the second had ended"


def test_while_the_shards_are_rebuilt_every_call_is_answered_at_once_and_health_is_false(start: Start) -> None:
    rebuild = Rebuild()
    service = start(rebuild.group)
    service.submit("a", [request("aborted", 400), request("late", 400, timeout_s=0.3), request("stays", 30)])
    assert rebuild.begun.wait(WAIT_S)
    wait_until(lambda: not service.health(), "the end of health")
    began = time.monotonic()
    assert service.stats()["requests"]["running"] == 3
    service.abort("a", ["aborted"])
    service.submit("a", [request("new", 5), request("refused", prompt=[VOCAB_SIZE])])
    stats = service.stats()
    assert (stats["requests"]["aborted"], stats["requests"]["waiting"]) == (1, 1)
    assert stats["pages"]["used"] == 2, "those of the aborted request are free"
    assert (stats["generation"], stats["ranks"][0]["rank"]) == (1, 0)
    assert time.monotonic() - began < 1.0
    cursor, found = read(service, "a", "aborted", "late", "refused")
    assert found["aborted"][-1].samples[0].finish_reason == "abort"
    assert [found[name][-1].error_kind for name in ("late", "refused")] == ["timeout", "invalid"]
    assert not service.health() and service.stats()["requests"]["running"] == 1
    rebuild.let_go.set()
    wait_until(service.health, "the return of health")
    _, rest = read(service, "a", "stays", "new", cursor=cursor)
    assert tokens(found["stays"] + rest["stays"]) == expected_tokens(PROMPT, 30)
    assert tokens(rest["new"]) == expected_tokens(PROMPT, 5)
    assert service.stats()["pages"]["used"] == 0


@pytest.mark.parametrize("blocks", [True, False])
def test_a_shutdown_does_not_wait_for_a_rebuild(start: Start, blocks: bool) -> None:
    rebuild = Rebuild()
    service = start(rebuild.group)
    service.submit("a", [request("1", 400)])
    assert rebuild.begun.wait(WAIT_S)
    if not blocks:
        rebuild.let_go.set()  # it may just be coming to its end
    began = time.monotonic()
    service.shutdown()
    assert time.monotonic() - began < 2.0
    assert rebuild.group.stopped.is_set() and not service._thread.is_alive()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rebuild")]


def test_a_shutdown_does_not_wait_for_a_step_that_a_hung_rank_does_not_answer(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "STOP_GRACE_S", 0.1)

    def before_step(plan: StepPlan) -> None:
        assert group.cancelled.wait(WAIT_S)
        raise ShardFailure((), "the shards have been stopped")

    group = ScriptedGroup(before_step=before_step)
    service = start(group)
    service.submit("a", [request("1")])
    wait_until(lambda: len(group.plans) == 1, "the step")
    began = time.monotonic()
    service.shutdown()
    assert time.monotonic() - began < 2.0
    assert group.generation == 0, "nothing is rebuilt any more"


def test_shards_that_cannot_be_rebuilt_end_every_request_with_the_tokens_so_far(start: Start) -> None:
    rebuild = Rebuild(number=4)

    def refuse() -> None:
        raise ValueError("rank 1 has torch 2.1 but rank 0 has torch 2.2; install the same torch on every node")

    rebuild.group.before_rebuild = refuse
    service = start(rebuild.group)
    service.submit("a", [request("1", 400)])
    _, found = read(service, "a", "1")
    assert (found["1"][-1].error_kind, "install the same torch" in str(found["1"][-1].error)) == ("engine", True)
    assert tokens(found["1"]) == expected_tokens(PROMPT, len(tokens(found["1"])))
    assert len(tokens(found["1"])) > 0
    wait_until(rebuild.group.stopped.is_set, "the end of the shards")
    assert not service.health()
    assert service.stats()["requests"]["failed"] == 1, "stats are still given"


def test_an_error_inside_the_driver_during_a_rebuild_does_not_wait_for_it(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    rebuild = Rebuild()
    service = start(rebuild.group)
    service.submit("a", [request("1", 400)])
    assert rebuild.begun.wait(WAIT_S)

    def broken() -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(service._driver, "expire", broken)
    _, found = read(service, "a", "1")
    assert "internal error of the driver: KeyError('a bug')" in str(found["1"][-1].error)
    wait_until(rebuild.group.stopped.is_set, "the end of the shards")
    assert service.stats()["requests"]["failed"] == 1


def test_a_group_that_does_not_come_up_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (ValueError("not enough CPUs"), ShardFailure((0,), "rank 0 failed", "Traceback ...")):

        def before_start(error: Exception = error) -> None:
            raise error

        group = ScriptedGroup()
        group.before_start = before_start
        service = DriverService(EngineConfig.from_dict({"model": "m"}), INFO, None, group)
        with pytest.raises(type(error)):
            service.start()
        assert group.stopped.is_set()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("rebuild")]


# ---- health, stats, shutdown


def test_health_fails_when_no_step_comes_through_and_after_shutdown(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "HEALTH_INTERVAL_S", 0.3)
    gate = Gate()
    service = start(ScriptedGroup(before_step=gate))
    assert service.health()
    service.submit("a", [request("1")])
    assert gate.waiting.wait(WAIT_S)
    wait_until(lambda: not service.health(), "the end of health")
    gate.open()
    wait_until(service.health, "the return of health")
    service.shutdown()
    assert not service.health()


def test_stats_are_given_while_idle_and_while_requests_run(start: Start) -> None:
    service = start(ScriptedGroup(before_step=lambda plan: time.sleep(0.002)))
    assert service.stats()["requests"] == {"running": 0, "waiting": 0, "finished": 0, "aborted": 0, "failed": 0}
    service.submit("a", [request(str(i), 200) for i in range(6)])
    stats = service.stats()
    assert (stats["requests"]["running"], stats["requests"]["waiting"]) in ((0, 6), (4, 2))
    wait_until(lambda: service.stats()["pages"]["used"] >= 4, "the first step")
    stats = service.stats()
    assert (stats["requests"]["running"], stats["requests"]["waiting"]) == (4, 2)
    assert stats["pages"]["used"] <= stats["pages"]["reserved"] == 4 * 13
    assert stats["pages"]["total"] == 63
    for i in range(6):
        service.abort("a", [str(i)])
    read(service, "a", *map(str, range(6)))


def test_one_who_asks_for_stats_without_end_does_not_hold_up_the_requests(start: Start) -> None:
    service = start()
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            service.stats()

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    try:
        service.submit("a", [request("1", 50)])
        assert tokens(read(service, "a", "1")[1]["1"]) == expected_tokens(PROMPT, 50)
    finally:
        done.set()
        for asker in askers:
            asker.join(WAIT_S)


def test_a_shutdown_while_requests_run_ends_the_loop_the_shards_and_the_streams(start: Start) -> None:
    group = ScriptedGroup(before_step=lambda plan: time.sleep(0.005))
    service = start(group)
    service.submit("a", [request("1", 400)])
    wait_until(lambda: service.next_outputs("a", 0, 0.1) not in (None, (0, [])), "the first token")
    service.shutdown()
    service.shutdown()
    assert group.stopped.is_set()
    assert not service._thread.is_alive()
    cursor = 0
    while (received := service.next_outputs("a", cursor, 1.0)) is not None:  # what was committed is still given out
        cursor, updates = received
        assert updates
    for call in (lambda: service.submit("a", [request("2")]), service.stats):
        with pytest.raises(RuntimeError, match="the engine has been shut down"):
            call()


def test_a_client_whose_service_is_shut_down_ends_every_request_it_waits_for() -> None:
    config = EngineConfig.from_dict({"model": "m"})
    service = DriverService(config, INFO, None, ScriptedGroup(before_step=lambda plan: time.sleep(0.005)))
    service.start()
    client = Client(service)
    updates = client.submit([request("1", 400), request("2", 400)])
    updates.get(timeout=WAIT_S)
    client.close()
    client.close()
    ended: list[tuple[str | None, str | None]] = []
    while len(ended) < 2:
        update = updates.get(timeout=WAIT_S)
        if update.finished:
            ended.append((update.error_kind, update.error))
    assert ended == [("engine", "the engine has been shut down")] * 2
    client.abort(["1"])  # nothing is left to end
    with pytest.raises(RuntimeError, match="the engine has been shut down"):
        client.submit([request("3")])


def test_a_client_refuses_a_request_id_that_it_waits_for_and_forgets_what_was_not_submitted() -> None:
    config = EngineConfig.from_dict({"model": "m"})
    gate = Gate()
    service = DriverService(config, INFO, None, ScriptedGroup(before_step=gate))
    service.start()
    client = Client(service)
    client.submit([request("1")])
    with pytest.raises(ValueError, match="request_id='1' is running already; choose another"):
        client.submit([request("2"), request("1")])
    gate.open()
    updates = client.submit([request("2")])
    assert updates.get(timeout=WAIT_S).request_id == "2"
    client.close()
