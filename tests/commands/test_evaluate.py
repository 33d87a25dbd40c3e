"""python -m launch.evaluate: from a command to results, a report and plots; what is wrong is said before any work is done."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from distributed_sparse import LLM
from distributed_sparse.commands.evaluate import main
from distributed_sparse.tools.evaluation.recall_model import save_recall_checkpoint
from distributed_sparse.tools.evaluation.suites import SUITES
from tests.support.checkpoints import tiny_checkpoint
from tests.support.patience import WAIT_S
from tests.support.text_checkpoint import text_checkpoint

ROOT = Path(__file__).resolve().parents[2]
PNG = b"\x89PNG\r\n"
RECALL = [
    *("--lengths", "400", "--facts", "24", "--questions", "4", "--majority-questions", "1", "--mentions", "12"),
    *("--trace-examples", "1", "--trace-steps", "2"),
]


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """YAML files of a recall checkpoint, one that reads text, and one without a tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save_recall_checkpoint(folder / "recall")
    text_checkpoint(folder / "text")
    tiny_checkpoint(folder / "bare")
    found = {}
    for name in ("recall", "text", "bare"):
        run = {"model": str(folder / name), "device": "cpu", "max_model_len": 480, "max_num_seqs": 4}
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(run | {"kv_cache_memory_bytes": 32 << 20}))
        found[name] = str(path)
    return found


