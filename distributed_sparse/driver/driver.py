"""Driver: owns requests and their token history, sends steps, commits each, and only then publishes it."""

from __future__ import annotations

import functools
import socket
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass

from distributed_sparse.config import EngineConfig
from distributed_sparse.driver.admission import Admission
from distributed_sparse.driver.detokenizer import Detokenizer
from distributed_sparse.driver.engine_metrics import AttendedDensity, EngineMetrics, attention_stats
from distributed_sparse.driver.pages import PageAllocator
from distributed_sparse.driver.request_errors import NOT_OF_A_REQUEST, bad_logits_error, engine_error
from distributed_sparse.driver.requests import Request, Sequence
from distributed_sparse.driver.scheduler import Committed, ScheduledStep, Scheduler
from distributed_sparse.driver.step_times import StepClock, StepTimes
from distributed_sparse.protocol.client import ModelInfo, NewRequest, RequestUpdate, SampleUpdate, TraceUpdate
from distributed_sparse.protocol.step import LogprobBlock, ShardReport, StepPlan, StepResult
from distributed_sparse.ranks.base import RankInfo, ShardFailure, ShardGroup

PROFILE_FIRST = 8
"""The first step of decode rows alone from this one on takes the times of its parts; then one in `profile_interval`."""

MAX_AHEAD_NUMBERS = 8192
"""A plan of more numbers (tokens, pages; 5 bytes each at most) waits until its ranks have done with the last one: a rank that
computes reads nothing, and to send what its socket cannot hold would wait for it, deaf to results."""

STORED_CHUNK_MULTIPLE = 256
"""`Scheduler.chunk_multiple` with a prefill store, where a step holds at least four times as many tokens."""

Updates = dict[str, list[RequestUpdate]]
"""Client id -> what to tell it."""


@dataclass(frozen=True)
class SentStep:
    """A plan that every rank has been sent."""

    plan: StepPlan
    sent: float
    scheduling: float
    """Seconds that it took to make and to send."""


