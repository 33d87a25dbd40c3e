"""What became of a request: the same tokens, their beginning where it was cut short, else it differs or is lost."""

from __future__ import annotations

import pytest

from distributed_sparse.outputs import CompletionOutput, RequestOutput
from distributed_sparse.tools.chaos.outcome import ABORTED, COMPLETED, LOST, TIMED_OUT, Outcome, judge

EXPECTED = [
    CompletionOutput(0, "abc", [1, 2, 3], "length"),
    CompletionOutput(1, "ab", [1, 2], "stop", stop_reason=2),
]


def output(*completions: CompletionOutput, error: str | None = None) -> RequestOutput:
    return RequestOutput("0", None, [9], outputs=list(completions), finished=True, error=error)


def cut(index: int, *token_ids: int, reason: str | None = "abort") -> CompletionOutput:
    return CompletionOutput(index, "", list(token_ids), reason)


def test_the_undisturbed_completions_are_completed() -> None:
    assert judge(EXPECTED, output(*EXPECTED)) == Outcome(COMPLETED, tokens=5)


@pytest.mark.parametrize(
    ("other", "detail"),
    [
        (CompletionOutput(1, "ab", [1, 7], "stop", stop_reason=2), "sample 1: token 1 is 7, not 2"),
        (CompletionOutput(1, "ab", [1], "stop", stop_reason=2), "sample 1: 1 tokens, not 2"),
        (CompletionOutput(1, "ab", [1, 2, 2], "stop", stop_reason=2), "sample 1: 3 tokens, not 2"),
        (CompletionOutput(1, "ab", [1, 2], "length"), "sample 1: finish_reason='length', not 'stop'"),
        (CompletionOutput(1, "ab", [1, 2], "stop", stop_reason=5), "sample 1: stop_reason=5, not 2"),
        (CompletionOutput(1, "a", [1, 2], "stop", stop_reason=2), "sample 1: text='a', not 'ab'"),
    ],
)
def test_what_is_not_the_same_in_every_sample_differs(other: CompletionOutput, detail: str) -> None:
    assert judge(EXPECTED, output(EXPECTED[0], other)) == Outcome(
        COMPLETED, True, len(EXPECTED[0].token_ids) + len(other.token_ids), detail
    )


def test_a_sample_that_is_missing_differs() -> None:
    found = judge(EXPECTED, output(EXPECTED[0]))
    assert found.differs and found.detail == "1 samples, not 2"


@pytest.mark.parametrize("reason", ["abort", None])  # None: its client left before it was told of the end
def test_an_aborted_request_is_the_beginning_of_the_undisturbed_one(reason: str | None) -> None:
    beginning = output(cut(0, 1, 2, reason=reason), EXPECTED[1])
    assert judge(EXPECTED, beginning, may_abort=True) == Outcome(ABORTED, tokens=4)
    other = judge(EXPECTED, output(cut(0, 1, 3, reason=reason), EXPECTED[1]), may_abort=True)
    assert other.how == ABORTED and other.differs
    longer = judge(EXPECTED, output(cut(0, 1, 2, 3, 4, reason=reason), EXPECTED[1]), may_abort=True)
    assert longer.differs


def test_an_abort_may_come_too_late_or_before_the_first_token() -> None:
    assert judge(EXPECTED, output(*EXPECTED), may_abort=True) == Outcome(COMPLETED, tokens=5)
    assert judge(EXPECTED, None, may_abort=True).how == ABORTED


def test_an_abort_that_nobody_asked_for_is_a_loss() -> None:
    assert judge(EXPECTED, output(cut(0, 1), cut(1, 1))).how == LOST


def test_a_timeout_is_the_beginning_of_the_undisturbed_one_where_there_was_one_to_pass() -> None:
    ended = output(cut(0, 1), cut(1), error="timeout_s=0.5 has passed; raise it, or expect fewer tokens")
    assert judge(EXPECTED, ended, may_time_out=True) == Outcome(TIMED_OUT, tokens=1)
    assert judge(EXPECTED, ended).how == LOST
    other = output(cut(0, 5), cut(1), error="timeout_s=0.5 has passed")
    assert judge(EXPECTED, other, may_time_out=True).differs


@pytest.mark.parametrize("timeout", [False, True])
def test_an_error_of_the_engine_is_a_loss_whatever_the_tokens_so_far(timeout: bool) -> None:
    ended = output(*EXPECTED, error="the engine has stopped: rank 1 died")
    assert judge(EXPECTED, ended, may_time_out=timeout) == Outcome(LOST, tokens=5, detail="the engine has stopped: rank 1 died")
    raised = judge(EXPECTED, None, "EngineError: gone", may_abort=True, may_time_out=timeout)
    assert raised == Outcome(LOST, detail="EngineError: gone")
    assert judge(EXPECTED, None).how == LOST
