"""passkey: one number in a text that repeats itself, at every length and depth (Mohtashami and Jaggi, arXiv 2305.16300)."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import ClassVar

from distributed_sparse.tools.evaluation.haystack import Haystack, fit
from distributed_sparse.tools.evaluation.prompt import encode_question
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
    """The score is the share of keys that the answer holds, x 100."""

    name: ClassVar[str] = "passkey"
    score_label: ClassVar[str] = "keys found (0-100)"

    lengths: tuple[int, ...] = field(default=(4096,), metadata={"help": "tokens of a prompt, at most"})
    depths: tuple[float, ...] = field(default=(0.0, 0.25, 0.5, 0.75, 1.0), metadata={"help": "where the key stands, 0 to 1"})
    samples: int = field(default=2, metadata={"help": "keys per length and depth"})
    max_tokens: int = field(default=16, metadata={"help": "tokens of an answer"})
    chat: bool = field(default=False, metadata={"help": "put prompts into the tokenizer's chat template"})
    seed: int = field(default=0, metadata={"help": "chooses the keys"})

    def examples(self, model: EvaluatedModel) -> list[Example]:
        tokenizer = model.need_tokenizer(
            self.name, "give one with --set tokenizer=FOLDER, or use the suites recall or agreement"
        )
        check_lengths(self.name, self.lengths, self.max_tokens, model)
        check_depths(self.name, self.depths)
        check_int("passkey: samples", self.samples, 1, remedy="give the number of keys per length and depth")
        haystack, found = Haystack(_NOISE), []
        for length in self.lengths:
            for depth in self.depths:
                for number in range(self.samples):
                    name = f"{length}-{depth:g}-{number}"
                    key = str(random.Random(f"{self.seed} {name}").randint(10_000, 99_999))
                    needle = f"The pass key is {key}. Remember it: {key} is the pass key."

                    def encoded(count: int, needle: str = needle, depth: float = depth) -> tuple[list[int], int]:
                        text = haystack.with_needles([(depth, needle)], count)
                        return encode_question(tokenizer, _INTRODUCTION + text, _QUESTION, self.chat, cue=_CUE)

                    count = fit(lambda count, encoded=encoded: len(encoded(count)[0]), length, self.name)  # type: ignore[misc]
                    token_ids, num_question = encoded(count)
                    found.append(
                        Example(
                            name, f"{length} tokens", token_ids, num_question, self.max_tokens, references=(key,),
                            meta={"depth": depth},
                        )
                    )  # fmt: skip
        return found

    def score(self, example: Example, answer: Answer) -> dict[str, float]:
        return {"score": 100 * substring_share(answer.text, example.references)}