class Driver:
    """A plain class around Scheduler and ShardGroup; one thread at a time may call it.

    `step` sends a plan, waits for every rank's result, commits the tokens to the history and returns the updates to publish,
    so a token is never published before it is part of the history that a rebuild would replay. With `async_scheduling` the
    result that it waits for is that of the plan before: the ranks have the next plan before they have done with the last one.
    """

    def __init__(self, config: EngineConfig, model: ModelInfo, tokenizer_json: str | None, group: ShardGroup) -> None:
        self.config = config
        self.model = model
        self.group = group
        detokenizer = Detokenizer(tokenizer_json) if tokenizer_json is not None else None
        self._admission = Admission(config, model, detokenizer)
        self._requests: dict[str, Request] = {}
        self._counts: Counter[str] = Counter(finished=0, aborted=0, failed=0)
        self._admitted = 0
        self._sent: deque[SentStep] = deque()  # and not collected, the oldest first
        self._held: StepPlan | None = None  # too large to be sent ahead
        self._max_in_flight = 1
        self._next_step = 0
        self._steps = 0
        self._prefill_tokens = Counter(computed=0, from_store=0)
        self._reports: list[ShardReport | None] = []
        self._ranks: list[RankInfo] = []
        self._times = StepTimes(config.step_timeout_s)
        self._next_profile = PROFILE_FIRST
        self._received_before: float | None = None
        self._same_clock = False
        self._density = AttendedDensity()
        self.metrics = EngineMetrics()
        self.failure: str | None = None

    def resume(self) -> Updates:
        """The shards have come up, for the first time or as another generation: size the cache; what ran before replays.

        Returns:
            The ends of requests for which the caches that there are now are too small.
        """
        before = list(self._requests.values())  # by arrival: those that ran come first
        self._ranks = self.group.ranks
        self._max_in_flight = 2 if self.config.async_scheduling and self.group.queues_plans else 1
        self._reports = [None] * len(self._ranks)
        self._sent.clear()
        self._held = None
        self._received_before = None
        self._density.begin()
        self._same_clock = {rank.hostname for rank in self._ranks} == {socket.gethostname()}
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
        for request in before:
            request.restart()
            self.scheduler.waiting.append(request)
        updates: Updates = defaultdict(list)
        for request in before:
            try:
                self.scheduler.check_fits(request)
            except ValueError as error:
                updates[request.client_id].append(self._end(request, f"after a recovery, {error}", "engine", "error"))
        return updates

    # ---- requests

    def add_request(self, client_id: str, new: NewRequest, arrived: float | None = None) -> RequestUpdate | None:
        """Queue a request; an update that refuses it, alone, if it is wrong.

        Args:
            arrived: when it came (`time.monotonic`); None: now.
        """
        now = time.monotonic() if arrived is None else arrived
        if self.failure is not None:
            self._counts["failed"] += 1
            return RequestUpdate(new.request_id, finished=True, error=self.failure, error_kind="engine")
        try:
            if new.request_id in self._requests:
                raise ValueError(f"request_id={new.request_id!r} is running already; choose another")
            request = self._admission.new_request(client_id, new, now, self._admitted)
            self.scheduler.add(request)
        except NOT_OF_A_REQUEST:
            raise
        except BaseException as raised:
            self._counts["failed"] += 1
            if isinstance(raised, ValueError):
                return RequestUpdate(new.request_id, finished=True, error=str(raised), error_kind="invalid")
            return RequestUpdate(new.request_id, finished=True, error=engine_error(raised, new.request_id), error_kind="engine")
        self._admitted += 1
        self._requests[request.request_id] = request
        return None

    def abort(self, request_ids: list[str], error: str | None = None) -> list[RequestUpdate]:
        """End requests wherever they are; unknown ids are ignored. Their pages are free for the next plan.

        Args:
            error: why, where it was not their client that asked for it.
        """
        known = [self._requests[request_id] for request_id in request_ids if request_id in self._requests]
        return [self._end(request, error, "engine" if error is not None else None) for request in known]

    def _end(
        self, request: Request, error: str | None = None, error_kind: str | None = None, reason: str = "abort"
    ) -> RequestUpdate:
        for sequence in request.unfinished:
            self.scheduler.finish(sequence, reason)
        update = self._guarded(request, lambda: self._publish(request, request.sequences, {}, []))
        if update.error is None:
            update.error, update.error_kind = error, error_kind
        return update

    def _guarded(self, request: Request, work: Callable[[], RequestUpdate]) -> RequestUpdate:
        """What `work` on one request returns. Where it raises, the request ends with that error, and other requests go on."""
        try:
            return work()
        except NOT_OF_A_REQUEST:
            raise
        except BaseException as raised:
            for sequence in request.unfinished:
                self.scheduler.finish(sequence, "error")
            return self._failed(request, engine_error(raised, request.request_id))

    def _failed(self, request: Request, error: str) -> RequestUpdate:
        """The last update of a request that ends with what has been published of it so far."""
        self._requests.pop(request.request_id, None)
        self._counts["failed"] += 1
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
        """Whether a request has not come again to where it was before the last rebuild."""
        return any(request.replays for request in (*self.scheduler.running, *self.scheduler.waiting))

    # ---- steps

    def expire(self) -> Updates:
        """End the requests whose `timeout_s` has passed."""
        now = time.monotonic()
        updates: Updates = defaultdict(list)
        for request in [r for r in self._requests.values() if r.deadline is not None and r.deadline < now]:
            error = f"timeout_s={request.params.timeout_s} has passed; raise it, or expect fewer tokens"
            updates[request.client_id].append(self._end(request, error, "timeout"))
        return updates

    def step(self) -> Updates:
        """Send the next plan, if there is one to make, and take in the oldest result once enough plans are under way.

        Returns:
            What the step that was taken in adds to every request that it touched; nothing after the first of plans in flight.

        Raises:
            ShardFailure: a shard failed; what plans in flight sampled is not part of the history.
        """
        cpu = time.thread_time()
        was_sent = self._send_next()
        if was_sent and len(self._sent) < self._max_in_flight:
            return {}
        return self._take_result(cpu)

    @property
    def in_flight(self) -> bool:
        """Whether a plan has been sent whose result has not been taken in."""
        return bool(self._sent)

    def settle(self) -> Updates:
        """Take in the oldest result of those in flight, and send nothing. Raises as `step`."""
        return self._take_result(time.thread_time())

    def _send_next(self) -> bool:
        began = time.monotonic()
        held, self._held = self._held, None
        plan = held or self.scheduler.schedule(self._next_step, self.group.generation)
        if self._sent and not plan.parts and not plan.setups:
            return False  # all that runs waits for the results of plans in flight
        if self._sent and plan.num_ids > MAX_AHEAD_NUMBERS:
            self._held = plan
            return False
        if plan.decode and not plan.prefill:
            plan.profile = plan.report = self._takes_times(plan)
        self._mark_scheduled(plan, began)
        self._send(plan, began)
        return True

    def _takes_times(self, plan: StepPlan) -> bool:
        """Whether a step of decode rows alone is a profile step: its turn has come, or one of its requests asks for it."""
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

    def _take_result(self, cpu: float) -> Updates:
        """Wait for the oldest plan's results, and commit them. `cpu`: the thread's processor time when this step began."""
        step, before = self._sent[0], self._received_before
        plan = step.plan
        results = self.group.collect(self._times.timeout(plan))
        received = time.monotonic()
        self._sent.popleft()
        self._steps += bool(plan.parts)
        from_store = results[0].prefill_from_store
        self._prefill_tokens.update(computed=plan.num_prefill_tokens - from_store, from_store=from_store)
        for result in results:
            if result.report is not None:
                self._reports[result.rank] = result.report
        if plan.report:
            self._density.add(self._reports)
        updates = self._commit(plan, results, received)
        clock = StepClock(
            sent=step.sent,
            received=received,
            received_before=before,
            driver=step.scheduling + time.monotonic() - received,
            cpu=time.thread_time() - cpu,
            same_clock=self._same_clock,
        )
        self._times.add(plan, results, clock)
        self._received_before = received if self.has_work else None
        if plan.parts:
            self.metrics.observe("step_time_seconds", clock.step)
            self.metrics.observe("iteration_tokens_total", sum(part.num_tokens for part in plan.parts))
        return updates

    def _mark_scheduled(self, plan: StepPlan, now: float) -> None:
        if not plan.setups:
            return
        for request in self.scheduler.running:
            if request.metrics.first_scheduled_time is None:
                request.metrics.first_scheduled_time = now

    def _commit(self, plan: StepPlan, results: list[StepResult], now: float) -> Updates:
        """Take a step's tokens into the history; then say what they mean for each request."""
        if not plan.parts:
            return {}
        result = results[0]
        step = self.scheduler.in_flight[0]
        updates: Updates = defaultdict(list)
        for bad in sorted(result.bad_logits, key=lambda bad: bad.position):
            sequence = step.sequences[bad.slot]
            if sequence.finish_reason is None:
                error = bad_logits_error(bad, self._ranks[0].dtype)
                updates[sequence.request.client_id].append(self._end(sequence.request, error, "engine", "error"))
        traces = self._traces(step, results)
        prompt_blocks = self._prompt_blocks(step, result)
        touched: dict[Request, list[Committed]] = {request: [] for request in (*prompt_blocks, *traces)}
        for committed in self.scheduler.commit(plan, result.tokens):
            touched.setdefault(committed.sequence.request, []).append(committed)

        def publish(request: Request) -> RequestUpdate:
            blocks: dict[Sequence, LogprobBlock] = {}
            for committed in touched[request]:
                own_block = result.logprobs[committed.place] if result.logprobs else None
                if own_block is not None:
                    blocks[committed.sequence] = own_block
                self._take(committed, now)
            sequences = [committed.sequence for committed in touched[request]]
            update = self._publish(request, sequences, blocks, prompt_blocks[request])
            update.traces = traces[request]
            return update

        for request in touched:
            updates[request.client_id].append(self._guarded(request, functools.partial(publish, request)))
        return updates

    @staticmethod
    def _traces(step: ScheduledStep, results: list[StepResult]) -> dict[Request, list[TraceUpdate]]:
        """What ranks saw of traced rows, of sequences that have not ended since the step was scheduled."""
        traces: dict[Request, list[TraceUpdate]] = defaultdict(list)
        for blocks_of_row in zip(*(result.traces for result in results), strict=True):
            sequence = step.sequences[blocks_of_row[0].slot]
            if sequence.finish_reason is None:
                traces[sequence.request].append(TraceUpdate(sequence.index, list(blocks_of_row)))
        return traces

    @staticmethod
    def _prompt_blocks(step: ScheduledStep, result: StepResult) -> dict[Request, list[LogprobBlock]]:
        """Log-probabilities of prompts, of requests that have not ended since the step was scheduled."""
        blocks: dict[Request, list[LogprobBlock]] = defaultdict(list)
        for block in result.prompt_logprobs:
            sequence = step.sequences[block.slot]
            if sequence.finish_reason is None:
                blocks[sequence.request].append(block)
        return blocks

    def _take(self, committed: Committed, now: float) -> None:
        """Text, stop conditions and times of one new token; or the end of a prompt that is only scored."""
        sequence, token = committed.sequence, committed.token
        if token is None:
            self.scheduler.finish(sequence, "length")
            return
        request = sequence.request
        params, metrics, count = request.params, request.metrics, len(sequence.output_token_ids)
        self.metrics.count("generation_tokens")
        if sequence.last_token_time is not None:
            self.metrics.observe("inter_token_latency_seconds", now - sequence.last_token_time)
        sequence.last_token_time = now
        if metrics.first_token_time is None:
            metrics.first_token_time = now
            self.metrics.observe("time_to_first_token_seconds", metrics.ttft)
            self.metrics.count("prompt_tokens", metrics.num_prompt_tokens)
        metrics.num_output_tokens = max(metrics.num_output_tokens, count)
        stops_here = token in request.stop_token_ids and count > params.min_tokens
        text, stop_reason = sequence.text, None
        if text is not None and (not stops_here or params.include_stop_str_in_output or text.may_stop_at(token)):
            stop_reason = text.append(token)
        if stops_here or stop_reason is not None:
            self.scheduler.finish(sequence, "stop", token if stops_here and token in params.stop_token_ids else stop_reason)
        elif count == request.max_tokens:
            self.scheduler.finish(sequence, "length")

    # ---- publishing

    def _publish(
        self,
        request: Request,
        sequences: list[Sequence],
        blocks: dict[Sequence, LogprobBlock],
        prompt_blocks: list[LogprobBlock],
    ) -> RequestUpdate:
        """The update that says what this commit added to a request."""
        update = RequestUpdate(request.request_id, prompt_logprobs=prompt_blocks)
        if not request.score:
            update.samples = [self._sample_update(sequence, blocks.get(sequence)) for sequence in sequences]
        if request.finished:
            request.metrics.finished_time = time.monotonic()
            update.finished, update.metrics = True, request.metrics
            reasons = {sequence.finish_reason for sequence in request.sequences}
            outcome = "failed" if "error" in reasons else "aborted" if "abort" in reasons else "finished"
            self._record_end(request, aborted=outcome != "finished")
            self._counts[outcome] += 1
            del self._requests[request.request_id]
        return update

    def _record_end(self, request: Request, aborted: bool) -> None:
        """A request's times and lengths, if it came to its own end."""
        for sequence in request.sequences:
            self.metrics.count("request_success", label=sequence.finish_reason or "")
        if aborted or request.score:
            return
        for sequence in request.sequences:
            self.metrics.observe("request_generation_tokens", len(sequence.output_token_ids))
        self.metrics.request_ended(request.metrics)

    @staticmethod
    def _sample_update(sequence: Sequence, block: LogprobBlock | None) -> SampleUpdate:
        new_tokens = sequence.output_token_ids[sequence.published_tokens :]
        sequence.published_tokens = len(sequence.output_token_ids)
        if sequence.text is not None and sequence.finish_reason is not None:
            stop_string = sequence.text.finish()
            if stop_string is not None:
                sequence.finish_reason, sequence.stop_reason = "stop", stop_string
        return SampleUpdate(
            index=sequence.index,
            token_ids=new_tokens,
            text=sequence.text.take_delta() if sequence.text is not None else "",
            logprobs=[block] if block is not None else [],
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
        )

    def fail_all(self, failure: ShardFailure) -> Updates:
        """The shards are gone: end every request with the reason. The tokens so far have been published."""
        self.failure = f"the engine has stopped: {failure.cause}"
        updates: Updates = defaultdict(list)
        for request in list(self._requests.values()):
            updates[request.client_id].append(self._failed(request, self.failure))
        self._sent.clear()
        self._held = None
        return updates

    # ---- reports

    def stats(self) -> dict:
        """The engine's counters (keys in docs/architecture.md); the shards' own as of the last `report`."""
        reports = [report for report in self._reports if report is not None]
        waiting = sum(request.leader.slot < 0 for request in self._requests.values())  # none is left after a failure
        running = len(self._requests) - waiting
        return {
            "steps": self._steps,
            "generation": self.group.generation,
            "requests": {"running": running, "waiting": waiting, **self._counts},
            "pages": {"total": self.allocator.total, "used": self.allocator.used, "reserved": self.allocator.reserved},
            "prefill_tokens": dict(self._prefill_tokens),
            "ranks": [rank.as_dict() for rank in self._ranks],
            "attention": attention_stats(reports),
            "all_reduce": {
                "calls": reports[0].all_reduce_calls if reports else 0,
                "bytes": reports[0].all_reduce_bytes if reports else 0,
            },
            "time_ms": self._times.medians_ms() | (reports[0].time_ms if reports else {}),
        }

    def gauges(self) -> dict[str, float]:
        """What `EngineMetrics` does not record, as it is now. May be called beside a step."""
        reports = [report for report in self._reports if report is not None]
        all_reduce_ms = reports[0].time_ms.get("all_reduce") if reports else None
        found = {
            "num_requests_running": 0 if self.failure else len(self.scheduler.running),
            "num_requests_waiting": 0 if self.failure else len(self.scheduler.waiting),
            "kv_cache_usage_perc": 0 if self.failure else self.allocator.used / self.allocator.total,
            "attended_density": self._density.lately,
            "all_reduce_time_seconds": all_reduce_ms / 1e3 if all_reduce_ms is not None else None,
        }
        return {name: float(value) for name, value in found.items() if value is not None}

    def check(self) -> None:
        """One empty step through every rank; raises ShardFailure if one does not answer. No other may be in flight."""
        self._run_empty(report=False)

    def report(self) -> None:
        """The same, in which every rank tells what it has counted since its generation began."""
        self._run_empty(report=True)

    def _run_empty(self, report: bool) -> None:
        assert not self._sent, "its results would be taken in here, and published nowhere"
        self._send(StepPlan(step=self._next_step, generation=self.group.generation, report=report), time.monotonic())
        self._take_result(time.thread_time())
