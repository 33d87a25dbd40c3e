"""Suite: what a task asks of a model (`Example`) and how it judges what came back (`Answer`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from distributed_sparse.utils.validation import check_choice, check_int, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Example:
    """One prompt with its question at the end.

    Attributes:
        id: unique within the suite's examples.
        group: examples of one group are averaged into one row of the report, and controls get one budget for it.
        token_ids: the prompt.
        num_question_tokens: so many last tokens are read by sparse decode, one per step; >= 1.
        max_tokens: tokens to generate; 0 where the prompt itself holds what is judged.
        positions: of such a prompt, the tokens that are judged: token p is what the model says after token p - 1. Each lies
            behind at least one question token.
        wanted: the token ids that are right there.
        references: of a generated answer, the right texts.
        meta: what the suite's `score` needs besides, plain JSON.
    """

    id: str
    group: str
    token_ids: list[int]
    num_question_tokens: int
    max_tokens: int = 0
    positions: tuple[int, ...] = ()
    wanted: tuple[int, ...] = ()
    references: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        length = len(self.token_ids)
        assert 1 <= self.num_question_tokens < length, f"{self.id}: {self.num_question_tokens} question tokens of {length}"
        assert not (self.max_tokens and self.positions), f"{self.id}: generated or judged, not both"
        assert len(self.positions) == len(self.wanted), f"{self.id}: {len(self.positions)} positions, {len(self.wanted)} wanted"
        assert all(length - self.num_question_tokens < p < length for p in self.positions), (
            f"{self.id}: a position is prefilled"
        )


@dataclass(frozen=True)
class Answer:
    """What a model said to an `Example`.

    Attributes:
        text: the generated text, "" without a tokenizer.
        token_ids: the generated tokens; of a judged prompt, the most likely token at each of `positions`. Empty where the
            whole vocabulary did not fit into memory.
        logprobs: float [positions] natural log-probability of the prompt's own tokens there.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: np.ndarray | None = None


@dataclass(frozen=True)
class EvaluatedModel:
    """What a suite may know of the model. `tokenizer` is None where the checkpoint has none; `name` is for messages."""

    name: str
    vocab_size: int
    max_model_len: int
    tokenizer: PreTrainedTokenizerFast | None = None

    def need_tokenizer(self, suite: str, remedy: str) -> PreTrainedTokenizerFast:
        """The tokenizer. Raises ValueError, with the remedy, where there is none."""
        if self.tokenizer is None:
            raise ValueError(f"{suite} is made of text, and {self.name!r} has no tokenizer; {remedy}")
        return self.tokenizer


class Suite(ABC):
    """A task family. Subclasses are dataclasses: their fields are the suite's options, of the command line too."""

    name: ClassVar[str]
    score_label: ClassVar[str]
    """What `score` counts, for a table's head."""
    higher_is_better: ClassVar[bool] = True
    is_log: ClassVar[bool] = False
    """`score` is a logarithm: tables show its exponential, and differences as ratios."""
    best: ClassVar[float | None] = 100.0
    """The score of right answers alone, where 0 is that of wrong ones; None: not bounded."""
    block: ClassVar[int] = 0
    """Judged positions of an example that intervals resample together; 0: all of them, as one answer depends on itself."""
    least_of_dense: ClassVar[float] = 50.0
    """See `needed`."""
    traces_only: ClassVar[bool] = False
    """Nothing is answered: only traces are taken."""
    default_methods: ClassVar[tuple[str, ...]] = ()
    """As on the command line; empty: the configuration's own method."""
    forced: ClassVar[dict[str, Any]] = {}
    """Common settings that hold for every method, whatever the configuration says."""

    @abstractmethod
    def examples(self, model: EvaluatedModel) -> list[Example]:
        """The examples, the same in every call.

        Raises:
            ValueError: an option does not hold for this model; names the remedy.
        """

    @abstractmethod
    def score(self, example: Example, answer: Answer) -> dict[str, float]:
        """The numbers of one answer: "score" first, others beside it; nan where one cannot be told."""

    def values(self, example: Example, answer: Answer) -> Sequence[float]:
        """What "score" is the mean of: one number for each judged position, or one for the whole answer."""
        return [self.score(example, answer)["score"]]

    def needed(self, example: Example) -> float:
        """The score that dense attention must reach, on average, for methods to be judged by theirs."""
        return self.least_of_dense

    def options(self) -> dict[str, Any]:
        """What decides on the examples, plain JSON: results of other options do not go into the same directory."""
        return asdict(self)  # type: ignore[call-overload]  # every subclass is a dataclass


def check_lengths(suite: str, lengths: Sequence[int], longest_output: int, model: EvaluatedModel, least: int = 1) -> None:
    """Refuse lengths that are no positive numbers, or that the model has no room for."""
    if not lengths:
        raise ValueError(f"{suite}: lengths is empty; give lengths in tokens")
    for length in lengths:
        check_int(f"{suite}: length", length, least, remedy="give tokens of the prompt")
        if length + longest_output > model.max_model_len:
            answer = f" and {longest_output} tokens of answer are" if longest_output else " is"
            raise ValueError(
                f"{suite}: length={length}{answer} over max_model_len={model.max_model_len}; "
                f"use at most {model.max_model_len - longest_output}, or raise max_model_len"
            )


def check_names(suite: str, what: str, given: Sequence[str], known: Sequence[str]) -> None:
    """Refuse an empty list of names, and an unknown name."""
    if not given:
        raise ValueError(f"{suite}: {what}={shown(given)} is empty; use some of {', '.join(known)}")
    for name in given:
        check_choice(f"{suite}: {what}", name, known)
