"""outcome: how one request of a soak ended, compared with its undisturbed run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distributed_sparse.outputs import CompletionOutput, RequestOutput

COMPLETED, ABORTED, TIMED_OUT, LOST = "completed", "aborted", "timed out", "lost"


@dataclass(frozen=True)
class Outcome:
    """How one request ended.

    Attributes:
        how: COMPLETED; ABORTED or TIMED_OUT, as its client requested; LOST: the engine reported an error, or never finished it.
        differs: its tokens differ from the undisturbed run's, or if it was cut short, from their beginning.
        tokens: number received, over all samples.
        detail: what was wrong, for people to read.
    """

    how: str
    differs: bool = False
    tokens: int = 0
    detail: str = ""


def judge(
    expected: Sequence[CompletionOutput],
    output: RequestOutput | None,
    error: str | None = None,
    may_abort: bool = False,
    may_time_out: bool = False,
) -> Outcome:
    """Classify a request's end and compare its tokens.

    Args:
        expected: its undisturbed completions.
        output: the last output received; None if there was none.
        error: the exception of its call.
        may_abort: its client aborted it or left, perhaps too late.
        may_time_out: it had a `timeout_s`.
    """
    if output is None:
        how = ABORTED if may_abort and error is None else LOST  # the client left before the first token
        return Outcome(how, detail=error or "no output was received")
    tokens = sum(len(completion.token_ids) for completion in output.outputs)
    error = error or output.error
    timed_out = may_time_out and error is not None and error.startswith("timeout_s=")
    cut_short = any(completion.finish_reason in (None, "abort") for completion in output.outputs)
    if error is not None and not timed_out:
        return Outcome(LOST, tokens=tokens, detail=error)
    if cut_short and not (may_abort or timed_out):
        return Outcome(LOST, tokens=tokens, detail="it was aborted without a request to abort")
    how = TIMED_OUT if timed_out else ABORTED if cut_short else COMPLETED
    for right, found in zip(expected, output.outputs):
        difference = difference_of(right, found)
        if difference:
            return Outcome(how, True, tokens, f"sample {right.index}: {difference}")
    if how == COMPLETED and len(output.outputs) != len(expected):
        return Outcome(how, True, tokens, f"{len(output.outputs)} samples, not {len(expected)}")
    return Outcome(how, tokens=tokens)


def difference_of(expected: CompletionOutput, found: CompletionOutput) -> str | None:
    """How a completion differs from the expected one, or None; one that was cut short must be its beginning."""
    at = next((i for i, (a, b) in enumerate(zip(expected.token_ids, found.token_ids)) if a != b), None)
    if at is not None:
        return f"token {at} is {found.token_ids[at]}, not {expected.token_ids[at]}"
    right, here = len(expected.token_ids), len(found.token_ids)
    cut_short = found.finish_reason in (None, "abort")
    if here > right or (here < right and not cut_short):
        return f"{here} tokens, not {right}"
    if cut_short:
        return None
    for name in ("finish_reason", "stop_reason", "text"):
        a, b = getattr(expected, name), getattr(found, name)
        if a != b:
            return f"{name}={b!r}, not {a!r}"
    return None
