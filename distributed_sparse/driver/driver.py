"""Driver: owns the requests and their tokens; schedules, sends and commits steps, and returns the updates to publish."""

from __future__ import annotations

import functools
import time
from collections import defaultdict, deque
from collections.abc import Callable

from distributed_sparse.config import EngineConfig
from distributed_sparse.driver.admission import Admission
from distributed_sparse.driver.detokenizer import Detokenizer
from distributed_sparse.driver.engine_metrics import EngineMetrics
from distributed_sparse.driver.pages import PageAllocator
from distributed_sparse.driver.request_errors import NOT_OF_A_REQUEST, bad_logits_error, engine_error
from distributed_sparse.driver.requests import Request
from distributed_sparse.driver.scheduler import Committed, Scheduler
from distributed_sparse.driver.stats import DriverStats
from distributed_sparse.driver.step_times import SentStep, StepClock
from distributed_sparse.driver.updates import apply_token, prompt_logprobs_by_request, sample_update, traces_by_request
from distributed_sparse.protocol.client import ModelInfo, NewRequest, RequestUpdate, SampleUpdate
from distributed_sparse.protocol.step import StepPlan, StepResult
from distributed_sparse.ranks.base import ShardFailure, ShardGroup

PROFILE_FIRST = 8
"""Index of the first step that may be a profile step (decode rows only); then one per `profile_interval` steps."""

MAX_AHEAD_NUMBERS = 8192
"""Largest step plan (in tokens and page ids; 5 bytes each at most) that is sent while another one is in flight. Larger plans
are not sent ahead: a busy rank does not drain its socket, so the send would block the Driver and it could not read results."""

STORED_CHUNK_MULTIPLE = 256
"""`Scheduler.chunk_multiple` with a prefill store, if `max_num_batched_tokens` is at least four times as large."""

Updates = dict[str, list[RequestUpdate]]
"""Updates to publish, by client id."""


