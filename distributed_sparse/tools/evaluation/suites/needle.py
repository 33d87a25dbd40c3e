"""needle: seven tasks after RULER (Hsieh et al., arXiv 2404.06654) in this project's wording: find, follow and count."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from distributed_sparse.tools.evaluation.haystack import filler_sentences, read_sentences
from distributed_sparse.tools.evaluation.prompt import encode_fitted
from distributed_sparse.tools.evaluation.suite import Answer, EvaluatedModel, Example, Suite, check_lengths, check_names
from distributed_sparse.tools.evaluation.suites.needle_tasks import TASKS
from distributed_sparse.tools.evaluation.text_metrics import substring_share
from distributed_sparse.utils.validation import check_int, shown

_TASKS_HELP = f"some of {', '.join(TASKS)}"


def check_depths(suite: str, depths: Sequence[float]) -> None:
    """Raise ValueError if there are no depths, or one is outside 0..1."""
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"{suite}: depths={shown(depths)} must be numbers in 0..1: 0 is the text's start, 1 its end")


@dataclass(frozen=True, kw_only=True)
class NeedleSuite(Suite):
    """The score is the mean share of the references that occur in the answer (substrings, ignoring case), x 100."""

    name: ClassVar[str] = "needle"
    score_label: ClassVar[str] = "references found (0-100)"

    tasks: Annotated[tuple[str, ...], _TASKS_HELP] = tuple(TASKS)
    lengths: Annotated[tuple[int, ...], "tokens of a prompt, at most"] = (4096,)
    depths: Annotated[tuple[float, ...], "where the first needle stands, 0 to 1"] = (0.1, 0.5, 0.9)
    samples: Annotated[int, "examples per task, length and depth"] = 1
    haystack_file: Annotated[str | None, "real text for the haystack (default: generated)"] = None
    max_tokens: Annotated[int | None, "tokens of an answer (default: the task's)"] = None
    chat: Annotated[bool, "put prompts into the tokenizer's chat template"] = False
    seed: Annotated[int, "chooses needles and filler"] = 0

    def examples(self, model: EvaluatedModel) -> list[Example]:
        tokenizer = model.need_tokenizer(self.name)
        check_names(self.name, "tasks", self.tasks, list(TASKS))
        longest_output = self.max_tokens or max(TASKS[task].max_tokens for task in self.tasks)
        check_lengths(self.name, self.lengths, longest_output, model)
        check_depths(self.name, self.depths)
        check_int("needle: samples", self.samples, 1, remedy="give the number of examples per task, length and depth")
        haystack = read_sentences(self.haystack_file) if self.haystack_file else filler_sentences(self.seed)
        return [
            self._example(tokenizer, haystack, task, length, depth, number)
            for length in self.lengths
            for task in self.tasks
            for depth in self.depths
            for number in range(self.samples)
        ]

    def _example(self, tokenizer: Any, haystack: Sequence[str], task: str, length: int, depth: float, number: int) -> Example:
        name = f"{task}-{length}-{depth:g}-{number}"
        prompt = TASKS[task].make(random.Random(f"{self.seed} {name}"), depth, haystack)
        token_ids, num_question = encode_fitted(
            tokenizer, prompt.before, prompt.question, prompt.cue, self.chat, length, f"needle {task}"
        )
        return Example(
            name,
            f"{length} tokens",
            token_ids,
            num_question,
            self.max_tokens or TASKS[task].max_tokens,
            references=prompt.references,
            meta={"task": task, "depth": depth},
        )

    def score(self, example: Example, answer: Answer) -> dict[str, float]:
        return {"score": 100 * substring_share(answer.text, example.references)}
