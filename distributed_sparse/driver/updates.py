"""updates: turns a committed step into what its requests publish: stop conditions, text, log-probabilities, traces."""

from __future__ import annotations

from collections import defaultdict

from distributed_sparse.driver.engine_metrics import EngineMetrics
from distributed_sparse.driver.requests import Request, Sequence
from distributed_sparse.driver.scheduler import Committed, ScheduledStep, Scheduler
from distributed_sparse.protocol.client import SampleUpdate, TraceUpdate
from distributed_sparse.protocol.step import LogprobBlock, StepResult


def apply_token(committed: Committed, now: float, scheduler: Scheduler, metrics: EngineMetrics) -> None:
    """Add one new token to its sequence's text and times, and finish the sequence if the token ends it.

    A request that only scores its prompt has no new token: its sequence is finished.
    """
    sequence, token = committed.sequence, committed.token
    if token is None:
        scheduler.finish(sequence, "length")
        return
    request = sequence.request
    params, times, count = request.params, request.metrics, len(sequence.output_token_ids)
    metrics.count("generation_tokens")
    if sequence.last_token_time is not None:
        metrics.observe("inter_token_latency_seconds", now - sequence.last_token_time)
    sequence.last_token_time = now
    if times.first_token_time is None:
        times.first_token_time = now
        metrics.observe("time_to_first_token_seconds", times.ttft)
        metrics.count("prompt_tokens", times.num_prompt_tokens)
    times.num_output_tokens = max(times.num_output_tokens, count)
    stops_here = token in request.stop_token_ids and count > params.min_tokens
    text, stop_reason = sequence.text, None
    if text is not None and (not stops_here or params.include_stop_str_in_output or text.may_stop_at(token)):
        stop_reason = text.append(token)
    if stops_here or stop_reason is not None:
        scheduler.finish(sequence, "stop", token if stops_here and token in params.stop_token_ids else stop_reason)
    elif count == request.max_tokens:
        scheduler.finish(sequence, "length")


def sample_update(sequence: Sequence, block: LogprobBlock | None) -> SampleUpdate:
    """The tokens and text of a sequence that have not been published yet; marks them as published."""
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


def traces_by_request(step: ScheduledStep, results: list[StepResult]) -> dict[Request, list[TraceUpdate]]:
    """Traces of decode rows from all ranks, without those of sequences that finished after the step was scheduled."""
    traces: dict[Request, list[TraceUpdate]] = defaultdict(list)
    for blocks_of_row in zip(*(result.traces for result in results), strict=True):
        sequence = step.sequences[blocks_of_row[0].slot]
        if sequence.finish_reason is None:
            traces[sequence.request].append(TraceUpdate(sequence.index, list(blocks_of_row)))
    return traces


def prompt_logprobs_by_request(step: ScheduledStep, result: StepResult) -> dict[Request, list[LogprobBlock]]:
    """Log-probabilities of prompt tokens, without those of sequences that finished after the step was scheduled."""
    blocks: dict[Request, list[LogprobBlock]] = defaultdict(list)
    for block in result.prompt_logprobs:
        sequence = step.sequences[block.slot]
        if sequence.finish_reason is None:
            blocks[sequence.request].append(block)
    return blocks
