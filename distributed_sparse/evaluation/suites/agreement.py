"""ppl: how well the model predicts a text's own tokens when the last ones of each window are decoded sparsely."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from distributed_sparse.evaluation.files import digest
from distributed_sparse.evaluation.suite import Answer, EvaluatedModel, Example, Suite, check_lengths
from distributed_sparse.evaluation.token_text import read_text
from distributed_sparse.validation import check_int


@dataclass(frozen=True, kw_only=True)
class PplSuite(Suite):
    """The score is bits per byte, lower is better; bits per token for a text of token ids."""

    name: ClassVar[str] = "ppl"
    score_label: ClassVar[str] = "bits per byte (token, for token ids)"
    higher_is_better: ClassVar[bool] = False

    text: str | None = field(default=None, metadata={"help": "UTF-8 text file"})
    token_ids: str | None = field(default=None, metadata={"help": "JSON file with a list of token ids, instead of a text"})
    context: int = field(default=4096, metadata={"help": "tokens of a window"})
    decoded: int = field(default=128, metadata={"help": "last tokens of a window that are predicted by sparse decode"})
    windows: int = field(default=4, metadata={"help": "windows, spread evenly over the text"})

    def examples(self, model: EvaluatedModel) -> list[Example]:
        check_int("ppl: windows", self.windows, 1, remedy="give a number of windows")
        check_int("ppl: decoded", self.decoded, 1, self.context - 2, remedy="give fewer tokens than the window has")
        check_lengths(self.name, (self.context,), 1, model)
        text = read_text(model, self.name, self.text, self.token_ids)
        found = []
        for number, start in enumerate(text.starts(self.context, self.windows, self.name)):
            token_ids, num_bytes = text.window(start, self.context)
            positions = range(self.context - self.decoded, self.context)
            found.append(
                Example(
                    f"window-{number}",
                    f"{self.context} tokens",
                    token_ids,
                    self.decoded + 1,  # the first judged token is predicted by the token before it
                    positions=tuple(positions),
                    wanted=tuple(token_ids[p] for p in positions),
                    meta={"num_bytes": None if num_bytes is None else sum(num_bytes[p] for p in positions)},
                )
            )
        return found

    def score(self, example: Example, answer: Answer) -> dict[str, float]:
        assert answer.logprobs is not None
        bits = -float(np.sum(answer.logprobs, dtype=np.float64)) / math.log(2)
        per_token = bits / len(example.positions)
        num_bytes = example.meta["num_bytes"]
        if num_bytes is None:
            return {"score": per_token, "bits_per_token": per_token}
        return {"score": bits / num_bytes if num_bytes else math.nan, "bits_per_token": per_token}

    def options(self) -> dict[str, Any]:
        return super().options() | {"text_sha256": digest(Path(self.text or self.token_ids or ""))}
