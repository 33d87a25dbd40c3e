"""longbench: LongBench v1 (Bai et al., arXiv 2308.14508) from the user's copy of its data, one JSONL file per dataset."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from distributed_sparse.client.tokenizer import encode_prompt
from distributed_sparse.tools.evaluation.files import digest
from distributed_sparse.tools.evaluation.prompt import encode_question
from distributed_sparse.tools.evaluation.suite import Answer, EvaluatedModel, Example, Suite, check_names
from distributed_sparse.tools.evaluation.suites.longbench_datasets import DATASETS, read_templates
from distributed_sparse.utils.validation import check_int, shown

FIELDS = ("input", "context", "answers")


@dataclass(frozen=True, kw_only=True)
class LongBenchSuite(Suite):
    """The score is the mean over datasets of the dataset's own metric, x 100."""

    name: ClassVar[str] = "longbench"
    score_label: ClassVar[str] = "LongBench metric (0-100)"
    least_of_dense: ClassVar[float] = 10.0  # a good model's F1 or ROUGE-L is often 20 to 30

    data: Annotated[str, "folder with LongBench's JSONL files, as hotpotqa.jsonl"] = ""
    datasets: Annotated[tuple[str, ...], "datasets (default: all in the folder)"] = ()
    templates: Annotated[
        str | None, "the benchmark's dataset2prompt.json (default: the folder's, else this project's own wording)"
    ] = None
    limit: Annotated[int | None, "examples per dataset (default: all)"] = None
    max_length: Annotated[
        int | None, "tokens of a prompt, cut in the middle (default: 31500, or what the model has room for)"
    ] = None
    max_question_tokens: Annotated[int, "tokens of a question that are decoded, at most"] = 1024
    chat: Annotated[bool, "use the tokenizer's chat template for the datasets for which LongBench does"] = False

    def examples(self, model: EvaluatedModel) -> list[Example]:
        model.need_tokenizer(self.name)
        if self.limit is not None:
            check_int("longbench: limit", self.limit, 1, remedy="leave it out to take all examples")
        check_int("longbench: max_question_tokens", self.max_question_tokens, 1, remedy="give a number of tokens")
        templates = read_templates(self.templates, Path(self.data))
        found = []
        for name, path in self._files().items():
            template = templates.get(name, DATASETS[name].template)
            for number, row in enumerate(_rows(path)):
                if number == self.limit:
                    break
                found.append(self._example(model, name, template, number, row))
        return found

    def _files(self) -> dict[str, Path]:
        """The data files by dataset."""
        folder = Path(self.data)
        if not self.data or not folder.is_dir():
            raise ValueError(f"longbench: data={self.data!r} is no folder; give --data DIR with LongBench's JSONL files")
        there = {}
        for name in DATASETS:
            for path in (folder / f"{name}_e.jsonl", folder / f"{name}.jsonl"):  # LongBench's file overrides LongBench-E's
                if path.is_file():
                    there[name] = path
        if self.datasets:
            check_names(self.name, "datasets", self.datasets, list(DATASETS))
            missing = [name for name in self.datasets if name not in there]
            if missing:
                raise ValueError(f"longbench: {self.data!r} has no {missing[0]}.jsonl; it has {', '.join(there) or 'none'}")
            there = {name: there[name] for name in self.datasets}
        if not there:
            raise ValueError(f"longbench: {self.data!r} has none of {', '.join(f'{name}.jsonl' for name in DATASETS)}")
        return there

    def _example(self, model: EvaluatedModel, name: str, template: str, number: int, row: dict[str, Any]) -> Example:
        dataset = DATASETS[name]
        before, _, question = template.partition("{context}")
        before, question = before + row["context"], question.replace("{input}", row["input"])
        room = model.max_model_len - dataset.max_tokens
        limit = min(31500, room) if self.max_length is None else self.max_length
        if limit > room:
            raise ValueError(
                f"longbench: max_length={limit} and {dataset.max_tokens} tokens of answer ({name}) are over "
                f"max_model_len={model.max_model_len}; use at most {room}"
            )

        def encoded(text: str) -> tuple[list[int], int]:
            return encode_question(model.tokenizer, text, question, self.chat and dataset.chat, self.max_question_tokens)  # type: ignore[arg-type]

        token_ids, num_question = encoded(before)
        if len(token_ids) > limit:
            token_ids, num_question = encoded(
                cut_middle(model.tokenizer, before, lambda text: len(encoded(text)[0]), limit, f"longbench: {name} {number}")
            )
        return Example(
            f"{name}-{number}",
            "LongBench",
            token_ids,
            num_question,
            dataset.max_tokens,
            references=tuple(map(str, row["answers"])),
            meta={"task": name, "all_classes": row.get("all_classes") or [], "length": row.get("length")},
        )

    def score(self, example: Example, answer: Answer) -> dict[str, float]:
        dataset = DATASETS[example.meta["task"]]
        text = answer.text.lstrip("\n").split("\n")[0] if dataset.first_line else answer.text
        return {"score": 100 * max(dataset.metric(text, wanted, example.meta["all_classes"]) for wanted in example.references)}

    def options(self) -> dict[str, Any]:
        files = {path.name: digest(path) for path in self._files().values()}
        own = read_templates(self.templates, Path(self.data))
        return super().options() | {"data_sha256": files, "templates": "the benchmark's" if own else "own words"}


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"longbench: {path}, line {number} is not JSON ({error}); fetch the file again") from None
            if not isinstance(row, dict) or any(name not in row for name in FIELDS) or not row["answers"]:
                raise ValueError(f"longbench: {path}, line {number}: {shown(row)} has not all of {', '.join(FIELDS)}")
            yield row


def cut_middle(tokenizer: Any, text: str, length_of: Callable[[str], int], limit: int, what: str) -> str:
    """Cut the middle out of `text`, so that `length_of(text)` is at most `limit` tokens.

    As in LongBench, the prompt keeps as many tokens of its start as of its end; the question at the end stays whole.

    Raises:
        ValueError: the rest of the prompt alone is too long.
    """
    rest = length_of("")
    token_ids = encode_prompt(tokenizer, text, add_special_tokens=False)
    keep = limit - rest
    while keep >= 0:
        head = min((limit + 1) // 2, keep)
        tail = keep - head
        shortened = tokenizer.decode(token_ids[:head]) + (tokenizer.decode(token_ids[-tail:]) if tail else "")
        over = length_of(shortened) - limit  # above 0 where a cut splits a character or a word
        if over <= 0:
            return shortened
        keep -= over
    raise ValueError(f"{what}: the question and its instructions have {rest} tokens, over max_length={limit}; raise it")
