"""recall: questions about facts planted in a text, for the checkpoint that `recall_model.py` builds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from distributed_sparse.tools.evaluation.recall import QUESTION_LENGTH, make_majority_prompts, make_quiz
from distributed_sparse.tools.evaluation.recall_vocabulary import VOCAB_SIZE
from distributed_sparse.tools.evaluation.suite import Answer, EvaluatedModel, Example, Suite, check_lengths, check_names
from distributed_sparse.utils.validation import check_int

TASKS = ("one-hop", "two-hop", "majority")


@dataclass(frozen=True, kw_only=True)
class RecallSuite(Suite):
    """Each question has one answer symbol, judged right after it. Questions share a document, except majority questions."""

    name: ClassVar[str] = "recall"
    score_label: ClassVar[str] = "right answers (0-1)"
    best: ClassVar[float | None] = 1.0
    block: ClassVar[int] = 1  # questions about one document do not depend on each other
    least_of_dense: ClassVar[float] = 0.5

    tasks: Annotated[tuple[str, ...], "some of one-hop, two-hop, majority"] = TASKS
    lengths: Annotated[tuple[int, ...], "tokens of a document with its questions"] = (4096,)
    facts: Annotated[int, "facts in a document"] = 256
    questions: Annotated[int, "questions about each document"] = 40
    documents: Annotated[int, "documents per task and length"] = 1
    majority_questions: Annotated[int, "majority questions per length, each with its own document"] = 8
    mentions: Annotated[int, "mentions of a majority question's key"] = 96
    share: Annotated[float, "share of the mentions that the answer follows"] = 0.4
    seed: Annotated[int, "chooses texts, facts and questions"] = 0

    def examples(self, model: EvaluatedModel) -> list[Example]:
        check_names(self.name, "tasks", self.tasks, TASKS)
        if model.vocab_size != VOCAB_SIZE:
            raise ValueError(
                f"recall needs the checkpoint that is built for it, and {model.name!r} has a vocabulary of {model.vocab_size} "
                f"instead of {VOCAB_SIZE}; make one with python -m launch.make_demo_checkpoint --output checkpoints/demo, or "
                "use the suite needle"
            )
        check_lengths(self.name, self.lengths, 1, model)
        check_int("recall: documents", self.documents, 1, remedy="give the number of documents per task and length")
        return [example for length in self.lengths for task in self.tasks for example in self._of_task(task, length)]

    def _of_task(self, task: str, length: int) -> list[Example]:
        group = f"{task}, {length} tokens"
        if task == "majority":
            prompts = make_majority_prompts(length, self.majority_questions, self.mentions, self.share, self.seed)
            return [
                # the answer follows the question in the prompt, so that the prediction before it can be judged
                Example(
                    f"{task}-{length}-{i}",
                    group,
                    [*prompt.token_ids, *prompt.answer_ids],
                    QUESTION_LENGTH + 1,
                    positions=(len(prompt.token_ids),),
                    wanted=tuple(prompt.answer_ids),
                )
                for i, prompt in enumerate(prompts)
            ]
        found = []
        for i in range(self.documents):
            quiz = make_quiz(self.facts, length, self.questions, TASKS.index(task) + 1, self.seed + 1000 * i)
            positions, wanted = tuple(quiz.answer_positions), tuple(quiz.answer_ids)
            name = f"{task}-{length}-{i}"
            found.append(Example(name, group, quiz.token_ids, quiz.num_quiz_tokens, positions=positions, wanted=wanted))
        return found

    def values(self, example: Example, answer: Answer) -> list[float]:
        if not answer.token_ids:
            raise ValueError("recall needs log-probabilities of the whole vocabulary; raise --table-bytes")
        return [float(found == wanted) for found, wanted in zip(answer.token_ids, example.wanted, strict=True)]

    def score(self, example: Example, answer: Answer) -> dict[str, float]:
        right = self.values(example, answer)
        return {"score": sum(right) / len(right)}