class Driver:
    """Engine core without threads: a Scheduler and a ShardGroup. Only one thread at a time may call it.

    `step` sends a step plan, waits for the results of all ranks, commits the tokens to the requests and returns the updates to
    publish. A token is therefore published only after it is part of the history that a rebuild replays. With
    `async_scheduling`, `step` waits for the result of the previous plan: the ranks already have the next plan when they
    finish one.
    """

    def __init__(self, config: EngineConfig, model: ModelInfo, tokenizer_json: str | None, group: ShardGroup) -> None:
        self.config = config
        self.model = model
        self.group = group
        detokenizer = Detokenizer(tokenizer_json) if tokenizer_json is not None else None
        self._admission = Admission(config, model, detokenizer)
        self._requests: dict[str, Request] = {}
        self._admitted = 0
        self._sent: deque[SentStep] = deque()  # in flight, oldest first
        self._held: StepPlan | None = None  # scheduled, but too large to send ahead
        self._max_in_flight = 1
        self._next_step = 0
        self._next_profile = PROFILE_FIRST
        self._received_before: float | None = None
        self.metrics = EngineMetrics()
        self._stats = DriverStats(self.metrics, config.step_timeout_s)
        self.failure: str | None = None

    def resume(self) -> Updates:
        """Start scheduling on shards that have just started or been rebuilt; unfinished requests are replayed.

        Returns:
            Final updates of requests that do not fit into the new caches.
        """
        before = list(self._requests.values())  # in order of arrival, so those that were running come first
        self._stats.begin(self.group.ranks)
        self._max_in_flight = 2 if self.config.async_scheduling and self.group.queues_plans else 1
        self._sent.clear()
        self._held = None
        self._received_before = None
        self.allocator = PageAllocator(self.group.num_pages)
        is_cut_evenly = self.config.prefill_store and self.config.max_num_batched_tokens >= 4 * STORED_CHUNK_MULTIPLE
        self.scheduler = Scheduler(
            self.allocator,
            page_size=self.config.page_size,
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
            evict_window=self.group.evict_window,
            copy_on_fork=self.group.copy_on_fork,
            trace=self.config.trace,
            chunk_multiple=STORED_CHUNK_MULTIPLE if is_cut_evenly else 1,
        )
        updates: Updates = defaultdict(list)
        for request in before:
            request.restart()
            self.scheduler.waiting.append(request)
            try:
                self.scheduler.check_fits(request)
            except ValueError as error:
                updates[request.client_id].append(self._end(request, f"after a recovery, {error}", "engine", "error"))
        return updates

    # ---- requests

    def add_request(self, client_id: str, new: NewRequest, arrived: float | None = None) -> RequestUpdate | None:
        """Queue a request. Returns None, or the update that refuses it.

        Args:
            arrived: arrival time (`time.monotonic`); None: now.
        """
        now = time.monotonic() if arrived is None else arrived
        if self.failure is not None:
            self._stats.requests["failed"] += 1
            return RequestUpdate(new.request_id, finished=True, error=self.failure, error_kind="engine")
        try:
            if new.request_id in self._requests:
                raise ValueError(f"request_id={new.request_id!r} is running already; choose another")
            request = self._admission.new_request(client_id, new, now, self._admitted)
            self.scheduler.add(request)
        except NOT_OF_A_REQUEST:
            raise
        except BaseException as raised:
            self._stats.requests["failed"] += 1
            if isinstance(raised, ValueError):
                return RequestUpdate(new.request_id, finished=True, error=str(raised), error_kind="invalid")
            return RequestUpdate(new.request_id, finished=True, error=engine_error(raised, new.request_id), error_kind="engine")
        self._admitted += 1
        self._requests[request.request_id] = request
        return None

    def abort(self, request_ids: list[str], error: str | None = None) -> list[RequestUpdate]:
        """End requests, running or waiting, and free their pages for the next step plan. Unknown ids are ignored.

        Args:
            error: the reason, if the client did not ask for the abort itself.
        """
        known = [self._requests[request_id] for request_id in request_ids if request_id in self._requests]
        return [self._end(request, error, "engine" if error is not None else None) for request in known]

    def expire(self) -> Updates:
        """End the requests whose `timeout_s` has passed."""
        now = time.monotonic()
        updates: Updates = defaultdict(list)
        for request in [r for r in self._requests.values() if r.deadline is not None and r.deadline < now]:
            error = f"timeout_s={request.params.timeout_s} has passed; raise it, or expect fewer tokens"
            updates[request.client_id].append(self._end(request, error, "timeout"))
        return updates

    def fail_all(self, failure: ShardFailure) -> Updates:
        """End every request with an error, since the shards are gone. All tokens so far have been published."""
        self.failure = f"the engine has stopped: {failure.cause}"
        updates: Updates = defaultdict(list)
        for request in list(self._requests.values()):
            updates[request.client_id].append(self._failed(request, self.failure))
        self._sent.clear()
        self._held = None
        return updates

    def _end(
        self, request: Request, error: str | None = None, error_kind: str | None = None, reason: str = "abort"
    ) -> RequestUpdate:
        for sequence in request.unfinished:
            self.scheduler.finish(sequence, reason)
        sampled = [] if request.score else request.sequences
        update = self._guarded(request, lambda: self._publish(request, [sample_update(sequence, None) for sequence in sampled]))
        if update.error is None:
            update.error, update.error_kind = error, error_kind
        return update

    def _guarded(self, request: Request, work: Callable[[], RequestUpdate]) -> RequestUpdate:
        """Return `work()`. If it raises, only this request ends, with that error."""
        try:
            return work()
        except NOT_OF_A_REQUEST:
            raise
        except BaseException as raised:
            for sequence in request.unfinished:
                self.scheduler.finish(sequence, "error")
            return self._failed(request, engine_error(raised, request.request_id))

    def _failed(self, request: Request, error: str) -> RequestUpdate:
        """The final update of a failed request; it publishes no further tokens."""
        self._requests.pop(request.request_id, None)
        self._stats.requests["failed"] += 1
        self.metrics.count("request_success", label="error")
        request.metrics.finished_time = time.monotonic()
        return RequestUpdate(request.request_id, finished=True, error=error, error_kind="engine", metrics=request.metrics)

    def owned_by(self, client_id: str) -> list[str]:
        """Ids of a client's unfinished requests."""
        return [request.request_id for request in self._requests.values() if request.client_id == client_id]

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._sent) or self._held is not None

    @property
    def replays(self) -> bool:
        """Whether a request is still recomputing tokens from before the last rebuild."""
        return any(request.replays for request in (*self.scheduler.running, *self.scheduler.waiting))

    # ---- steps

    def step(self) -> Updates:
        """Schedule and send the next step plan, then commit the oldest result once enough plans are in flight.

        Returns:
            Updates of the requests in the committed step; empty if the plan that was sent only fills the pipeline.

        Raises:
            ShardFailure: a shard failed; the tokens of plans in flight are lost and will be computed again.
        """
        cpu = time.thread_time()
        was_sent = self._send_next()
        if was_sent and len(self._sent) < self._max_in_flight:
            return {}
        return self._collect_and_commit(cpu)

    @property
    def in_flight(self) -> bool:
        """Whether a step plan has been sent whose result has not been committed."""
        return bool(self._sent)

    def settle(self) -> Updates:
        """Commit the oldest result in flight without sending another plan. Raises as `step`."""
        return self._collect_and_commit(time.thread_time())

    def _send_next(self) -> bool:
        began = time.monotonic()
        held, self._held = self._held, None
        plan = held or self.scheduler.schedule(self._next_step, self.group.generation)
        if self._sent and not plan.parts and not plan.setups:
            return False  # every running sequence needs a result that is still in flight
        if self._sent and plan.num_ids > MAX_AHEAD_NUMBERS:
            self._held = plan
            return False
        if plan.decode and not plan.prefill:
            plan.profile = plan.report = self._is_profile_step(plan)
        if plan.setups:
            for request in self.scheduler.running:
                if request.metrics.first_scheduled_time is None:
                    request.metrics.first_scheduled_time = began
        self._send(plan, began)
        return True

    def _is_profile_step(self, plan: StepPlan) -> bool:
        """Whether a step with decode rows only is a profile step: one is due, or one of its requests has `profile` set."""
        interval = self.config.profile_interval
        if interval is not None and self._next_step >= self._next_profile:
            self._next_profile = self._next_step + interval
            return True
        asking = [request for request in self.scheduler.running if request.profile]
        slots = {sequence.slot for request in asking for sequence in request.unfinished}
        return bool(slots) and any(row.slot in slots for row in plan.decode)

    def _send(self, plan: StepPlan, began: float) -> None:
        plan.step = self._next_step
        self.group.send(plan)
        self._next_step += 1
        sent = time.monotonic()
        self._sent.append(SentStep(plan, sent, sent - began))

    def _collect_and_commit(self, cpu: float) -> Updates:
        """Wait for the results of the oldest plan and commit them. `cpu`: the thread's CPU time when the step began."""
        step = self._sent[0]
        results = self.group.collect(self._stats.times.timeout(step.plan))
        received = time.monotonic()
        self._sent.popleft()
        updates = self._commit(step.plan, results, received)
        clock = StepClock(
            sent=step.sent,
            received=received,
            received_before=self._received_before,
            driver=step.scheduling + time.monotonic() - received,
            cpu=time.thread_time() - cpu,
            same_clock=self._stats.same_clock,
        )
        self._stats.add_step(step.plan, results, clock)
        self._received_before = received if self.has_work else None
        return updates

    def _commit(self, plan: StepPlan, results: list[StepResult], now: float) -> Updates:
        """Append a step's tokens to their sequences, finish those that end, and return every touched request's update."""
        if not plan.parts:
            return {}
        result = results[0]
        step = self.scheduler.in_flight[0]
        updates: Updates = defaultdict(list)
        for bad in sorted(result.bad_logits, key=lambda bad: bad.position):
            sequence = step.sequences[bad.slot]
            if sequence.finish_reason is None:
                error = bad_logits_error(bad, self.group.ranks[0].dtype)
                updates[sequence.request.client_id].append(self._end(sequence.request, error, "engine", "error"))
        traces = traces_by_request(step, results)
        prompt_blocks = prompt_logprobs_by_request(step, result)
        touched: dict[Request, list[Committed]] = {request: [] for request in (*prompt_blocks, *traces)}
        for committed in self.scheduler.commit(plan, result.tokens):
            touched.setdefault(committed.sequence.request, []).append(committed)

        def publish(request: Request) -> RequestUpdate:
            samples = []
            for committed in touched[request]:
                apply_token(committed, now, self.scheduler, self.metrics)
                if committed.token is not None:
                    block = result.logprobs[committed.place] if result.logprobs else None
                    samples.append(sample_update(committed.sequence, block))
            update = self._publish(request, samples)
            update.prompt_logprobs, update.traces = prompt_blocks[request], traces[request]
            return update

        for request in touched:
            updates[request.client_id].append(self._guarded(request, functools.partial(publish, request)))
        return updates

    def _publish(self, request: Request, samples: list[SampleUpdate]) -> RequestUpdate:
        """A request's update; the last one if all of its sequences have finished."""
        update = RequestUpdate(request.request_id, samples=samples)
        if request.finished:
            request.metrics.finished_time = time.monotonic()
            update.finished, update.metrics = True, request.metrics
            self._stats.end_request(request)
            del self._requests[request.request_id]
        return update

    # ---- reports

    def stats(self) -> dict:
        """The engine's counters; see `DriverStats.as_dict`."""
        waiting = sum(request.leader.slot < 0 for request in self._requests.values())  # 0 after a failure
        running = len(self._requests) - waiting
        return self._stats.as_dict(self.group.generation, self.allocator, running, waiting)

    def gauges(self) -> dict[str, float]:
        """Current values of the metrics of kind gauge. May be called from another thread during a step."""
        return {
            "num_requests_running": 0.0 if self.failure else float(len(self.scheduler.running)),
            "num_requests_waiting": 0.0 if self.failure else float(len(self.scheduler.waiting)),
            "kv_cache_usage_perc": 0.0 if self.failure else self.allocator.used / self.allocator.total,
            **self._stats.gauges(),
        }

    def check(self, report: bool = False) -> None:
        """Run an empty step on every rank. Raises ShardFailure if a rank does not answer. No step may be in flight.

        Args:
            report: whether every rank also reports its counters.
        """
        assert not self._sent, "the updates of a step in flight would be lost"
        self._send(StepPlan(step=self._next_step, generation=self.group.generation, report=report), time.monotonic())
        self._collect_and_commit(time.thread_time())
