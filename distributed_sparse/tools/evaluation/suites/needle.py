"""needle: seven tasks after RULER (Hsieh et al., arXiv 2404.06654), in own words: find, follow and count in a long text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from distributed_sparse.tools.evaluation.haystack import Haystack, filler_sentences, fit, read_sentences
from distributed_sparse.tools.evaluation.prompt import encode_question
from distributed_sparse.tools.evaluation.suite import Answer, EvaluatedModel, Example, Suite, check_lengths, check_names
from distributed_sparse.tools.evaluation.suites.needle_tasks import MAX_TOKENS, TASKS
from distributed_sparse.tools.evaluation.text_metrics import substring_share
from distributed_sparse.utils.validation import check_int, shown


def check_depths(suite: str, depths: Sequence[float]) -> None:
    """Refuse depths outside 0..1."""
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"{suite}: depths={shown(depths)} must be numbers in 0..1: 0 is the text's start, 1 its end")


@dataclass(frozen=True, kw_only=True)
class NeedleSuite(Suite):
    """The score is the mean share of the references that the answer holds as substrings, whatever their case, x 100."""

    name: ClassVar[str] = "needle"
    score_label: ClassVar[str] = "references found (0-100)"

    tasks: tuple[str, ...] = field(default=tuple(TASKS), metadata={"help": f"some of {', '.join(TASKS)}"})
    lengths: tuple[int, ...] = field(default=(4096,), metadata={"help": "tokens of a prompt, at most"})
    depths: tuple[float, ...] = field(default=(0.1, 0.5, 0.9), metadata={"help": "where the first needle stands, 0 to 1"})
    samples: int = field(default=1, metadata={"help": "examples per task, length and depth"})
    haystack_file: str | None = field(default=None, metadata={"help": "real text for the haystack (default: generated)"})
    max_tokens: int | None = field(default=None, metadata={"help": "tokens of an answer (default: the task's)"})
    chat: bool = field(default=False, metadata={"help": "put prompts into the tokenizer's chat template"})
    seed: int = field(default=0, metadata={"help": "chooses needles and filler"})

    def examples(self, model: EvaluatedModel) -> list[Example]:
        tokenizer = model.need_tokenizer(
            self.name, "give one with --set tokenizer=FOLDER, or use the suites recall or agreement"
        )
        check_names(self.name, "tasks", self.tasks, list(TASKS))
        longest_output = self.max_tokens or max(MAX_TOKENS[task] for task in self.tasks)
        check_lengths(self.name, self.lengths, longest_output, model)
        check_depths(self.name, self.depths)
        check_int("needle: samples", self.samples, 1, remedy="give the number of examples per task, length and depth")
        haystack = Haystack(read_sentences(self.haystack_file) if self.haystack_file else filler_sentences(self.seed))
        return [
            self._example(tokenizer, haystack, task, length, depth, number)
            for length in self.lengths
            for task in self.tasks
            for depth in self.depths
            for number in range(self.samples)
        ]

    def _example(self, tokenizer: Any, haystack: Haystack, task: str, length: int, depth: float, number: int) -> Example:
        name = f"{task}-{length}-{depth:g}-{number}"
        made = TASKS[task](random.Random(f"{self.seed} {name}"), depth, haystack)

        def encoded(count: int) -> tuple[list[int], int]:
            return encode_question(tokenizer, made.introduction + made.body(count), made.question, self.chat, cue=made.cue)

        count = fit(lambda count: len(encoded(count)[0]), length, f"needle {task}")
        token_ids, num_question = encoded(count)
        return Example(
            name,
            f"{length} tokens",
            token_ids,
            num_question,
            self.max_tokens or MAX_TOKENS[task],
            references=made.references,
            meta={"task": task, "depth": depth},
        )

    def score(self, example: Example, answer: Answer) -> dict[str, float]:
        return {"score": 100 * substring_share(answer.text, example.references)}
