"""A step that is planned before the last one's result is in computes what it would have computed after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distributed_sparse import SamplingParams
from distributed_sparse.driver import driver
from distributed_sparse.outputs import RequestOutput
from distributed_sparse.protocol.step import StepPlan
from tests.support.engine import make_llm
from tests.support.stepped_engine import SteppedEngine
from tests.support.text_checkpoint import text_checkpoint

PROMPT = [1, 40, 77, 200, 301, 12, 99, 310, 45, 46, 150, 7, 8, 219, 33, 71, 290, 5, 111]
QUEST = {"method": "quest", "token_budget": 32, "recent_pages": 1, "dense_layers": 1}
ENGINE: dict[str, Any] = {
    "max_model_len": 128,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 24,
    "device": "cpu",
    "page_size": 16,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_checkpoint(tmp_path_factory.mktemp("async"))


def params_of_every_kind(stop_token: int, stop: str) -> list[dict[str, Any]]:
    return [
        {"temperature": 0.0, "max_tokens": 30, "ignore_eos": True},
        {"temperature": 0.0, "max_tokens": 1},
        {"temperature": 0.0, "max_tokens": 25, "stop_token_ids": [stop_token]},
        {"temperature": 0.0, "max_tokens": 25, "stop_token_ids": [stop_token], "min_tokens": 20},
        {"temperature": 0.0, "max_tokens": 25, "stop": [stop]},
        {"temperature": 1.0, "n": 3, "seed": 5, "max_tokens": 17, "logprobs": 2, "stop_token_ids": [stop_token]},
        {"temperature": 0.8, "top_p": 0.9, "seed": 9, "max_tokens": 20, "prompt_logprobs": 1, "logprobs": 0},
        {"temperature": 0.0, "max_tokens": 9, "decode_last_prompt_tokens": 6, "prompt_logprobs": 0},
        {"temperature": 1.0, "n": 2, "seed": 3, "max_tokens": 1},
    ]  # fmt: skip


def content(output: RequestOutput) -> Any:
    return [(c.index, c.text, c.token_ids, c.finish_reason, c.stop_reason) for c in output.outputs]


def logprobs(output: RequestOutput) -> list[dict[int, float]]:
    """At each position: of the prompt, then of each sample. To the last bit they depend on which rows share a step."""
    positions = [*(output.prompt_logprobs or ())]
    for completion in output.outputs:
        positions += completion.logprobs or ()
    return [{token: entry.logprob for token, entry in (position or {}).items()} for position in positions]


def test_outputs_are_the_same_with_and_without_it(checkpoint: Path) -> None:
    """With one prompt more than the batch has room for, so that slots and pages change hands while steps are in flight."""
    prompts = [PROMPT[: 5 + i] + PROMPT for i in range(9)]

    def run(async_scheduling: bool) -> tuple[list[RequestOutput], dict[str, Any]]:
        with make_llm(checkpoint, 2, sparse=QUEST, async_scheduling=async_scheduling, **ENGINE) as llm:
            (free,) = llm.generate(
                [prompts[2]], SamplingParams(temperature=0.0, max_tokens=25, ignore_eos=True), use_tqdm=False
            )
            token = free.outputs[0].token_ids[6]
            text = llm.generate([prompts[4]], SamplingParams(temperature=0.0, max_tokens=25), use_tqdm=False)[0].outputs[0].text
            kinds = [SamplingParams(**kind) for kind in params_of_every_kind(token, text[8:11])]
            outputs = llm.generate(prompts, kinds, use_tqdm=False)
            again = llm.generate(prompts, kinds, use_tqdm=False)
            assert [content(output) for output in again] == [content(output) for output in outputs]
            return outputs, llm.stats()

    plain, stats = run(False)
    ahead, stats_ahead = run(True)
    assert [content(output) for output in ahead] == [content(output) for output in plain]
    for one, other in zip(ahead, plain):
        assert len(logprobs(one)) == len(logprobs(other))
        for position, expected in zip(logprobs(one), logprobs(other)):
            assert position == pytest.approx(expected, abs=1e-4)
    assert {completion.finish_reason for output in plain for completion in output.outputs} == {"stop", "length"}
    assert stats_ahead["pages"] | {"total": 0} == {"total": 0, "used": 0, "reserved": 0}
    assert stats_ahead["requests"] == stats["requests"]


def stepped(checkpoint: Path, **engine_args: Any) -> SteppedEngine:
    return SteppedEngine(checkpoint, queues_plans=True, **{**ENGINE, **engine_args})


def rows_computed(engine: SteppedEngine) -> list[int]:
    return [row.position for plan in engine.group.plans for row in plan.decode]


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_max_tokens_costs_no_step_more(checkpoint: Path, max_tokens: int) -> None:
    with stepped(checkpoint) as engine:
        output = engine.add(PROMPT, temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        engine.finish()
        assert len(output.outputs[0].token_ids) == max_tokens
        assert rows_computed(engine) == list(range(len(PROMPT), len(PROMPT) + max_tokens - 1))
        assert engine.driver.stats()["steps"] == max_tokens


def test_a_stop_is_found_one_step_late_and_its_extra_token_is_dropped(checkpoint: Path) -> None:
    with stepped(checkpoint) as engine:
        free = engine.add(PROMPT, temperature=0.0, max_tokens=12, ignore_eos=True)
        engine.finish()
        tokens = free.outputs[0].token_ids
        place = next(i for i in range(3, 12) if tokens[i] not in tokens[:i])
        engine.group.plans.clear()
        engine.group._sent = 0
        before = engine.driver.stats()["steps"]
        output = engine.add(PROMPT, temperature=0.0, max_tokens=12, stop_token_ids=[tokens[place]], logprobs=1)
        engine.finish()
        (completion,) = output.outputs
        assert completion.token_ids == tokens[: place + 1] and completion.finish_reason == "stop"
        assert completion.logprobs is not None and len(completion.logprobs) == place + 1
        assert output.metrics is not None and output.metrics.num_output_tokens == place + 1
        assert rows_computed(engine) == list(range(len(PROMPT), len(PROMPT) + place + 1)), "one row beyond the stop"
        assert engine.driver.stats()["steps"] == before + place + 2
        assert (engine.driver.allocator.used, engine.driver.allocator.reserved) == (0, 0)


def test_a_plan_is_sent_before_the_last_result_is_taken_in(checkpoint: Path) -> None:
    with stepped(checkpoint) as engine:
        output = engine.add(PROMPT[:8], temperature=0.0, max_tokens=6, ignore_eos=True)
        engine.step()
        assert len(engine.group.plans) == 1
        assert not any(completion.token_ids for completion in output.outputs)
        for number in range(1, 6):
            engine.step()
            assert len(engine.group.plans) == number + 1
            assert len(output.outputs[0].token_ids) == number, "the result of the plan before"
            (row,) = engine.group.plans[-1].decode
            assert row.token is None, "its input is what the shard has sampled, which the driver does not know"
        engine.step()
        assert len(engine.group.plans) == 6 and len(output.outputs[0].token_ids) == 6


def test_without_it_every_result_is_taken_in_before_the_next_plan(checkpoint: Path) -> None:
    with stepped(checkpoint, async_scheduling=False) as engine:
        output = engine.add(PROMPT[:8], temperature=0.0, max_tokens=4, ignore_eos=True)
        for number in range(1, 5):
            engine.step()
            assert (len(engine.group.plans), len(output.outputs[0].token_ids)) == (number, number)


@pytest.mark.parametrize("steps", range(1, 8))
def test_an_abort_with_steps_in_flight_disturbs_nobody(checkpoint: Path, steps: int) -> None:
    """Its slot and its pages go to the next request while a step that still writes to them is under way."""
    with stepped(checkpoint, max_num_seqs=2, sparse=QUEST) as engine:
        alone = engine.add(PROMPT[3:], temperature=0.0, max_tokens=20, ignore_eos=True)
        engine.finish()
        stays = engine.add(PROMPT[3:], temperature=0.0, max_tokens=20, ignore_eos=True)
        aborted = engine.add(PROMPT, temperature=0.0, max_tokens=40, ignore_eos=True)
        for _ in range(steps):
            engine.step()
        engine.abort(aborted)
        follows = engine.add(PROMPT[3:], temperature=0.0, max_tokens=20, ignore_eos=True)
        engine.finish()
        assert stays.outputs[0].token_ids == follows.outputs[0].token_ids == alone.outputs[0].token_ids
        assert (engine.driver.allocator.used, engine.driver.allocator.reserved) == (0, 0)


def test_a_large_plan_waits_until_nothing_is_in_flight(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that computes does not read: to send it more than its socket holds would block the driver."""
    prompts = [PROMPT + PROMPT[:i] for i in range(4)]
    with stepped(checkpoint) as engine:
        expected = [engine.add(prompt, temperature=0.0, max_tokens=8, ignore_eos=True) for prompt in prompts]
        engine.finish()
    monkeypatch.setattr(driver, "MAX_AHEAD_NUMBERS", 12)
    with stepped(checkpoint) as engine:
        send, large = engine.group.send, []

        def watched(plan: StepPlan) -> None:
            if plan.num_ids > 12:
                large.append(plan.step)
                assert not engine.driver.in_flight
            send(plan)

        monkeypatch.setattr(engine.group, "send", watched)
        outputs = [engine.add(prompt, temperature=0.0, max_tokens=8, ignore_eos=True) for prompt in prompts]
        engine.finish()
        assert [content(output) for output in outputs] == [content(output) for output in expected]
        assert len(large) >= 3
        assert [plan.step for plan in engine.group.plans] == list(range(len(engine.group.plans)))
        assert any(plan.num_ids <= 12 for plan in engine.group.plans)
