"""The command line: what goes in, what comes out, and that nothing is lost when a row is bad or the run is stopped."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

import distributed_sparse
from distributed_sparse import CompletionOutput, EngineConfig, Logprob, RequestOutput, SamplingParams
from distributed_sparse.commands.generate import main
from distributed_sparse.commands.rows import Row, json_line, make_row, read_rows, row_out
from distributed_sparse.metrics import RequestMetrics
from tests.support.patience import WAIT_S
from tests.support.text_checkpoint import byte_level_bos_tokenizer, text_checkpoint

ROOT = Path(__file__).resolve().parents[2]
PARAMS = SamplingParams(max_tokens=4)


class EchoLLM:
    """Stands in for the engine: answers a prompt with its own characters, one per token."""

    config: EngineConfig
    tokenizer: Any = None
    instances: ClassVar[list["EchoLLM"]] = []

    def __init__(self) -> None:
        self.submitted: list[tuple[Any, SamplingParams]] = []
        self.in_flight = self.most_in_flight = 0
        self.shut_down = False

    @classmethod
    def from_config(cls, config: EngineConfig) -> "EchoLLM":
        llm = cls()
        llm.config = config
        cls.instances.append(llm)
        return llm

    def __enter__(self) -> "EchoLLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.shut_down = True

    def stream(self, prompt: Any, params: SamplingParams) -> Iterator[RequestOutput]:
        if prompt == "refuse":
            raise ValueError("prompt='refuse' is refused")
        self.submitted.append((prompt, params))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        return self._answer(prompt, params)

    def _answer(self, prompt: Any, params: SamplingParams) -> Iterator[RequestOutput]:
        text = "".join(map(str, prompt))
        for length in range(1, min(len(text), params.max_tokens or 99) + 1):
            if text[:length] == "fail":
                raise RuntimeError("the engine has stopped")
            if text[:length] == "ctrl-c":
                raise KeyboardInterrupt
            if text[:length] == "term":
                os.kill(os.getpid(), signal.SIGTERM)
            outputs = [CompletionOutput(index, text[:length], list(range(length)), "length") for index in range(params.n)]
            yield RequestOutput("0", None, [1, 2], outputs=outputs)
        self.in_flight -= 1


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> type[EchoLLM]:
    monkeypatch.setattr(distributed_sparse, "LLM", EchoLLM, raising=False)
    monkeypatch.setattr(EchoLLM, "instances", [])
    return EchoLLM


def config_file(folder: Path, **keys: Any) -> str:
    path = folder / "run.yaml"
    path.write_text(json.dumps({"model": "m", "sampling": {"max_tokens": 9, "temperature": 0}, **keys}), encoding="utf-8")
    return str(path)


def rows_file(folder: Path, *rows: Any) -> str:
    path = folder / "in.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_jsonl(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# ---- rows


def test_a_row_takes_the_defaults_and_its_own_sampling_parameters_win() -> None:
    row = make_row({"prompt": "x", "sampling_params": {"temperature": 0}, "id": "a"}, 3, PARAMS, chat=False)
    assert row == Row("a", prompt="x", params=SamplingParams(max_tokens=4, temperature=0))
    assert make_row({"prompt": [1, 2]}, 3, PARAMS, chat=False) == Row(3, prompt=[1, 2], params=PARAMS)


def test_with_chat_a_text_prompt_becomes_the_users_message() -> None:
    messages = [{"role": "user", "content": "x"}]
    assert make_row({"prompt": "x"}, 1, PARAMS, chat=True).messages == messages
    assert make_row({"messages": messages}, 1, PARAMS, chat=False).messages == messages


@pytest.mark.parametrize(
    ("given", "chat", "error"),
    [
        ([1], False, "is not an object"),
        ({}, False, "give either 'prompt' or 'messages'"),
        ({"prompt": "x", "messages": []}, False, "give either 'prompt' or 'messages'"),
        ({"prompt": 3}, False, "prompt=3 must be a str or a list of token ids"),
        ({"prompt": [1]}, True, "--chat needs text or messages, not token ids"),
        ({"promt": "x"}, False, "unknown key 'promt'; did you mean 'prompt'?"),
        ({"prompt": "x", "sampling_params": {"best_of": 2}}, False, "best_of is not supported"),
        ({"prompt": "x", "sampling_params": 3}, False, "sampling parameters 3 must be a mapping"),
        ({"prompt": "x", "sampling_params": {"top_p": 7}}, False, "top_p=7 must be"),
    ],
)
def test_a_wrong_row_is_a_row_with_an_error(given: Any, chat: bool, error: str) -> None:
    found = make_row(given, 7, PARAMS, chat).error
    assert found is not None and error in found


def test_lines_that_are_no_json_keep_their_number_and_empty_lines_are_left_out() -> None:
    rows = list(read_rows(io.StringIO('\n{"prompt": "x"}\n{"prompt":\n\n"y"\n'), PARAMS, chat=False))
    assert [row.id for row in rows] == [2, 3, 5]
    assert rows[0].error is None
    assert rows[1].error is not None and rows[1].error.startswith("line 3 is not JSON")


def test_a_row_out_is_json_with_logprobs_and_times() -> None:
    completion = CompletionOutput(0, "hi", [7], "stop", None, [{7: Logprob(-0.5, 1, "hi")}], -0.5)
    metrics = RequestMetrics(1.0, 1.1, 1.5, 2.5, num_prompt_tokens=2, num_output_tokens=3)
    output = RequestOutput("0", None, [1, 2], [None, {2: Logprob(-1.0, 2, None)}], [completion], True, metrics)
    written = json.loads(json.dumps(row_out(Row("a"), output)))
    assert written == {
        "id": "a",
        "num_prompt_tokens": 2,
        "outputs": [
            {
                "index": 0,
                "text": "hi",
                "token_ids": [7],
                "finish_reason": "stop",
                "logprobs": [{"7": {"logprob": -0.5, "rank": 1, "decoded_token": "hi"}}],
                "cumulative_logprob": -0.5,
            }
        ],
        "prompt_logprobs": [None, {"2": {"logprob": -1.0, "rank": 2, "decoded_token": None}}],
        "metrics": {"ttft": 0.5, "tpot": 0.5, "latency": 1.5},
    }


NAN_ROW = {"id": float("inf"), "outputs": [{"text": "é", "logprobs": [{"7": {"logprob": -float("inf")}}]}], "x": float("nan")}


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (NAN_ROW, '{"id": null, "outputs": [{"text": "é", "logprobs": [{"7": {"logprob": null}}]}], "x": null}'),
        ({"id": "\ud800", "text": "你"}, '{"id": "\\ud800", "text": "\\u4f60"}'),
        ({"id": 10**400}, f'{{"id": {10**400}}}'),
    ],
)
def test_every_line_is_strict_json_in_utf_8(row: dict[str, Any], line: str) -> None:
    assert json_line(row).decode("utf-8") == line + "\n"


# ---- the command line, with an engine that only echoes


def test_rows_come_back_in_order_and_bad_ones_stop_no_other(
    tmp_path: Path, echo: type[EchoLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_file(tmp_path, {"prompt": "abc"}, "{", {"prompt": "refuse"}, {"prompt": [4, 5], "id": "z"})
    assert main(["--config", config_file(tmp_path), "--prompts-file", rows, "--max-tokens", "2"]) == 1
    captured = capsys.readouterr()
    written = read_jsonl(captured.out)
    assert [row["id"] for row in written] == [1, 2, 3, "z"]
    assert [row["outputs"][0]["text"] if "outputs" in row else None for row in written] == ["ab", None, None, "45"]
    assert [row.get("error", "")[:18] for row in written] == ["", "line 2 is not JSON", "prompt='refuse' is", ""]
    assert "2 of 4 rows failed" in captured.err
    assert "row/s" not in captured.err, "a progress bar belongs on a terminal only"
    assert echo.instances[0].shut_down


def test_an_engine_that_fails_ends_in_failure_and_what_came_before_is_kept(tmp_path: Path, echo: type[EchoLLM]) -> None:
    rows = rows_file(tmp_path, {"prompt": "abc"}, {"prompt": "failed"})
    output = tmp_path / "out.jsonl"
    assert main(["--config", config_file(tmp_path), "--prompts-file", rows, "--output", str(output)]) == 1
    whole, cut = read_jsonl(output.read_text())
    assert whole["outputs"][0]["text"] == "abc" and "error" not in whole
    assert cut["outputs"][0]["text"] == "fai" and cut["error"] == "the engine has stopped"


def test_flags_override_the_yaml_and_set_overrides_any_key(tmp_path: Path, echo: type[EchoLLM]) -> None:
    arguments = ["--config", config_file(tmp_path), "--prompts-file", rows_file(tmp_path, {"prompt": "a"})]
    arguments += ["--output", str(tmp_path / "out"), "--set", "sparse.method=quest", "--set", "sampling.seed=5"]
    arguments += ["--set", "sampling.top_k=3", "--top-k", "8", "--stop", "x", "--stop", "y", "--ignore-eos"]
    assert main(arguments) == 0
    (llm,) = echo.instances
    expected = SamplingParams(max_tokens=9, temperature=0, seed=5, top_k=8, stop=["x", "y"], ignore_eos=True)
    assert llm.submitted == [("a", expected)]
    assert llm.config == EngineConfig(model="m", sparse={"method": "quest"})


def test_every_row_is_submitted_ahead_but_only_so_many_at_a_time(tmp_path: Path, echo: type[EchoLLM]) -> None:
    rows = rows_file(tmp_path, *({"prompt": "ab"} for _ in range(50)))
    output = tmp_path / "out.jsonl"
    arguments = ["--config", config_file(tmp_path), "--set", "max_num_seqs=2", "--prompts-file", rows, "--output", str(output)]
    assert main(arguments) == 0
    assert len(read_jsonl(output.read_text())) == 50
    assert echo.instances[0].most_in_flight == 16


def test_messages_go_through_the_chat_template(
    tmp_path: Path, echo: type[EchoLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", config_file(tmp_path), "--chat", "--prompt", "the fox"]
    assert main(arguments) == 1
    assert "messages need a tokenizer" in capsys.readouterr().err
    tokenizer = byte_level_bos_tokenizer()
    monkeypatch.setattr(echo, "tokenizer", tokenizer)
    assert main(arguments) == 0
    ((prompt, _),) = echo.instances[-1].submitted
    assert tokenizer.decode(prompt) == "<s>[user]the fox\n[assistant]"


def test_one_prompt_is_printed_as_text_and_several_samples_with_their_index(
    tmp_path: Path, echo: type[EchoLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", config_file(tmp_path), "--prompt", "hello"]) == 0
    assert capsys.readouterr().out == "hello\n"
    assert main(["--config", config_file(tmp_path), "--prompt", "hello", "--n", "2", "--max-tokens", "2"]) == 0
    assert capsys.readouterr().out == "[0] he\n\n[1] he\n"


def test_one_prompt_that_fails_says_why_and_fails(
    tmp_path: Path, echo: type[EchoLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", config_file(tmp_path), "--prompt", "refuse"]) == 1
    assert capsys.readouterr() == ("", "error: prompt='refuse' is refused\n")
    assert main(["--config", config_file(tmp_path), "--prompt", "failed"]) == 1
    assert capsys.readouterr() == ("fai\n", "error: the engine has stopped\n")


def test_ctrl_c_shuts_the_engine_down_and_keeps_the_finished_rows(tmp_path: Path, echo: type[EchoLLM]) -> None:
    rows = rows_file(tmp_path, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "ctrl-c"}, {"prompt": "d"})
    output = tmp_path / "out.jsonl"
    assert main(["--config", config_file(tmp_path), "--prompts-file", rows, "--output", str(output)]) == 130
    assert [row["outputs"][0]["text"] for row in read_jsonl(output.read_text())] == ["a", "b"]
    assert echo.instances[0].shut_down


def test_sigterm_shuts_the_engine_down_too(tmp_path: Path, echo: type[EchoLLM]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main(["--config", config_file(tmp_path), "--prompt", "terminate"])
    assert ended.value.code == 143
    assert echo.instances[0].shut_down
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "absent.yaml", "--prompt", "x"], "absent.yaml: cannot be read"),
        (["--set", "page_sise=32", "--prompt", "x"], "unknown key 'page_sise'; did you mean 'page_size'?"),
        (["--temperature", "-1", "--prompt", "x"], "temperature=-1.0 must be"),
        (["--prompts-file", "absent.jsonl"], "absent.jsonl"),
        (["--prompt", "x", "--output", "absent/out.jsonl"], "absent/out.jsonl"),
    ],
)
def test_a_wrong_call_is_refused_before_an_engine_is_made(
    tmp_path: Path, echo: type[EchoLLM], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["--config", config_file(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not echo.instances


# ---- rows that are wrong in any way, and outputs that fail


def strict(line: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(line, parse_constant=refuse)


WRONG_LINES: list[tuple[bytes, Any, str]] = [
    (b'{"id": NaN, "prompt": "a"}', 2, "line 2: id=nan cannot be written back as JSON"),
    (b'{"id": [1, -Infinity], "prompt": "a"}', 2, "line 2: id=[1, -inf] cannot"),
    (b'{"id": 1e999, "prompt": "a"}', 2, "line 2: id=inf cannot"),
    (b'{"id": ' + b"9" * 5000 + b', "prompt": "a"}', 2, "line 2 is not JSON"),
    (b"[" * 100_000, 2, "line 2 is not JSON"),
    (b'{"id": "x", "prompt": "\xff"}', 2, "line 2 is not UTF-8"),
    (b'{"prompt": "a"} {"prompt": "b"}', 2, "line 2 is not JSON"),
    (b'{"prompt": "a"', 2, "line 2 is not JSON"),
    (b"\x00", 2, "line 2 is not JSON"),
    (b'"prompt"', 2, "is not an object"),
    (b"null", 2, "None is not an object"),
    (b"{}", 2, "give either 'prompt' or 'messages'"),
    (b'{"id": "x", "prompt": {"a": 1}}', "x", "prompt={'a': 1} must be a str"),
    (b'{"id": "x", "prompt": true}', "x", "prompt=True must be"),
    (b'{"id": "x", "messages": 3}', "x", "messages"),
    (b'{"id": "x", "messages": [3]}', "x", "messages[0]=3"),
    (b'{"id": "x", "prompt": "a", "sampling_params": []}', "x", "must be a mapping"),
    (b'{"id": "x", "prompt": "a", "sampling_params": {"temperature": NaN}}', "x", "temperature=nan"),
    (b'{"id": "x", "prompt": "a", "sampling_params": {"seed": ' + b"9" * 400 + b"}}", "x", "seed=9"),
    (b'{"id": "x", "prompt": "a", "sampling_params": {"repetition_penalty": 1.2}}', "x", "repetition_penalty=1.2"),
    (b'{"id": "x", "prompt": "a", "max_tokens": 3}', "x", "unknown key 'max_tokens'"),
]


@pytest.mark.parametrize(("line", "row_id", "message"), WRONG_LINES, ids=[message for _, _, message in WRONG_LINES])
def test_a_wrong_line_becomes_a_row_with_an_error_and_the_others_are_generated(
    tmp_path: Path, echo: type[EchoLLM], monkeypatch: pytest.MonkeyPatch, line: bytes, row_id: Any, message: str
) -> None:
    monkeypatch.setattr(echo, "tokenizer", byte_level_bos_tokenizer())
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b'{"prompt": "abc"}\n' + line + b'\n{"prompt": "def"}\n')
    assert main(["--config", config_file(tmp_path), "--prompts-file", str(source), "--output", str(output)]) == 1
    first, wrong, last = (strict(written) for written in output.read_text(encoding="utf-8").splitlines())
    assert (first["outputs"][0]["text"], last["outputs"][0]["text"]) == ("abc", "def")
    assert wrong["id"] == row_id and message in wrong["error"] and "outputs" not in wrong


def test_a_byte_order_mark_crlf_blank_lines_and_ids_of_any_kind_are_taken(tmp_path: Path, echo: type[EchoLLM]) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    ids = ["a", "a", None, 1.5, {"k": [1]}, "\ud83d", True, "\u2028"]
    lines = [json.dumps({"id": row_id, "prompt": "x", "sampling_params": None}) for row_id in ids]
    source.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode() + b"\r\n \r\n\xef\xbb\xbf" + lines[0].encode())
    assert main(["--config", config_file(tmp_path), "--prompts-file", str(source), "--output", str(output)]) == 0
    assert [strict(line)["id"] for line in output.read_text(encoding="utf-8").split("\n")[:-1]] == [*ids, "a"]


def test_any_exception_of_one_row_is_that_rows_error(tmp_path: Path, echo: type[EchoLLM]) -> None:
    class Brittle(EchoLLM):
        def stream(self, prompt: Any, params: SamplingParams) -> Iterator[RequestOutput]:
            if prompt == "odd":
                raise KeyError("odd")
            return super().stream(prompt, params)

    distributed_sparse.LLM = Brittle  # type: ignore[misc,assignment] # the fixture puts it back
    output = tmp_path / "out.jsonl"
    rows = rows_file(tmp_path, {"prompt": "abc"}, {"prompt": "odd"}, {"prompt": "def"})
    assert main(["--config", config_file(tmp_path), "--prompts-file", rows, "--output", str(output)]) == 1
    assert [row.get("error") for row in read_jsonl(output.read_text())] == [None, "KeyError: 'odd'", None]


def test_the_file_of_the_prompts_is_not_overwritten(
    tmp_path: Path, echo: type[EchoLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_file(tmp_path, {"prompt": "abc"})
    assert main(["--config", config_file(tmp_path), "--prompts-file", rows, "--output", rows]) == 2
    assert "is also --prompts-file" in capsys.readouterr().err
    assert read_jsonl(Path(rows).read_text()) == [{"prompt": "abc"}]


def test_an_output_that_takes_no_more_ends_the_run_with_whole_lines(
    tmp_path: Path, echo: type[EchoLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    rows = rows_file(tmp_path, *({"prompt": "abcdef"} for _ in range(50)))
    arguments = ["--config", config_file(tmp_path), "--prompts-file", rows, "--output", str(output)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        assert main(arguments) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    text = output.read_text()
    written = [strict(line) for line in text.splitlines()]
    assert text.endswith("}\n") and 1 <= len(written) < 50
    assert capsys.readouterr().err == (
        f"error: the output cannot be written: File too large; {len(written)} of 50 rows are written\n"
    )
    assert echo.instances[0].shut_down


@pytest.mark.parametrize("what", ["file", "stdout", "pipe"])
def test_a_full_device_and_a_reader_that_has_left_are_named(
    tmp_path: Path, echo: type[EchoLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    arguments = ["--config", config_file(tmp_path), "--prompts-file", rows_file(tmp_path, {"prompt": "abc"})]
    if what == "file":
        arguments += ["--output", "/dev/full"]
    elif what == "stdout":
        monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))  # noqa: SIM115
    else:
        read, write = os.pipe()
        os.close(read)
        monkeypatch.setattr(sys, "stdout", open(write, "w"))  # noqa: SIM115
    assert main(arguments) == 1
    why = "Broken pipe" if what == "pipe" else "No space left on device"
    assert capsys.readouterr().err == f"error: the output cannot be written: {why}; 0 of 1 rows are written\n"


def test_rows_are_not_lost_where_stdout_is_closed_and_not_mixed_with_messages_where_stderr_is(
    tmp_path: Path, echo: type[EchoLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", config_file(tmp_path), "--prompts-file", rows_file(tmp_path, {"prompt": "abc"}, "{")]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        assert main(arguments) == 2
    assert capsys.readouterr().err == "error: standard output is closed; give --output\n"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        assert main(arguments) == 1
    assert [strict(line)["id"] for line in capsys.readouterr().out.splitlines()] == [1, 2]


# ---- the command line, for real


def run(*arguments: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S, **kwargs)


@pytest.mark.parametrize("how", [["-m", "launch.generate"], ["launch/generate.py"]])
def test_both_ways_to_start_it_work_where_the_package_is_not_installed(how: list[str]) -> None:
    # -S leaves out the editable install, as on a cluster that only has the dependencies and the uploaded folder.
    done = run("-S", *how, "--help", env={"PYTHONPATH": sysconfig.get_path("purelib"), "PATH": os.environ["PATH"]})
    assert done.returncode == 0, done.stderr
    assert "usage: python -m launch.generate" in done.stdout


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    text_checkpoint(folder / "checkpoint")
    return config_file(
        folder,
        model=str(folder / "checkpoint"),
        dtype="float32",
        device="cpu",
        max_model_len=256,
        max_num_seqs=2,
        kv_cache_memory_bytes=4_000_000,
        sparse={"method": "quest", "token_budget": 64, "dense_layers": 1},
        sampling={"temperature": 0, "max_tokens": 12, "ignore_eos": True},
    )


def test_a_prompt_gives_the_same_tokens_as_text_in_a_file_and_as_token_ids(tiny_run: str, tmp_path: Path) -> None:
    token_ids = byte_level_bos_tokenizer()("the quick")["input_ids"]
    rows = rows_file(
        tmp_path,
        {"prompt": "the quick"},
        {"prompt": token_ids},
        {"prompt": [331]},
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    )
    output = tmp_path / "out.jsonl"
    done = run("-m", "launch.generate", "--config", tiny_run, "--prompts-file", rows, "--output", str(output))
    assert done.returncode == 1, done.stderr
    text, tokens, wrong, chat, chat_of_parts, image = read_jsonl(output.read_text())
    assert text["outputs"] == tokens["outputs"]
    assert len(text["outputs"][0]["token_ids"]) == 12 == len(chat["outputs"][0]["token_ids"])
    assert chat_of_parts["outputs"] == chat["outputs"]
    assert "outside the vocabulary of 331 tokens" in wrong["error"]
    assert "content part" in image["error"] and "of type 'image_url' is not supported" in image["error"]

    done = run("launch/generate.py", "--config", tiny_run, "--prompt", "the quick", encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout == text["outputs"][0]["text"] + "\n"


def test_wrong_rows_among_others_of_a_real_engine(tiny_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"id": "good", "prompt": "the quick", "sampling_params": {"logprobs": 2, "prompt_logprobs": 1}}
    rows: list[Any] = [
        good,
        {"id": "\ud800", "prompt": "the fox"},
        {"id": 2, "prompt": "\udfff"},
        {"id": 3, "prompt": [5] * 3_500_000},
        {"id": 4, "messages": [{"role": "user", "content": "\ud800"}]},
        {"id": 5, "prompt": "the", "sampling_params": {"stop": "\ud800"}},
        {"id": 6, "prompt": [10**400]},
        good,
    ]
    assert main(["--config", tiny_run, "--prompts-file", rows_file(tmp_path, *rows)]) == 1
    captured = capsys.readouterr()
    written = [strict(line) for line in captured.out.splitlines()]
    assert [row["id"] for row in written] == ["good", "\ud800", 2, 3, 4, 5, 6, "good"]
    assert [len(row["outputs"][0]["token_ids"]) for row in written if "error" not in row][:2] == [12, 12]
    assert all("error" in row for row in (written[2], written[3], written[4], written[6]))
    assert written[0]["outputs"][0]["token_ids"] == written[-1]["outputs"][0]["token_ids"]
    assert captured.err.splitlines()[-1].startswith("error: ")


@pytest.mark.slow
def test_a_reader_that_leaves_ends_a_real_run_with_one_line(tiny_run: str) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "launch.generate", "--config", tiny_run, "--prompt", "the quick"]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write)
    assert done.returncode == 1, done.stderr
    assert done.stderr.endswith("error: the output cannot be written: Broken pipe; the text is not complete\n")


def test_ctrl_c_ends_a_real_run_cleanly(tiny_run: str, tmp_path: Path) -> None:
    rows = rows_file(tmp_path, *({"prompt": "the quick"} for _ in range(500)))
    output = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "launch.generate", "--config", tiny_run, "--prompts-file", rows, "--output", str(output)]
    process = subprocess.Popen([*command, "--max-tokens", "50"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + WAIT_S
        while not (output.exists() and output.read_text()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors and "interrupted" in errors
    written = read_jsonl(output.read_text())
    assert 1 <= len(written) < 500
    assert all(len(row["outputs"][0]["token_ids"]) == 50 for row in written)