def records_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_recall_from_the_command_to_the_report(
    configs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["recall", "--config", configs["recall"], "--output", str(tmp_path), *RECALL]
    command += ["--methods", "quest,twilight", "--budgets", "64", "--tasks", "one-hop,majority"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    report = (tmp_path / "report.md").read_text()
    assert report in printed
    for group in ("one-hop", "majority"):
        assert f"## {group}, 400 tokens" in report
        for plot in ("score", "density", "mass", "tokens"):
            assert (tmp_path / f"{plot}-{group}-400-tokens.png").read_bytes().startswith(PNG)
    for row in (
        "| dense | 1 | 4 | 1.000 [0.473, 1.000] | - | 1.000 | 1.000 | 0.0000 |",
        "| quest 64 | 1 | 4 | 1.000 [0.473, 1.000] |",
        "| = window 64 |",
        "| = random 64 |",
        "| = oracle_topk 64 |",
    ):
        assert row in report
    assert report.count("- twilight: gain over quest at equal density: ") == 2
    assert "smallest budget with a score of 0.95" in report
    records = records_of(tmp_path)

    def no_engine(config: Any) -> Any:
        raise AssertionError("nothing was left to do")

    monkeypatch.setattr(LLM, "from_config", no_engine)
    assert main(command) == 0
    assert records_of(tmp_path) == records
    assert main([*command, "--seed", "1"]) == 2
    assert "holds results of recall.seed=0, and this run has recall.seed=1" in capsys.readouterr().err


def test_agreement_on_texts(configs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("fox", "dog"):
        (tmp_path / f"{name}.txt").write_text(f"the quick brown {name} jumps over the lazy dog, and 你好 🙂 again. " * 30)
    command = ["agreement", "--config", configs["text"], "--text", str(tmp_path / "fox.txt"), str(tmp_path / "dog.txt")]
    command += ["--lengths", "100,200", "--decoded", "6", "--batch", "1", "--trace-examples", "0", "--methods", "quest"]
    command += ["--output", str(tmp_path / "out"), "--set", "page_size=32", "--budgets"]
    assert main([*command, "32"]) == 2
    assert "sparse.token_budget=32 is below the 3 forced pages of 32 tokens" in capsys.readouterr().err
    assert main([*command, "96"]) == 0
    printed = capsys.readouterr()
    report = (tmp_path / "out" / "report.md").read_text()
    for length in (100, 200):
        assert (
            f"## {length} tokens" in report
            and "| run | examples | tokens | perplexity | against dense | bytes / dense |" in report
        )
        assert (tmp_path / "out" / f"agreement-{length}-tokens.png").read_bytes().startswith(PNG)
    assert "perplexity by task, 2 examples and 12 tokens in all\n\n| task | fox | dog |" in report
    # without a terminal each unit is a line; dense, quest and three controls, each with two texts of two lengths
    lines = [line for line in printed.err.splitlines() if " units, " in line]
    assert [line.rpartition(" units")[0].split()[-1] for line in lines] == [f"{i}/{8 if i <= 8 else 20}" for i in range(1, 21)]
    assert lines[4].startswith("quest 96: 5/8 units") and "100 tokens, answers of fox-100-0" in lines[4]


def test_where_dense_itself_fails_it_is_said_before_the_methods_run_and_in_the_report(
    configs: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = [
        "passkey",
        "--config",
        configs["text"],
        "--lengths",
        "300",
        "--depths",
        "0.5",
        "--samples",
        "2",
        "--max-tokens",
        "3",
    ]
    command += ["--methods", "quest", "--budgets", "64", "--no-controls", "--no-plots", "--trace-examples", "0"]
    assert main([*command, "--output", str(tmp_path)]) == 0
    (warning,) = (record.getMessage() for record in caplog.records if "dense attention itself" in record.getMessage())
    assert warning.startswith("passkey, 300 tokens: dense attention itself has keys found (0-100) 0 over 2 examples, below 50")
    assert f"**{warning}**" in (tmp_path / "report.md").read_text()


def test_profile_of_a_checkpoint_without_a_tokenizer_writes_overrides_that_an_engine_takes(
    configs: dict[str, str], tmp_path: Path
) -> None:
    ids, layers = tmp_path / "ids.json", tmp_path / "layers.yaml"
    ids.write_text(json.dumps([(7 * i * i + i) % 331 for i in range(900)]))
    command = ["profile", "--config", configs["bare"], "--token-ids", str(ids), "--lengths", "300", "--samples", "2"]
    command += ["--steps", "3", "--budgets", "64", "--output", str(tmp_path / "out"), "--write-layers", str(layers)]
    assert main([*command, "--set", "sparse.method=quest", "--set", "sparse.dense_layers=1"]) == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| layer | mass 0.5 | mass 0.9 | mass 0.95 | mass 0.99 |" in report and "| oracle_topk 64 |" in report
    assert (tmp_path / "out" / "error-300-tokens.png").read_bytes().startswith(PNG)
    overrides = yaml.safe_load(layers.read_text())["layers"]
    assert overrides[0]["range"][0] == "1" and overrides[-1]["range"][-1] == "2"
    assert all(32 <= entry["token_budget"] <= 304 and entry["token_budget"] % 16 == 0 for entry in overrides)
    sparse = {"method": "quest", "dense_layers": 1, "layers": overrides}
    engine = yaml.safe_load(Path(configs["bare"]).read_text())
    with LLM(**engine, sparse=sparse) as llm:
        assert llm.score([1, 2, 3], decode_last_prompt_tokens=1)


@pytest.mark.slow
def test_needle_with_answers_of_text(configs: dict[str, str], tmp_path: Path) -> None:
    command = ["needle", "--config", configs["text"], "--tasks", "single,multivalue", "--lengths", "460", "--depths", "0.5"]
    command += ["--max-tokens", "4", "--methods", "{method: quest, token_budget: 64}", "--no-controls", "--no-plots"]
    assert main([*command, "--output", str(tmp_path)]) == 0
    answers = [record for record in records_of(tmp_path) if record["kind"] == "answers"]
    assert [record["settings"]["method"] for record in answers] == ["dense", "quest"]
    assert all(len(example["token_ids"]) <= 4 and example["num_question_tokens"] > 10 for example in answers[0]["examples"])
    assert "| task | single | multivalue |" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["needle", "--methods", "quest"], "'{bare}' has no tokenizer; give one with --set tokenizer=FOLDER"),
        (["recall", "--methods", "quest"], "recall needs the checkpoint that is built for it"),
        (["agreement", "--lengths", "300", "--methods", "quest"], "'{bare}' has no tokenizer; give --token-ids FILE"),
        (["longbench", "--methods", "quest"], "'{bare}' has no tokenizer; give one with --set tokenizer=FOLDER"),
        (["profile", "--methods", "qest"], "sparse.method='qest' is not known"),
        (["needle"], "--methods is missing, and the configuration has no sparse method"),
        (["profile", "--set", "page_sise=16"], "unknown key 'page_sise'; did you mean 'page_size'?"),
    ],
)
def test_what_cannot_run_is_refused_and_leaves_no_directory(
    configs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    output = tmp_path / "out"
    assert main([*arguments, "--config", configs["bare"], "--output", str(output)]) == 2
    bare = yaml.safe_load(Path(configs["bare"]).read_text())["model"]
    assert message.replace("{bare}", bare) in capsys.readouterr().err
    assert not output.exists()


def test_without_matplotlib_nothing_is_begun(
    configs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest))
    command = ["recall", "--config", configs["recall"], "--output", str(tmp_path / "out"), "--methods", "quest", *RECALL]
    assert main(command) == 2
    assert "pip install -e '.[eval]', or add --no-plots" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_has_a_help(suite: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([suite, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "--methods" in printed and "--kl-tokens" in printed and "--output" in printed


@pytest.mark.slow
def test_an_interrupt_leaves_a_directory_to_go_on_from(configs: dict[str, str], tmp_path: Path) -> None:
    command = ["recall", "--config", configs["recall"], "--output", str(tmp_path), "--methods", "quest", "--budgets", "64"]
    command += [*RECALL, "--no-plots", "--tasks", "one-hop"]
    results = tmp_path / "results.jsonl"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.evaluate", *command], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + WAIT_S
    while (not results.exists() or not results.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert f"interrupted; repeat the command to continue from {tmp_path}" in errors
    before = results.read_text().splitlines()
    assert before and not (tmp_path / "report.md").exists()
    assert main(command) == 0
    after = results.read_text().splitlines()
    assert after[: len(before)] == before and len(after) > len(before)
    assert (tmp_path / "report.md").exists()


@pytest.mark.slow
@pytest.mark.ray
def test_two_ray_actors_share_one_ray_for_every_engine(configs: dict[str, str], tmp_path: Path, local_ray: None) -> None:
    command = ["recall", "--config", configs["recall"], "--output", str(tmp_path), "--methods", "quest", "--budgets", "64"]
    command += [*RECALL, "--tasks", "one-hop", "--no-controls", "--no-plots", "--trace-examples", "0"]
    assert main([*command, "--set", "tensor_parallel_size=2"]) == 0
    scores = {record["settings"]["method"]: record["examples"][0]["scores"]["score"] for record in records_of(tmp_path)}
    assert scores == {"dense": 1.0, "quest": 1.0}
