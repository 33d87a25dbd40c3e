"""Generate text with a configured engine: one prompt to the terminal, or rows of a JSONL file to rows of another.

    python -m launch.generate --config configs/demo.yaml --prompt "Once upon a time"
    python -m launch.generate --config configs/demo.yaml --prompts-file in.jsonl --output out.jsonl

A row in: {"prompt": str or list of token ids} or {"messages": [{"role", "content"}, ...]}, and optionally "id" and
"sampling_params". A row out has the same "id" (else its line's number) and "outputs", or "error": a bad row stops no other.
"""

import argparse
import json
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if not __package__:  # run as a file: let the repository root take the place of launch/ on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tqdm import tqdm

from distributed_sparse.config import EngineConfig, load_run_config
from distributed_sparse.outputs import RequestOutput
from distributed_sparse.reporting.results import plain
from distributed_sparse.sampling_params import SamplingParams
from distributed_sparse.tokenizer import apply_chat
from distributed_sparse.validation import check_keys, shown
from launch.lifetime import FAILED, INTERRUPTED, USAGE, ends_on_sigterm, show_log

if TYPE_CHECKING:
    from distributed_sparse import LLM
    from distributed_sparse.llm import Stream

ROW_KEYS = ("id", "prompt", "messages", "sampling_params")


@dataclass
class Row:
    """One row of the input: a prompt or messages with its sampling parameters, or what went wrong with it."""

    id: Any
    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    params: SamplingParams | None = None
    error: str | None = None
    engine_failed: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the process's exit code: 0 done (rows may hold errors), 1 the prompt or the
    engine failed, 2 bad usage, 130 interrupted.
    """
    args = _parser().parse_args(argv)
    try:
        config, params = load_run_config(args.config, args.set)
        params = params.updated(_sampling_flags(args))
        if args.prompt is not None:
            rows = [make_row({"prompt": args.prompt}, 1, params, args.chat)]
        else:
            with open(args.prompts_file, encoding="utf-8") as lines:
                rows = list(read_rows(lines, params, args.chat))
        output = open(args.output, "w", encoding="utf-8") if args.output else nullcontext(sys.stdout)  # noqa: SIM115
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE

    try:
        show_log()
        with ends_on_sigterm(), output as out:
            return _generate(config, rows, out, streaming=args.prompt is not None and not args.output)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # who read the rows has left; what Python flushes at its exit must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _parser() -> argparse.ArgumentParser:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m launch.generate",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="YAML", help="the run: engine keys and a `sampling` section")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, such as sparse.token_budget=1024"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="one prompt; without --output its text is streamed to the terminal")
    source.add_argument("--prompts-file", metavar="JSONL", help="one row per prompt")
    parser.add_argument("--output", metavar="JSONL", help="where rows go (default: the terminal)")
    parser.add_argument("--chat", action="store_true", help="put text prompts into the model's chat template")
    sampling = parser.add_argument_group("sampling", "override the YAML's `sampling` section; a row's own values win over both")
    for name, kind in (
        ("n", int), ("temperature", float), ("top-p", float), ("top-k", int), ("min-p", float), ("max-tokens", int),
        ("min-tokens", int), ("seed", int), ("logprobs", int),
    ):  # fmt: skip
        sampling.add_argument(f"--{name}", type=kind, metavar=name.replace("-", "_").upper())
    sampling.add_argument("--stop", action="append", metavar="STRING", help="end at this string (may be given again)")
    sampling.add_argument("--ignore-eos", action="store_true", default=None, help="go on past end of sequence")
    return parser


def _sampling_flags(args: argparse.Namespace) -> dict[str, Any]:
    names = [name for name in SamplingParams.__dataclass_fields__ if getattr(args, name, None) is not None]
    return {name: getattr(args, name) for name in names}


def read_rows(lines: Iterable[str], params: SamplingParams, chat: bool) -> Iterator[Row]:
    """The rows of a JSONL file; a line that is no valid row becomes a Row with an error. Empty lines are left out."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            given = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Row(number, error=f"line {number} is not JSON: {error}")
        else:
            yield make_row(given, number, params, chat)


