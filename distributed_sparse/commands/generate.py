"""Generate text with a configured engine: from one prompt to the terminal, or from a JSONL file of prompts to another.

    python -m launch.generate --config configs/demo.yaml --prompt "Once upon a time"
    python -m launch.generate --config configs/demo.yaml --prompts-file in.jsonl --output out.jsonl

Input row: {"prompt": str or list of token ids} or {"messages": [{"role", "content"}, ...]}, and optionally "id" and
"sampling_params". Output row: the same "id" (default: the line number) and "outputs", or "error". A bad row does not stop the
others, but the exit code is 1.
"""

import argparse
import contextlib
import os
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from io import RawIOBase
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

from distributed_sparse.client.tokenizer import apply_chat
from distributed_sparse.commands.lifetime import FAILED, INTERRUPTED, USAGE, ends_on_sigterm, show_log
from distributed_sparse.commands.parser import command_parser
from distributed_sparse.commands.rows import Row, json_line, make_row, read_file, row_out, write_line
from distributed_sparse.config import EngineConfig, load_run_config
from distributed_sparse.outputs import RequestOutput
from distributed_sparse.sampling_params import SamplingParams
from distributed_sparse.utils.progress import Progress

if TYPE_CHECKING:
    from distributed_sparse import LLM
    from distributed_sparse.client.stream import Stream


def main(argv: Sequence[str] | None = None, prog: str = "python -m launch.generate") -> int:
    """Run the command line and return the exit code.

    0: done; 1: the prompt or some rows failed or could not be written; 2: bad usage; 130: interrupted.
    """
    args = _parser(prog).parse_args(argv)
    if sys.stderr is None:  # closed (2>&-): print(file=None) would write to stdout, between the rows
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        config, params = load_run_config(args.config, args.set)
        params = params.updated(_sampling_flags(args))
        if args.prompt is not None:
            rows = [make_row({"prompt": args.prompt}, 1, params, args.chat)]
        else:
            rows = read_file(args.prompts_file, params, args.chat)
        output = _open_output(args.output, args.prompts_file)
    except (ValueError, OSError) as error:
        _complain(str(error))
        return USAGE

    try:
        show_log()
        with ends_on_sigterm(), output as out:
            return _generate(config, rows, out, streaming=args.prompt is not None and not args.output)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except OutputFailed as error:
        _complain(str(error))
        return FAILED


class OutputFailed(Exception):
    """Writing to the file or stdout failed, for example on a full disk or a closed pipe."""

    def __init__(self, error: OSError, what_is_there: str) -> None:
        super().__init__(f"the output cannot be written: {error.strerror or error}; {what_is_there}")


def _open_output(path: str | None, source: str | None) -> AbstractContextManager[RawIOBase]:
    """Open the output unbuffered: a truncated file, or stdout."""
    if path is None:
        if sys.stdout is None:
            raise ValueError("standard output is closed; give --output")
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr] # for text that the terminal cannot encode
        buffer = sys.stdout.buffer
        return nullcontext(cast(RawIOBase, getattr(buffer, "raw", buffer)))
    if source is not None and os.path.exists(path) and os.path.samefile(path, source):
        raise ValueError(f"--output {path} is also --prompts-file and would be overwritten; choose another path")
    return open(path, "wb", buffering=0)


