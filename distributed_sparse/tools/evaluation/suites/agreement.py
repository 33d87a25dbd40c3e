"""agreement: the last tokens of real texts decoded sparsely; perplexity, and agreement with dense attention."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from distributed_sparse.tools.evaluation.files import digest
from distributed_sparse.tools.evaluation.suite import Answer, EvaluatedModel, Example, Suite, check_lengths
from distributed_sparse.tools.evaluation.token_text import TokenText, encode_text, python_texts, read_texts
from distributed_sparse.utils.validation import check_int


@dataclass(frozen=True, kw_only=True)
class AgreementSuite(Suite):
    """Perplexity of real text, top-1 agreement and KL against dense, and the bytes read.

    Every token is given (teacher-forced); sparse decode predicts the last `decoded` tokens of a window. Windows of
    different lengths end at the same token, so every length predicts the same tokens.
    """

    name: ClassVar[str] = "agreement"
    score_label: ClassVar[str] = "perplexity"
    higher_is_better: ClassVar[bool] = False
    is_log: ClassVar[bool] = True
    best: ClassVar[float | None] = None
    block: ClassVar[int] = 32

    text: Annotated[tuple[str, ...], "UTF-8 text files (default: Python's language reference and source)", "+"] = ()
    token_ids: Annotated[tuple[str, ...], "JSON files, each a list of token ids, instead of text", "+"] = ()
    lengths: Annotated[tuple[int, ...], "tokens of a window"] = (4096,)
    decoded: Annotated[int, "last tokens of a window that are predicted by sparse decode"] = 256
    windows: Annotated[int, "windows of each text, spread evenly"] = 1

    def examples(self, model: EvaluatedModel) -> list[Example]:
        check_int("agreement: windows", self.windows, 1, remedy="give a number of windows")
        check_lengths(self.name, self.lengths, 0, model, least=3)
        shortest, longest = min(self.lengths), max(self.lengths)
        check_int("agreement: decoded", self.decoded, 1, shortest - 2, remedy="give fewer tokens than the shortest window has")
        return [
            self._example(f"{name}-{length}-{number}", name, text.window(start + longest - length, length), length)
            for length in self.lengths
            for name, text in self._texts(model).items()
            for number, start in enumerate(text.starts(longest, self.windows, f"{self.name}: {name}"))
        ]

    def _texts(self, model: EvaluatedModel) -> dict[str, TokenText]:
        if self.text or self.token_ids:
            return read_texts(model, self.name, self.text, self.token_ids)
        model.need_tokenizer(self.name, "give --token-ids FILE, or a tokenizer with --set tokenizer=FOLDER")
        return {name: encode_text(model, text) for name, text in python_texts().items()}

    def _example(self, example_id: str, text: str, token_ids: list[int], length: int) -> Example:
        positions = range(length - self.decoded, length)
        return Example(
            example_id,
            f"{length} tokens",
            token_ids,
            self.decoded + 1,  # the first judged token is predicted by the token before it
            positions=tuple(positions),
            wanted=tuple(token_ids[p] for p in positions),
            meta={"task": text, "guess": _guess(token_ids[: positions.start], token_ids[positions.start :])},
        )

    def values(self, example: Example, answer: Answer) -> Sequence[float]:
        """Negative log-probability of each predicted token, in nats."""
        assert answer.logprobs is not None
        return [-float(value) for value in answer.logprobs]

    def score(self, example: Example, answer: Answer) -> dict[str, float]:
        values = self.values(example, answer)
        return {"score": sum(values) / len(values)}

    def needed(self, example: Example) -> float:
        return example.meta["guess"]

    def options(self) -> dict[str, Any]:
        given = [digest(Path(path)) for path in (*self.text, *self.token_ids)]
        own = [hashlib.sha256(text.encode()).hexdigest() for text in python_texts().values()] if not given else []
        return super().options() | {"text_sha256": given or own}


def _guess(before: Sequence[int], after: Sequence[int]) -> float:
    """Nats per token of `after` under the token frequencies of `before`, add-one smoothed."""
    counts = Counter(before)
    total = len(before) + len({*before, *after})
    return -sum(math.log((counts[token] + 1) / total) for token in after) / len(after)
