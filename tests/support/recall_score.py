"""score: the right symbols of generated answers to recall prompts."""

from __future__ import annotations

from collections.abc import Sequence

from distributed_sparse.tools.evaluation.recall import RecallPrompt, RecallScore


def score(prompts: Sequence[RecallPrompt], outputs: Sequence[Sequence[int]]) -> RecallScore:
    """Count the answer symbols that the generated token ids have at the right index; tokens past the answer are ignored."""
    right = sum(
        generated == wanted
        for prompt, output in zip(prompts, outputs, strict=True)
        for wanted, generated in zip(prompt.answer_ids, output, strict=False)
    )
    return RecallScore(right, sum(len(prompt.answer_ids) for prompt in prompts))