def make_row(given: Any, number: int, params: SamplingParams, chat: bool) -> Row:
    """One parsed row; `number` is its line, the id of a row without one, and `params` are its defaults."""
    if not isinstance(given, dict):
        return Row(number, error=f"line {number}: {shown(given)} is not an object; write {{'prompt': ...}}")
    row = Row(given.get("id", number), prompt=given.get("prompt"), messages=given.get("messages"))
    try:
        check_keys(given, ROW_KEYS, f"line {number}")
        row.params = params.updated(given["sampling_params"]) if "sampling_params" in given else params
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


def _generate(config: EngineConfig, rows: list[Row], out: IO[str], streaming: bool) -> int:
    from distributed_sparse import LLM

    try:
        llm = LLM.from_config(config)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    with llm:
        if streaming:
            return _stream_one(llm, rows[0], out)
        return _write_rows(llm, rows, out, window=8 * config.max_num_seqs)


def _stream_one(llm: "LLM", row: Row, out: IO[str]) -> int:
    """Print the one prompt's text as it comes; several completions (`n`) are printed one after the other at the end."""
    printed, last = 0, None
    try:
        for last in _submit(llm, row):
            if len(last.outputs) == 1:
                text = last.outputs[0].text
                print(text[printed:], end="", file=out, flush=True)
                printed = len(text)
        error = last.error if last is not None else None
    except (ValueError, RuntimeError) as raised:
        error = str(raised)
    if last is not None and len(last.outputs) > 1:
        print("\n\n".join(f"[{completion.index}] {completion.text}" for completion in last.outputs), end="", file=out)
    if last is not None:
        print(file=out, flush=True)
    if error is not None:
        print(f"error: {error}", file=sys.stderr)
    return FAILED if error is not None else 0


def _write_rows(llm: "LLM", rows: list[Row], out: IO[str], window: int) -> int:
    """Generate all rows, at most `window` of them submitted at a time, and write each, in order, as soon as it is finished."""
    failed = 0
    submitted: deque[tuple[Row, Stream | None]] = deque()
    to_come = iter(rows)
    with tqdm(total=len(rows), unit="row", disable=None) as bar:  # None: only on a terminal
        while True:
            for row in islice(to_come, window - len(submitted)):
                submitted.append((row, _submit_or_note(llm, row)))
            if not submitted:
                break
            written = row_out(*_finished(*submitted.popleft()))
            failed += "error" in written
            print(json.dumps(plain(written, digits=None), ensure_ascii=False, allow_nan=False), file=out, flush=True)
            bar.update()
    if failed:
        print(f"{failed} of {len(rows)} rows failed; see their 'error'", file=sys.stderr)
    return FAILED if any(row.engine_failed for row in rows) else 0


def _submit(llm: "LLM", row: Row) -> "Stream":
    """Hand a row to the engine. Raises ValueError when the row, or the engine's view of it, is wrong."""
    if row.error is not None:
        raise ValueError(row.error)
    prompt = row.prompt
    if row.messages is not None:
        if llm.tokenizer is None:
            raise ValueError("messages need a tokenizer, and this model has none; give a prompt of token ids, or tokenizer=")
        prompt = apply_chat(llm.tokenizer, row.messages)
    assert prompt is not None
    return llm.stream(prompt, row.params)


def _submit_or_note(llm: "LLM", row: Row) -> "Stream | None":
    try:
        return _submit(llm, row)
    except (ValueError, RuntimeError) as error:
        row.error, row.engine_failed = str(error), isinstance(error, RuntimeError)
        return None


def _finished(row: Row, stream: "Stream | None") -> tuple[Row, RequestOutput | None]:
    """A row with its output, once there is no more to come."""
    output = None
    try:
        for step in stream or ():
            output = step
    except (ValueError, RuntimeError) as error:
        row.error, row.engine_failed = str(error), isinstance(error, RuntimeError)
    return row, output


def row_out(row: Row, output: RequestOutput | None) -> dict[str, Any]:
    """The row that is written for one that was read: its outputs and times, or its error with what came before it."""
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


if __name__ == "__main__":
    sys.exit(main())
