"""Generate text with a configured engine: one prompt to the terminal, or rows of a JSONL file to rows of another.

    python -m launch.generate --config configs/demo.yaml --prompt "Once upon a time"
    python -m launch.generate --config configs/demo.yaml --prompts-file in.jsonl --output out.jsonl

A row in: {"prompt": str or list of token ids} or {"messages": [{"role", "content"}, ...]}, and optionally "id" and
"sampling_params". A row out has the same "id" (else its line's number) and "outputs", or "error": a bad row stops no other.
"""

import argparse
import json
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if not __package__:  # run as a file: let the repository root take the place of launch/ on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tqdm import tqdm

from distributed_sparse.config import EngineConfig, load_run_config
from distributed_sparse.outputs import RequestOutput
from distributed_sparse.sampling_params import SamplingParams
from distributed_sparse.validation import check_keys, shown

if TYPE_CHECKING:
    from distributed_sparse import LLM

ROW_KEYS = ("id", "prompt", "messages", "sampling_params")
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


@dataclass
class Row:
    """One row of the input: a prompt or messages with its sampling parameters, or what is wrong with it."""

    id: Any
    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    params: SamplingParams | None = None
    error: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the process's exit code: 0 done, 1 the prompt failed, 2 bad usage, 130 interrupted."""
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
        return 2

    previous = signal.signal(signal.SIGTERM, _end_on_sigterm)
    try:
        with output as out:
            return _generate(config, rows, out, streaming=args.prompt is not None and not args.output)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, previous)


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
    source.add_argument("--prompt", help="one prompt; its text is streamed to the terminal")
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
        llm = LLM(**asdict(config))
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with llm:
        if streaming:
            return _stream_one(llm, rows[0], out)
        return _write_rows(llm, rows, out, rows_at_once=4 * config.max_num_seqs)


def _stream_one(llm: "LLM", row: Row, out: IO[str]) -> int:
    """Print the one prompt's text as it comes; several completions (`n`) are printed one after the other at the end."""
    try:
        if row.error is not None:
            raise ValueError(row.error)
        assert row.params is not None
        shown_chars, last = 0, None
        for last in llm.stream(_prompt(llm, row), row.params):
            if row.params.n == 1 and last.outputs:
                text = last.outputs[0].text
                print(text[shown_chars:], end="", file=out, flush=True)
                shown_chars = max(shown_chars, len(text))
        if last is not None and last.error is not None:
            raise ValueError(last.error)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if last is not None and row.params.n > 1:
        print("\n\n".join(f"[{output.index}] {output.text}" for output in last.outputs), end="", file=out)
    print(file=out)
    return 0


def _write_rows(llm: "LLM", rows: list[Row], out: IO[str], rows_at_once: int) -> int:
    """Generate all rows and write them in order, some at a time: what is finished is on disk when the run is interrupted."""
    failed = 0
    with tqdm(total=len(rows), unit="row", disable=None) as bar:  # None: only on a terminal
        for first in range(0, len(rows), rows_at_once):
            batch = rows[first : first + rows_at_once]
            prompts: list[str | list[int]] = []
            ready: list[Row] = []
            for row in batch:
                if row.error is None:
                    try:
                        prompts.append(_prompt(llm, row))
                        ready.append(row)
                    except ValueError as error:
                        row.error = str(error)
            outputs = llm.generate(prompts, [row.params for row in ready], use_tqdm=False) if ready else []
            of_row = {id(row): output for row, output in zip(ready, outputs, strict=True)}
            for row in batch:
                written = row_out(row, of_row.get(id(row)))
                failed += "error" in written
                print(json.dumps(written, ensure_ascii=False), file=out)
            out.flush()
            bar.update(len(batch))
    if failed:
        print(f"{failed} of {len(rows)} rows failed; see their 'error'", file=sys.stderr)
    return 0


def _prompt(llm: "LLM", row: Row) -> str | list[int]:
    """What the engine gets: the prompt itself, or the messages' token ids in the chat template."""
    if row.messages is None:
        assert row.prompt is not None
        return row.prompt
    return llm.chat_token_ids(row.messages)


def row_out(row: Row, output: RequestOutput | None) -> dict[str, Any]:
    """The row that is written for one that was read: its outputs and times, or its error."""
    error = row.error or (output.error if output is not None else None)
    if output is None or error is not None:
        return {"id": row.id, "error": error or "no output"}
    completions = []
    for completion in output.outputs:
        fields = asdict(completion)
        completions.append({name: value for name, value in fields.items() if value is not None or name == "finish_reason"})
    written: dict[str, Any] = {"id": row.id, "num_prompt_tokens": len(output.prompt_token_ids), "outputs": completions}
    if output.prompt_logprobs is not None:
        written["prompt_logprobs"] = asdict(output)["prompt_logprobs"]
    if output.metrics is not None:
        metrics = output.metrics
        written["metrics"] = {"ttft": metrics.ttft, "tpot": metrics.tpot, "latency": metrics.latency}
    return written


def _end_on_sigterm(signum: int, frame: Any) -> None:
    raise SystemExit(TERMINATED)  # unwinds through `with llm`, so that no shard is left behind (`ray job stop`)


if __name__ == "__main__":
    sys.exit(main())
