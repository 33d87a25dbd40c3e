"""output_builder: build a request's RequestOutput from the Driver's updates."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from distributed_sparse.client.client import EngineError
from distributed_sparse.client.prompts import parse_prompt
from distributed_sparse.outputs import CompletionOutput, Logprob, RequestOutput
from distributed_sparse.protocol.client import RequestUpdate
from distributed_sparse.protocol.step import LogprobBlock
from distributed_sparse.sampling_params import SamplingParams
from distributed_sparse.trace import parse_trace

logger = logging.getLogger(__name__)

DecodeToken = Callable[[int], str]


class OutputBuilder:
    """Build one RequestOutput. `decode_token` returns a token's text for its Logprob; it is None without a tokenizer."""

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        decode_token: DecodeToken | None,
    ) -> None:
        self._decode_token = decode_token
        wants_logprobs = params.logprobs is not None
        self.output = RequestOutput(
            request_id=request_id,
            prompt=prompt,
            prompt_token_ids=prompt_token_ids,
            prompt_logprobs=[None] if params.prompt_logprobs is not None else None,
            outputs=[
                CompletionOutput(
                    index,
                    logprobs=[] if wants_logprobs else None,
                    cumulative_logprob=0.0 if wants_logprobs else None,
                )
                for index in range(params.n)
            ],
        )
        self.error_kind: str | None = None
        self._failure: str | None = None

    def add(self, update: RequestUpdate) -> None:
        """Add one update. If that raises (a tokenizer may), the final output has that error."""
        if self._failure is None:
            try:
                self._add(update)
                return
            except Exception as raised:
                logger.exception("the output of request %r cannot be built", update.request_id)
                self._failure = f"the output cannot be built: {type(raised).__name__}: {raised}"
        if update.finished:
            self._finish(RequestUpdate(update.request_id, error=self._failure, error_kind="engine", metrics=update.metrics))

    def _add(self, update: RequestUpdate) -> None:
        output = self.output
        for block in update.prompt_logprobs:
            assert output.prompt_logprobs is not None
            output.prompt_logprobs += parse_block(block, output.prompt_token_ids[block.position :], self._decode_token)
        for trace in update.traces:
            traced = output.outputs[trace.index]
            if traced.trace is None:
                traced.trace = []
            traced.trace.append(parse_trace(trace.ranks))
        for sample in update.samples:
            completion = output.outputs[sample.index]
            completion.token_ids += sample.token_ids
            completion.text += sample.text
            for block, token in zip(sample.logprobs, sample.token_ids[-len(sample.logprobs) :] if sample.logprobs else []):
                (row,) = parse_block(block, [token], self._decode_token)
                assert completion.logprobs is not None and completion.cumulative_logprob is not None
                completion.logprobs.append(row)
                completion.cumulative_logprob += row[token].logprob
            completion.finish_reason, completion.stop_reason = sample.finish_reason, sample.stop_reason
        if update.finished:
            self._finish(update)

    def _finish(self, update: RequestUpdate) -> None:
        output = self.output
        output.finished, output.metrics, output.error = True, update.metrics, update.error
        self.error_kind = update.error_kind
        if update.error_kind == "invalid":
            output.outputs = output.outputs[:1]
        for completion in output.outputs:
            if completion.finish_reason is None:
                completion.finish_reason = "error" if update.error else "abort"

    def raise_error(self) -> None:
        """Raise the request's error, if any; a timeout stays in `output.error` only."""
        if self.output.error is not None and self.error_kind != "timeout":
            raise (ValueError if self.error_kind == "invalid" else EngineError)(self.output.error)

    def snapshot(self) -> RequestOutput:
        """Return a copy of the output that later updates do not change."""
        shown = copy.copy(self.output)
        shown.prompt_logprobs = copy.copy(shown.prompt_logprobs)
        shown.outputs = [copy.copy(completion) for completion in self.output.outputs]
        for completion in shown.outputs:
            completion.token_ids = list(completion.token_ids)
            completion.logprobs = list(completion.logprobs) if completion.logprobs is not None else None
            completion.trace = list(completion.trace) if completion.trace is not None else None
        return shown


def refused_output(request_id: str, prompt: Any, error: str) -> OutputBuilder:
    """Return the finished output of a request that was rejected before submission."""
    try:
        text, token_ids = parse_prompt(prompt)
    except ValueError:
        text, token_ids = None, None
    builder = OutputBuilder(request_id, text, token_ids or [], SamplingParams(), None)
    builder.add(RequestUpdate(request_id, finished=True, error=error, error_kind="invalid"))
    logger.warning("request %s is rejected: %s", request_id, error)
    return builder


def block_arrays(block: LogprobBlock) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    """Decode a block's arrays.

    Returns:
        token ids int32 [rows, width] (None: the whole vocabulary in order), logprobs float32 [rows, width], ranks int32 [rows].
    """
    shape = (block.rows, block.width)
    ids = np.frombuffer(block.token_ids, dtype=np.int32).reshape(shape) if block.token_ids else None
    logprobs = np.frombuffer(block.logprobs, dtype=np.float32).reshape(shape)
    return ids, logprobs, np.frombuffer(block.ranks, dtype=np.int32)


def parse_block(block: LogprobBlock, tokens: list[int], decode_token: DecodeToken | None) -> list[dict[int, Logprob]]:
    """Return one dict per row: token id -> Logprob, the sampled or target token first, then the most likely ones in order.

    Args:
        tokens: the sampled or target token of each row.
    """
    ids, logprobs, ranks = block_arrays(block)
    rows: list[dict[int, Logprob]] = []
    for i in range(block.rows):
        row: dict[int, Logprob] = {}
        if ids is None:
            order = np.argsort(-logprobs[i], kind="stable")
            row[tokens[i]] = _logprob(tokens[i], logprobs[i][tokens[i]], int(ranks[i]), decode_token)
            for rank, token in enumerate(order.tolist(), 1):
                row.setdefault(token, _logprob(token, logprobs[i][token], rank, decode_token))
        else:
            for place, (token, value) in enumerate(zip(ids[i].tolist(), logprobs[i])):
                row.setdefault(token, _logprob(token, value, place or int(ranks[i]), decode_token))
        rows.append(row)
    return rows


def _logprob(token: int, value: np.floating, rank: int, decode_token: DecodeToken | None) -> Logprob:
    return Logprob(float(value), rank, decode_token(token) if decode_token is not None else None)