def _complain(message: str) -> None:
    with contextlib.suppress(OSError):  # stderr may be full too
        print(f"error: {message}", file=sys.stderr)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = command_parser(__doc__, "generate", prog)
    parser.add_argument("--config", required=True, metavar="YAML", help="run config: engine keys and a `sampling` section")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, such as sparse.token_budget=1024"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="one prompt; without --output its text is streamed to the terminal")
    source.add_argument("--prompts-file", metavar="JSONL", help="one row per prompt")
    parser.add_argument("--output", metavar="JSONL", help="file for the output rows (default: stdout)")
    parser.add_argument("--chat", action="store_true", help="apply the model's chat template to text prompts")
    sampling = parser.add_argument_group("sampling", "override the YAML's `sampling` section; a row's own values override both")
    for name, kind in (
        ("n", int), ("temperature", float), ("top-p", float), ("top-k", int), ("min-p", float), ("max-tokens", int),
        ("min-tokens", int), ("seed", int), ("logprobs", int),
    ):  # fmt: skip
        sampling.add_argument(f"--{name}", type=kind, metavar=name.replace("-", "_").upper())
    sampling.add_argument("--stop", action="append", metavar="STRING", help="stop at this string (repeatable)")
    sampling.add_argument("--ignore-eos", action="store_true", default=None, help="continue past the end-of-sequence token")
    return parser


def _sampling_flags(args: argparse.Namespace) -> dict[str, Any]:
    names = [name for name in SamplingParams.__dataclass_fields__ if getattr(args, name, None) is not None]
    return {name: getattr(args, name) for name in names}


def _generate(config: EngineConfig, rows: list[Row], out: RawIOBase, streaming: bool) -> int:
    from distributed_sparse import LLM

    try:
        llm = LLM.from_config(config)
    except (ValueError, RuntimeError, OSError) as error:
        _complain(str(error))
        return USAGE
    with llm:
        if streaming:
            return _stream_one(llm, rows[0])
        return _write_rows(llm, rows, out, window=8 * config.max_num_seqs)


def _stream_one(llm: "LLM", row: Row) -> int:
    """Stream one prompt's text to the terminal; several completions (n > 1) are printed at the end instead."""
    printed, last, error = 0, None, None
    try:
        for last in _submit(llm, row):
            if len(last.outputs) == 1:
                text = last.outputs[0].text
                _show(text[printed:])
                printed = len(text)
        error = last.error if last is not None else None
    except OutputFailed:
        raise
    except Exception as raised:
        error = _reason(raised)
    if last is not None:
        several = last.outputs if len(last.outputs) > 1 else []
        _show("\n\n".join(f"[{completion.index}] {completion.text}" for completion in several) + "\n")
    if error is not None:
        _complain(error)
    return FAILED if error is not None else 0


def _show(text: str) -> None:
    try:
        print(text, end="", flush=True)
    except OSError as error:
        with contextlib.suppress(OSError):  # so that the flush at interpreter exit does not fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputFailed(error, "the text is not complete") from error


def _write_rows(llm: "LLM", rows: list[Row], out: RawIOBase, window: int) -> int:
    """Generate all rows, at most `window` submitted at a time, and write them in order as they finish."""
    written = failed = 0
    submitted: deque[tuple[Row, Stream | None]] = deque()
    to_come = iter(rows)
    with Progress(total=len(rows), unit="row") as bar:
        while True:
            for row in islice(to_come, window - len(submitted)):
                submitted.append((row, _submit_or_note(llm, row)))
            if not submitted:
                break
            finished = row_out(*_finished(*submitted.popleft()))
            try:
                write_line(out, json_line(finished))
            except OSError as error:
                raise OutputFailed(error, f"{written} of {len(rows)} rows are written") from error
            written += 1
            failed += "error" in finished
            bar.update()
    if failed:
        _complain(f"{failed} of {len(rows)} rows failed; see their 'error'")
    return FAILED if failed else 0


def _reason(error: Exception) -> str:
    """Return the message of an error, with its type unless it is a ValueError or RuntimeError."""
    return str(error) if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: {error}"


def _submit(llm: "LLM", row: Row) -> "Stream":
    """Submit a row to the engine. Raises ValueError if the row is bad or the engine rejects it."""
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
    except Exception as error:  # a bad row must not stop the others
        row.error = _reason(error)
        return None


def _finished(row: Row, stream: "Stream | None") -> tuple[Row, RequestOutput | None]:
    """Wait until a row is finished and return it with its final output."""
    output = None
    try:
        for step in stream or ():
            output = step
    except Exception as error:
        row.error = _reason(error)
    return row, output
