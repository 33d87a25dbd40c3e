"""passkey: one number in a text that repeats itself, at every length and depth (Mohtashami and Jaggi, arXiv 2305.16300)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from distributed_sparse.tools.evaluation.haystack import with_needles
from distributed_sparse.tools.evaluation.prompt import encode_fitted
from distributed_sparse.tools.evaluation.suite import Answer, EvaluatedModel, Example, Suite, check_lengths
from distributed_sparse.tools.evaluation.suites.needle import check_depths
from distributed_sparse.tools.evaluation.text_metrics import substring_share
from distributed_sparse.utils.validation import check_int

_NOISE = (
    "The hills are green.",
    "The clouds drift by.",
    "The river runs on.",
    "One road leads out, another leads home.",
)
_INTRODUCTION = "A pass key is hidden in the text below, among much that does not matter. Find it and keep it in mind.\n\n"
_QUESTION, _CUE = "\n\nWhat is the pass key?", " The pass key is"


@dataclass(frozen=True, kw_only=True)
class PasskeySuite(Suite):
    """The score is the share of keys that occur in the answer, x 100."""

    name: ClassVar[str] = "passkey"
    score_label: ClassVar[str] = "keys found (0-100)"

    lengths: Annotated[tuple[int, ...], "tokens of a prompt, at most"] = (4096,)
    depths: Annotated[tuple[float, ...], "where the key stands, 0 to 1"] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: Annotated[int, "keys per length and depth"] = 2
    max_tokens: Annotated[int, "tokens of an answer"] = 16
    chat: Annotated[bool, "put prompts into the tokenizer's chat template"] = False
    seed: Annotated[int, "chooses the keys"] = 0

    def examples(self, model: EvaluatedModel) -> list[Example]:
        tokenizer = model.need_tokenizer(self.name)
        check_lengths(self.name, self.lengths, self.max_tokens, model)
        check_depths(self.name, self.depths)
        check_int("passkey: samples", self.samples, 1, remedy="give the number of keys per length and depth")
        return [
            self._example(tokenizer, length, depth, number)
            for length in self.lengths
            for depth in self.depths
            for number in range(self.samples)
        ]

    def _example(self, tokenizer: Any, length: int, depth: float, number: int) -> Example:
        name = f"{length}-{depth:g}-{number}"
        key = str(random.Random(f"{self.seed} {name}").randint(10_000, 99_999))
        needle = (depth, f"The pass key is {key}. Remember it: {key} is the pass key.")

        def before(count: int) -> str:
            return _INTRODUCTION + with_needles(_NOISE, [needle], count)

        token_ids, num_question = encode_fitted(tokenizer, before, _QUESTION, _CUE, self.chat, length, self.name)
        group, meta = f"{length} tokens", {"depth": depth}
        return Example(name, group, token_ids, num_question, self.max_tokens, references=(key,), meta=meta)

    def score(self, example: Example, answer: Answer) -> dict[str, float]:
        return {"score": 100 * substring_share(answer.text, example.references)}
