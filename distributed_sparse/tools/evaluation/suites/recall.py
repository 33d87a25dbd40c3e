"""recall: facts planted in a text, asked for by symbol, on the checkpoint that is built for it (`recall_model.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from distributed_sparse.tools.evaluation.recall import QUESTION_LENGTH, RecallQuiz, make_majority_prompts, make_quiz
from distributed_sparse.tools.evaluation.recall_vocabulary import VOCAB_SIZE
from distributed_sparse.tools.evaluation.suite import Answer, EvaluatedModel, Example, Suite, check_lengths, check_names
from distributed_sparse.utils.validation import check_int

TASKS = ("one-hop", "two-hop", "majority")


@dataclass(frozen=True, kw_only=True)
class RecallSuite(Suite):
    """Each question is one answer symbol, judged right after it; many questions share a document, but a majority's."""

    name: ClassVar[str] = "recall"
    score_label: ClassVar[str] = "right answers (0-1)"
    best: ClassVar[float | None] = 1.0
    block: ClassVar[int] = 1  # questions about one document do not depend on each other
    least_of_dense: ClassVar[float] = 0.5

    tasks: tuple[str, ...] = field(default=TASKS, metadata={"help": "some of one-hop, two-hop, majority"})
    lengths: tuple[int, ...] = field(default=(4096,), metadata={"help": "tokens of a document with its questions"})
    facts: int = field(default=256, metadata={"help": "facts in a document"})
    questions: int = field(default=40, metadata={"help": "questions about each document"})
    documents: int = field(default=1, metadata={"help": "documents per task and length"})
    majority_questions: int = field(default=8, metadata={"help": "majority questions per length, each with its own document"})
    mentions: int = field(default=96, metadata={"help": "mentions of a majority question's key"})
    share: float = field(default=0.4, metadata={"help": "of them that the answer follows"})
    seed: int = field(default=0, metadata={"help": "chooses texts, facts and questions"})

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
                # the answer stands behind the question, so that what the model says before it can be read
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
        hops = TASKS.index(task) + 1
        quizzes = [
            make_quiz(self.facts, length, self.questions, hops, self.seed + 1000 * number) for number in range(self.documents)
        ]
        return [_of_quiz(f"{task}-{length}-{number}", group, quiz) for number, quiz in enumerate(quizzes)]

    def values(self, example: Example, answer: Answer) -> list[float]:
        if not answer.token_ids:
            raise ValueError("recall needs log-probabilities of the whole vocabulary; raise --table-bytes")
        return [float(said == wanted) for said, wanted in zip(answer.token_ids, example.wanted, strict=True)]

    def score(self, example: Example, answer: Answer) -> dict[str, float]:
        right = self.values(example, answer)
        return {"score": sum(right) / len(right)}


def _of_quiz(name: str, group: str, quiz: RecallQuiz) -> Example:
    positions, wanted = tuple(quiz.answer_positions), tuple(quiz.answer_ids)
    return Example(name, group, quiz.token_ids, quiz.num_quiz_tokens, positions=positions, wanted=wanted)
