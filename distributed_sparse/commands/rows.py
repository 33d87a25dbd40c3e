"""rows: read and write the JSONL of `generate`. A bad row becomes a Row with an error; each written line is valid JSON."""

from __future__ import annotations

import contextlib
import json
import os
import select
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from io import RawIOBase
from typing import Any

from distributed_sparse.outputs import RequestOutput
from distributed_sparse.sampling_params import SamplingParams
from distributed_sparse.tools.common.results import plain
from distributed_sparse.utils.validation import check_keys, shown

ROW_KEYS = ("id", "prompt", "messages", "sampling_params")


@dataclass
class Row:
    """One row of the input: a prompt or messages with its sampling parameters, or an error."""

    id: Any
    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    params: SamplingParams | None = None
    error: str | None = None


def read_file(path: str, params: SamplingParams, chat: bool) -> list[Row]:
    """Read the rows of a UTF-8 JSONL file, with or without a byte order mark. Raises OSError if it cannot be read."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as lines:  # invalid UTF-8 becomes surrogates
        return list(read_rows(lines, params, chat))


def read_rows(lines: Iterable[str], params: SamplingParams, chat: bool) -> Iterator[Row]:
    """Parse JSONL lines; an invalid line becomes a Row with an error. Empty lines are skipped."""
    for number, line in enumerate(lines, start=1):
        line = line.strip().lstrip("\ufeff")
        if not line:
            continue
        try:
            line.encode()
            given = json.loads(line)
        except UnicodeEncodeError:
            yield Row(number, error=f"line {number} is not UTF-8; save the file as UTF-8")
        except (ValueError, RecursionError) as error:
            yield Row(number, error=f"line {number} is not JSON: {error}")
        else:
            yield make_row(given, number, params, chat)


def make_row(given: Any, number: int, params: SamplingParams, chat: bool) -> Row:
    """Check a parsed row. `number` is its line and its default id; `params` are its default sampling parameters."""
    if not isinstance(given, dict):
        return Row(number, error=f"line {number}: {shown(given)} is not an object; write {{'prompt': ...}}")
    row = Row(given.get("id", number), prompt=given.get("prompt"), messages=given.get("messages"))
    try:
        _check_id(row.id)
    except ValueError as error:
        return Row(number, error=f"line {number}: {error}")
    try:
        check_keys(given, ROW_KEYS, f"line {number}")
        own = given.get("sampling_params")
        row.params = params.updated(own) if own is not None else params
        if (row.prompt is None) == (row.messages is None):
            raise ValueError("give either 'prompt' or 'messages'")
        if row.prompt is not None and not isinstance(row.prompt, (str, list)):
            raise ValueError(f"prompt={shown(row.prompt)} must be a str or a list of token ids")
        if chat and row.prompt is not None:
            if not isinstance(row.prompt, str):
                raise ValueError("--chat needs text or messages, not token ids; leave --chat out")
            row.messages = [{"role": "user", "content": row.prompt}]
    except ValueError as error:
        row.error = str(error)
    return row


def _check_id(row_id: Any) -> None:
    """Reject an id that cannot be written back: NaN, an infinity (also as 1e999), or a list nested too deeply."""
    try:
        json.dumps(row_id, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"id={shown(row_id)} cannot be written back as JSON; give a string or an integer") from error


def row_out(row: Row, output: RequestOutput | None) -> dict[str, Any]:
    """Return the output row of an input row: its outputs and times, or its error and the outputs before the error."""
    written: dict[str, Any] = {"id": row.id}
    error = row.error or (output.error if output is not None else None)
    if error is not None:
        written["error"] = error
    if output is None:
        return written
    written["num_prompt_tokens"] = len(output.prompt_token_ids)
    written["outputs"] = [
        {name: value for name, value in asdict(completion).items() if value is not None} for completion in output.outputs
    ]
    if output.prompt_logprobs is not None:
        written["prompt_logprobs"] = [
            None if position is None else {token: asdict(logprob) for token, logprob in position.items()}
            for position in output.prompt_logprobs
        ]
    if output.metrics is not None:
        metrics = output.metrics
        written["metrics"] = {"ttft": metrics.ttft, "tpot": metrics.tpot, "latency": metrics.latency}
    return written


def json_line(row: dict[str, Any]) -> bytes:
    """Encode a row as one line of UTF-8 JSON. NaN and infinities become null; lone surrogates are escaped."""
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):  # a trace's arrays, NaN or infinities
        row = plain(row, digits=None)
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(row).encode() + b"\n"


def write_line(file: RawIOBase, line: bytes) -> None:
    """Write a whole line. If that fails (a full disk, Ctrl-C), truncate a file to remove the partial line.

    Args:
        file: must be unbuffered, so that `close` has nothing left to write.

    Raises:
        OSError: the line is not written.
    """
    written = 0
    try:
        while written < len(line):
            count = file.write(line[written:])
            if count is None:  # a full non-blocking pipe
                select.select([], [file], [])
            written += count or 0
    except BaseException:
        with contextlib.suppress(OSError):  # pipes and devices cannot be truncated
            if written and file.tell() == os.fstat(file.fileno()).st_size:
                os.ftruncate(file.fileno(), file.tell() - written)
        raise
