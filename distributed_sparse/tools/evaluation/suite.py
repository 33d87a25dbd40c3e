"""suite: what a task suite gives a model to answer (`Example`), and how it scores the result (`Answer`)."""

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
    """One prompt that ends with its question; its answer is generated, or judged in the prompt itself.

    Attributes:
        id: unique within the suite's examples.
        group: the examples of a group are averaged into one row of the report, and share the budget of each control.
        token_ids: the prompt.
        num_question_tokens: number of last prompt tokens that sparse decode reads, one per step; >= 1.
        max_tokens: tokens to generate; 0 if the prompt is judged.
        positions: of a judged prompt, indices of the judged tokens; token p is predicted after token p - 1. Each has at least
            one question token before it.
        wanted: the right token ids at `positions`.
        references: of a generated answer, the right texts.
        meta: further input of the suite's `score`, plain JSON.
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
    """A model's answer to an `Example`.

    Attributes:
        text: the generated text, "" without a tokenizer.
        token_ids: the generated tokens; of a judged prompt, the most likely token at each of `positions`, or empty if the
            whole vocabulary's log-probabilities did not fit into memory.
        logprobs: of a judged prompt, float [positions]: natural log-probability of the prompt's own token there.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: np.ndarray | None = None


@dataclass(frozen=True)
class EvaluatedModel:
    """The model's properties that examples depend on. `tokenizer` is None if the checkpoint has none; errors use `name`."""

    name: str
    vocab_size: int
    max_model_len: int
    tokenizer: PreTrainedTokenizerFast | None = None

    def need_tokenizer(
        self, suite: str, remedy: str = "give one with --set tokenizer=FOLDER, or use the suites recall or agreement"
    ) -> PreTrainedTokenizerFast:
        """Return the tokenizer. Raises ValueError, with the remedy, if there is none."""
        if self.tokenizer is None:
            raise ValueError(f"{suite} is made of text, and {self.name!r} has no tokenizer; {remedy}")
        return self.tokenizer


class Suite(ABC):
    """A task suite.

    Subclasses are dataclasses. Their fields are the suite's options, on the command line too: a field's type is
    `Annotated[type, help]`, or `Annotated[type, help, "+"]` for an option with several values separated by spaces.
    """

    name: ClassVar[str]
    score_label: ClassVar[str]
    """Table heading of `score`."""
    higher_is_better: ClassVar[bool] = True
    is_log: ClassVar[bool] = False
    """`score` is a logarithm: tables show its exponential, and differences as ratios."""
    best: ClassVar[float | None] = 100.0
    """`score` if all answers are right, where 0 means that all are wrong; None: `score` is not bounded."""
    block: ClassVar[int] = 0
    """Neighbouring judged positions that the bootstrap resamples together; 0: the whole example, as its parts correlate."""
    least_of_dense: ClassVar[float] = 50.0
    """See `needed`."""
    traces_only: ClassVar[bool] = False
    """No answers: only traces are taken."""
    default_methods: ClassVar[tuple[str, ...]] = ()
    """Default of `--methods`; empty: the configuration's method."""
    forced: ClassVar[dict[str, Any]] = {}
    """Settings that override the configuration's for every method."""

    @abstractmethod
    def examples(self, model: EvaluatedModel) -> list[Example]:
        """Make the examples; every call returns the same ones.

        Raises:
            ValueError: an option is wrong, or does not fit this model; names the remedy.
        """

    @abstractmethod
    def score(self, example: Example, answer: Answer) -> dict[str, float]:
        """Score one answer: "score", and further numbers; nan if one is not defined."""

    def values(self, example: Example, answer: Answer) -> Sequence[float]:
        """The numbers whose mean is "score": one for each judged position, or one for the whole answer."""
        return [self.score(example, answer)["score"]]

    def needed(self, example: Example) -> float:
        """The least mean score of dense attention at which methods can be compared."""
        return self.least_of_dense

    def options(self) -> dict[str, Any]:
        """What the examples depend on, plain JSON; a results directory holds results of one set of options."""
        return asdict(self)  # type: ignore[call-overload]  # every subclass is a dataclass


def check_lengths(suite: str, lengths: Sequence[int], longest_output: int, model: EvaluatedModel, least: int = 1) -> None:
    """Raise ValueError if there are no lengths, or one is below `least` or over `max_model_len` with its answer."""
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
    """Raise ValueError if there are no names, or one is not known."""
    if not given:
        raise ValueError(f"{suite}: {what}={shown(given)} is empty; use some of {', '.join(known)}")
    for name in given:
        check_choice(f"{suite}: {what}", name, known)
