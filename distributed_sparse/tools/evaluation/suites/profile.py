"""profile: how many tokens hold the attention mass of a checkpoint, and how much they change from step to step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from distributed_sparse.tools.evaluation.files import digest
from distributed_sparse.tools.evaluation.haystack import filler_sentences
from distributed_sparse.tools.evaluation.recall import make_quiz
from distributed_sparse.tools.evaluation.recall_vocabulary import VOCAB_SIZE
from distributed_sparse.tools.evaluation.suite import Answer, EvaluatedModel, Example, Suite, check_lengths
from distributed_sparse.tools.evaluation.token_text import TokenText, encode_text, read_texts
from distributed_sparse.utils.validation import check_int


@dataclass(frozen=True, kw_only=True)
class ProfileSuite(Suite):
    """No answers: the last `steps` tokens of each text are decoded, and every step is traced in every layer."""

    name: ClassVar[str] = "profile"
    score_label: ClassVar[str] = ""
    traces_only: ClassVar[bool] = True
    default_methods: ClassVar[tuple[str, ...]] = (
        "oracle_topk",  # exact top-k: the upper bound of top-k methods
        "{method: vattention, selector: oracle, top_k_fraction: 0.0}",  # a sample, sinks and window
        "{method: vattention, selector: oracle}",  # exact top-k and a sample
    )
    forced: ClassVar[dict[str, Any]] = {"dense_layers": 0}  # trace every layer as sparse

    text: Annotated[str | None, "UTF-8 text file (default: generated filler)"] = None
    token_ids: Annotated[str | None, "JSON file with a list of token ids, instead of a text"] = None
    lengths: Annotated[tuple[int, ...], "tokens of a text"] = (4096,)
    samples: Annotated[int, "texts per length"] = 2
    steps: Annotated[int, "last tokens that are decoded and traced, at least 2 to measure overlap"] = 8
    seed: Annotated[int, "chooses generated text"] = 0

    def examples(self, model: EvaluatedModel) -> list[Example]:
        check_int("profile: samples", self.samples, 1, remedy="give a number of texts per length")
        check_int("profile: steps", self.steps, 2, remedy="the overlap of a step with the next needs two")
        check_lengths(self.name, self.lengths, 1, model, least=self.steps + 2)
        return [
            Example(f"{length}-{number}", f"{length} tokens", token_ids, self.steps)
            for length in self.lengths
            for number, token_ids in enumerate(self._texts(model, length))
        ]

    def _texts(self, model: EvaluatedModel, length: int) -> list[list[int]]:
        generated = self.text is None and self.token_ids is None
        if generated and model.vocab_size == VOCAB_SIZE:  # the recall checkpoint attends only to facts, which filler lacks
            return [_quiz(length, self.seed + number) for number in range(self.samples)]
        if generated and model.tokenizer is not None:
            text = _filler(model, self.samples * length, self.seed)
        else:
            files = ([path] if path else [] for path in (self.text, self.token_ids))
            (text,) = read_texts(model, self.name, *files).values()
        return [text.window(start, length) for start in text.starts(length, self.samples, self.name)]

    def score(self, example: Example, answer: Answer) -> dict[str, float]:
        raise AssertionError("a profile has no answers")

    def options(self) -> dict[str, Any]:
        return super().options() | {"text_sha256": digest(Path(self.text or self.token_ids or ""))}


def _filler(model: EvaluatedModel, length: int, seed: int) -> TokenText:
    """Generate sentences of at least `length` tokens."""
    text, found = "", TokenText([], [])
    while len(found.token_ids) < length:
        text += " ".join(filler_sentences(seed)) + " "
        seed += 1
        found = encode_text(model, text)
    return found


def _quiz(length: int, seed: int) -> list[int]:
    """A recall document with one fact per 32 tokens, whose last tokens are questions about them."""
    questions = max(1, min(8, length // 64))
    return make_quiz(max(3, min(256, length // 32)), length, min(questions, max(3, length // 32)), seed=seed).token_ids
