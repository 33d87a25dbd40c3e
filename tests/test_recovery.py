"""A shard dies, hangs or raises at any moment, and nobody who reads outputs can tell: equal tokens, none lost, none twice."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from distributed_sparse import SamplingParams
from distributed_sparse.client.client import EngineError
from distributed_sparse.outputs import CompletionOutput, Logprob, RequestOutput
from distributed_sparse.trace import TraceStep
from tests.support.checkpoints import tiny_checkpoint
from tests.support.engine import GroupLLM, InProcessLLM, ProcessLLM
from tests.support.faulty_shard import Fault, Faults
from tests.support.grids import corners
from tests.support.methods import METHODS, sparse_settings
from tests.support.process_group import ProcessShardGroup, open_ports
from tests.support.promise_b import count_ties
from tests.support.prompts import random_tokens
from tests.support.text_checkpoint import byte_level_bos_tokenizer

VOCAB_SIZE = 331
QUEST = {"method": "quest", "token_budget": 48, "recent_pages": 1, "dense_layers": 1}
MANY = 1000
"""Rebuilds that an engine of several tests is allowed."""
LONG_ENOUGH_S = 30.0


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tokenizer; values have a mean, else vAttention finds no sample of them that is small enough to be drawn."""
    path = tiny_checkpoint(tmp_path_factory.mktemp("qwen2"), "qwen2", max_position_embeddings=2048)
    weights = load_file(path / "model.safetensors")
    scaled = {name: 5.0 * tensor if name.endswith("v_proj.bias") else tensor for name, tensor in weights.items()}
    save_file(scaled, path / "model.safetensors", metadata={"format": "pt"})
    byte_level_bos_tokenizer().save_pretrained(path)
    return path


@dataclass(frozen=True)
class Engine:
    """An LLM whose shards fail when they are told to."""

    llm: GroupLLM
    faults: Faults

    @property
    def stats(self) -> dict[str, Any]:
        return self.llm.stats()

    @property
    def pids(self) -> list[int]:
        return [rank["pid"] for rank in self.stats["ranks"]]

    def generate(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
        return self.llm.generate(prompts, params, use_tqdm=False)

    def arm(self, *faults: Fault) -> None:
        self.faults.arm(*faults, generation=self.stats["generation"])

    @contextmanager
    def disturbed_by(self, *faults: Fault, recoveries: int = 1) -> Iterator[None]:
        """In the block every fault happens where it is meant to, and is recovered from; nothing is held after it."""
        before = self.stats["recoveries"]
        self.arm(*faults)
        yield
        assert self.faults.num_armed == 0, "not every fault has happened"
        self.assert_idle(before + recoveries)

    def assert_idle(self, recoveries: int) -> None:
        stats = self.stats
        assert stats["recoveries"] == recoveries, stats["recovery_log"]
        assert stats["pages"]["used"] == stats["pages"]["reserved"] == 0
        assert stats["requests"]["running"] == stats["requests"]["waiting"] == 0
        assert self.llm.health()


NewEngine = Callable[..., Engine]


@pytest.fixture(scope="module")
def new_engine(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NewEngine]:
    """new_engine(*faults, ranks=2, **engine_args): with `faults` armed from its start on."""
    made: list[Engine] = []

    def engine(*faults: Fault, ranks: int = 2, **engine_args: Any) -> Engine:
        own = Faults(tmp_path_factory.mktemp("faults"))
        own.arm(*faults)
        settings: dict[str, Any] = {
            "tensor_parallel_size": ranks,
            "device": "cpu",
            "max_num_seqs": 8,
            "max_num_batched_tokens": 40,
            "max_model_len": 256,
            "kv_cache_memory_bytes": 4_000_000,
            "max_rebuilds": MANY,
            **engine_args,
        }
        if ranks > 1:
            made.append(Engine(ProcessLLM(str(path), own, own.run, **settings), own))
        else:
            made.append(Engine(InProcessLLM(str(path), own, **settings), own))
        return made[-1]

    yield engine
    for one in made:
        one.llm.shutdown()


@pytest.fixture(scope="module")
def engine(new_engine: NewEngine) -> Engine:
    """Quest on two ranks; shared."""
    return new_engine(sparse=QUEST)


@pytest.fixture(scope="module")
def single(new_engine: NewEngine) -> Engine:
    """The same on one rank in this process; shared."""
    return new_engine(ranks=1, sparse=QUEST)


def assert_equal(expected: list[RequestOutput], found: list[RequestOutput], params: list[SamplingParams]) -> None:
    """Token for token: on this model there is no tie to excuse a difference."""
    assert count_ties(expected, found, params) == 0
    for one, other in zip(expected, found, strict=True):
        assert [ending(completion) for completion in one.outputs] == [ending(completion) for completion in other.outputs]


def ending(completion: CompletionOutput) -> tuple[str, str | None, Any]:
    return completion.text, completion.finish_reason, completion.stop_reason


def with_vocabulary(params: list[SamplingParams]) -> list[SamplingParams]:
    return [replace(own, logprobs=VOCAB_SIZE) for own in params]


# ---- every moment


PROMPTS = [random_tokens(length, seed=length) for length in (70, 45, 20)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
IN_PREFILL: dict[str, Any] = {"part": "prefill", "position": 42}
"""The second chunk of the first prompt; the second prompt's first chunk is in the same step."""
IN_DECODE: dict[str, Any] = {"part": "decode", "position": 77}
"""Of the first prompt; the other requests decode, too."""


@dataclass(frozen=True)
class Undisturbed:
    """What a batch answers if nothing happens."""

    params: list[SamplingParams]
    outputs: list[RequestOutput]


@pytest.fixture(scope="module")
def undisturbed(engine: Engine) -> Undisturbed:
    """Greedy, seeded with two samples, and greedy up to a stop string."""
    seeded = SamplingParams(temperature=0.9, top_p=0.95, n=2, seed=7, max_tokens=10, ignore_eos=True)
    (free,) = engine.generate([PROMPTS[2]], [GREEDY])
    stopped = replace(GREEDY, stop=[free.outputs[0].text[-4:-1]])
    params = [GREEDY, seeded, stopped]
    outputs = engine.generate(PROMPTS, with_vocabulary(params))
    assert outputs[2].outputs[0].finish_reason == "stop" and len(outputs[2].outputs[0].token_ids) > 6
    return Undisturbed(params, outputs)


MOMENTS = list(itertools.product(["before", "collective", "after"], ["kill", "raise", "memory", "exit"], [0, 1], [True, False]))
AT_THE_EDGE: dict[str, dict[str, Any]] = {
    "first chunk": {"part": "prefill", "position": 0},
    "first token": {"part": "prefill", "position": 69},
    "fork": {"part": "prefill", "position": 44},
    "last token": {"part": "decode", "position": 80},
}
"""Steps of the first prompt, and of the second, whose samples fork."""

DEFAULT = {
    ("before", "kill", 0, True),
    ("collective", "raise", 1, True),
    ("before", "raise", 0, False),
    ("collective", "kill", 1, False),
}
"""Every moment in prefill and in decode, and every kind; the others are slow."""


@pytest.mark.parametrize(
    ("moment", "kind", "rank", "prefill"),
    corners(MOMENTS, kept=DEFAULT),
)
def test_a_rank_that_fails_in_a_step_costs_no_token(
    engine: Engine, undisturbed: Undisturbed, moment: str, kind: str, rank: int, prefill: bool
) -> None:
    where = IN_PREFILL if prefill else IN_DECODE
    before = engine.pids
    with engine.disturbed_by(Fault(rank, kind, moment, **where)):
        found = engine.generate(PROMPTS, undisturbed.params)
    assert_equal(undisturbed.outputs, found, undisturbed.params)
    record = engine.stats["recovery_log"][-1]
    assert record["ranks"] == (rank,) and record["attempts"] == 1 and record["detect_s"] < 1.0
    assert {"kill": "SIGKILL", "raise": "illegal address", "memory": "no room", "exit": "exit code 0"}[kind] in record["cause"]
    assert [one != other for one, other in zip(before, engine.pids)] == [other == rank for other in range(2)], (
        "who was replaced"
    )


@pytest.mark.parametrize("edge", AT_THE_EDGE)
def test_a_step_that_is_lost_at_an_edge_is_taken_again(single: Engine, undisturbed: Undisturbed, edge: str) -> None:
    """It had been computed, but nobody knew of it: a first token, a fork, a request's end."""
    with single.disturbed_by(Fault(0, "raise", "after", **AT_THE_EDGE[edge])):
        found = single.generate(PROMPTS, undisturbed.params)
    assert_equal(undisturbed.outputs, found, undisturbed.params)


@pytest.mark.slow
def test_ranks_that_die_together_cost_no_token(engine: Engine, undisturbed: Undisturbed) -> None:
    with engine.disturbed_by(Fault(0, "kill", "before", **IN_DECODE), Fault(1, "kill", "before", **IN_DECODE)):
        found = engine.generate(PROMPTS, undisturbed.params)
    assert_equal(undisturbed.outputs, found, undisturbed.params)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_rank_that_dies_again_when_it_has_caught_up_costs_no_token(
    engine: Engine, undisturbed: Undisturbed, rank: int
) -> None:
    again = Fault(rank, "kill", "collective", part="decode", position=79, generation=1)
    with engine.disturbed_by(Fault(rank, "kill", "collective", **IN_DECODE), again, recoveries=2):
        found = engine.generate(PROMPTS, undisturbed.params)
    assert_equal(undisturbed.outputs, found, undisturbed.params)
    first, second = list(engine.stats["recovery_log"])[-2:]
    assert first["replay_s"] is not None and second["replay_s"] is not None


@pytest.mark.parametrize(
    ("rank", "where"),
    [
        pytest.param(0, {"part": "prefill", "position": 42}, marks=pytest.mark.slow),
        (1, {"part": "decode", "position": 74}),
    ],
    ids=["rank 0 in a prompt", "rank 1 in decode"],
)
@pytest.mark.slow
def test_a_rank_that_dies_during_a_replay_costs_no_token(
    engine: Engine, undisturbed: Undisturbed, rank: int, where: dict[str, Any]
) -> None:
    in_replay = Fault(rank, "kill", "collective", **where, generation=1)
    with engine.disturbed_by(Fault(1, "kill", "before", **IN_DECODE), in_replay, recoveries=2):
        found = engine.generate(PROMPTS, undisturbed.params)
    assert_equal(undisturbed.outputs, found, undisturbed.params)
    first, second = list(engine.stats["recovery_log"])[-2:]
    assert first["replay_s"] is None, "the second fault was not in the first one's replay"
    assert 0 < first["replayed_tokens"] < second["replayed_tokens"]


@pytest.mark.parametrize(
    ("rank", "moment"),
    [
        (0, "begin"),
        pytest.param(1, "allocate", marks=pytest.mark.slow),
        pytest.param(0, "load", marks=pytest.mark.slow),
        pytest.param(0, "allocate", marks=pytest.mark.slow),
        pytest.param(0, "warm up", marks=pytest.mark.slow),
        pytest.param(1, "warm up", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_a_rank_that_dies_while_another_or_itself_is_replaced_costs_no_token(
    engine: Engine, undisturbed: Undisturbed, rank: int, moment: str
) -> None:
    """Rank 0 is being replaced; rank 1 outlives it, and allocates and warms up with it."""
    with engine.disturbed_by(Fault(0, "kill", "collective", **IN_DECODE), Fault(rank, "kill", moment)):
        found = engine.generate(PROMPTS, undisturbed.params)
    assert_equal(undisturbed.outputs, found, undisturbed.params)
    assert engine.stats["recovery_log"][-1]["attempts"] == 2


@pytest.mark.slow
def test_a_rank_that_dies_while_the_other_is_being_loaded_costs_no_token(engine: Engine, undisturbed: Undisturbed) -> None:
    recoveries, before = engine.stats["recoveries"], engine.pids
    engine.arm(Fault(0, "kill", "before", **IN_DECODE), Fault(0, "hold", "load"))
    stream = iter(engine.llm.stream(PROMPTS[0], GREEDY))
    assert next(stream).outputs[0].token_ids != []
    wait_until(lambda: engine.faults.num_armed == 0, "a replacement that loads")
    os.kill(before[1], signal.SIGKILL)
    time.sleep(0.1)  # and rank 0 is still at it when the Driver finds out
    engine.faults.release()
    assert list(stream)[-1].outputs[0].token_ids == undisturbed.outputs[0].outputs[0].token_ids
    engine.assert_idle(recoveries + 1)
    assert set(before).isdisjoint(engine.pids)
    assert engine.stats["recovery_log"][-1]["attempts"] == 2


def test_a_rank_killed_while_the_engine_is_idle_is_replaced_before_anyone_asks(
    engine: Engine, undisturbed: Undisturbed
) -> None:
    recoveries = engine.stats["recoveries"]
    os.kill(engine.pids[1], signal.SIGKILL)
    wait_until(lambda: engine.stats["recoveries"] == recoveries + 1, "a recovery")
    found = engine.generate(PROMPTS, undisturbed.params)
    assert_equal(undisturbed.outputs, found, undisturbed.params)
    engine.assert_idle(recoveries + 1)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LONG_ENOUGH_S
    while not condition():
        assert time.monotonic() < deadline, f"there was never {what}"
        time.sleep(0.01)


# ---- ranks that hang


@pytest.fixture(scope="module")
def impatient(new_engine: NewEngine) -> Engine:
    """A step must be answered within seconds; shared by the tests of ranks that do not answer."""
    return new_engine(sparse=QUEST, step_timeout_s=2.5)


@pytest.mark.parametrize(
    ("kind", "moment", "where", "replaced"),
    [
        ("stop", "collective", IN_DECODE, [False, True]),
        pytest.param(
            "sleep",
            "collective",
            IN_PREFILL,
            [True, True],
            marks=pytest.mark.slow,
            # both ranks are alive, so neither can be told to be the cause
        ),
        pytest.param("stop", "before", IN_PREFILL, [False, True], marks=pytest.mark.slow),
        pytest.param("stop", "after", IN_DECODE, [False, True], marks=pytest.mark.slow),
        pytest.param("sleep", "before", IN_DECODE, [True, True], marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_hangs_in_a_step_costs_no_token(
    impatient: Engine, undisturbed: Undisturbed, kind: str, moment: str, where: dict[str, Any], replaced: list[bool]
) -> None:
    before = impatient.pids
    with impatient.disturbed_by(Fault(1, kind, moment, **where)):
        found = impatient.generate(PROMPTS, undisturbed.params)
    assert_equal(undisturbed.outputs, found, undisturbed.params)
    assert [one != other for one, other in zip(before, impatient.pids)] == replaced
    assert "step_timeout_s" in impatient.stats["recovery_log"][-1]["cause"]


@pytest.mark.slow
@pytest.mark.parametrize("where", [IN_PREFILL, IN_DECODE], ids=["prefill", "decode"])
def test_a_stopped_rank_falls_silent_and_is_replaced_without_any_deadline_of_the_user(
    engine: Engine, undisturbed: Undisturbed, where: dict[str, Any]
) -> None:
    with engine.disturbed_by(Fault(0, "stop", "collective", **where)):
        found = engine.generate(PROMPTS, undisturbed.params)
    assert_equal(undisturbed.outputs, found, undisturbed.params)
    record = engine.stats["recovery_log"][-1]  # of a kind of step that is well known, the deadline is as short as the silence
    assert record["ranks"] == (0,) and re.search("sent no heartbeat|did not answer step", record["cause"])


@pytest.mark.slow
def test_ranks_that_are_stopped_together_are_replaced(engine: Engine, undisturbed: Undisturbed) -> None:
    with engine.disturbed_by(*(Fault(rank, "stop", "before", **IN_DECODE) for rank in range(2))):
        found = engine.generate(PROMPTS, undisturbed.params)
    assert_equal(undisturbed.outputs, found, undisturbed.params)


@pytest.mark.slow
def test_a_rank_stopped_while_the_engine_is_idle_is_replaced(engine: Engine, undisturbed: Undisturbed) -> None:
    recoveries = engine.stats["recoveries"]
    os.kill(engine.pids[0], signal.SIGSTOP)
    wait_until(lambda: not engine.llm.health(), "an engine that is down")
    wait_until(engine.llm.health, "an engine that is up again")
    found = engine.generate(PROMPTS, undisturbed.params)
    assert_equal(undisturbed.outputs, found, undisturbed.params)
    engine.assert_idle(recoveries + 1)


@pytest.mark.slow
def test_a_replacement_that_is_stopped_while_it_loads_is_replaced(engine: Engine, undisturbed: Undisturbed) -> None:
    with engine.disturbed_by(Fault(1, "kill", "before", **IN_DECODE), Fault(1, "stop", "load")):
        found = engine.generate(PROMPTS, undisturbed.params)
    assert_equal(undisturbed.outputs, found, undisturbed.params)


@pytest.mark.slow
def test_of_four_ranks_the_three_that_live_on_keep_their_weights(new_engine: NewEngine, undisturbed: Undisturbed) -> None:
    """Two of them hear of it only from ranks that have left their collective already."""
    engine = new_engine(ranks=4, sparse=QUEST)
    before = engine.pids
    with engine.disturbed_by(Fault(2, "kill", "collective", **IN_DECODE)):
        found = engine.generate(PROMPTS, undisturbed.params)
    assert_equal(undisturbed.outputs, found, undisturbed.params)
    assert [one != other for one, other in zip(before, engine.pids)] == [False, False, True, False]
    engine.llm.shutdown()


def test_a_collective_that_breaks_off_though_nobody_died_replaces_nobody(engine: Engine, undisturbed: Undisturbed) -> None:
    before = engine.pids
    with engine.disturbed_by(Fault(1, "collective error", "collective", **IN_DECODE)):
        found = engine.generate(PROMPTS, undisturbed.params)
    assert_equal(undisturbed.outputs, found, undisturbed.params)
    assert engine.pids == before
    assert "Connection reset by peer" in engine.stats["recovery_log"][-1]["cause"]


# ---- every method


REPLAYED: dict[str, dict[str, Any] | None] = {
    **{method: sparse_settings(method) for method in ("dense", *METHODS) if method not in ("hash", "random", "oracle_topk")},
    "window, evicted": sparse_settings("window", dense_layers=0, evict=True),
}
"""What keeps something of the prompt or of its own draws; the rest has nothing that quest has not."""
KEEP_MOST = ("vattention",)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", corners(REPLAYED, kept=KEEP_MOST))
def test_a_replay_restores_what_a_method_has_kept(new_engine: NewEngine, method: str, rank: int) -> None:
    """The first prompt's end was decoded, and its first sample has ended: the other one leads the replay.

    Its chunks were of a whole step's budget; in the replay four sequences decode beside them.
    """
    long, budget = (1203, 400) if method == "vattention" else (150, 48)  # else nothing would be sampled
    engine = new_engine(
        sparse=REPLAYED[method],
        max_num_seqs=5,
        max_num_batched_tokens=budget,
        max_model_len=long + 106,
        kv_cache_memory_bytes=8_000_000,
    )
    prompts = [random_tokens(length, seed=length) for length in (long, 97, 64, 33)]
    greedy = SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True, seed=5)
    two = SamplingParams(temperature=0.9, n=2, seed=11, max_tokens=14, ignore_eos=True, decode_last_prompt_tokens=3)
    params = [two, greedy, replace(greedy, temperature=0.7), greedy]
    first, second = engine.generate(prompts, params)[0].outputs
    ends_first = next(token for token in first.token_ids[1:5] if token not in second.token_ids)
    params[0] = replace(two, stop_token_ids=[ends_first])
    expected = engine.generate(prompts, with_vocabulary(params))
    with engine.disturbed_by(Fault(rank, "kill", "collective", position=long + 7)):
        found = engine.generate(prompts, [replace(own, logprobs=0) for own in params])
    assert_equal(expected, found, params)
    for one, other in zip(expected, found):  # another random sample in the replay would hardly show in the tokens
        for completion, own in zip(one.outputs, other.outputs):
            assert own.cumulative_logprob == pytest.approx(completion.cumulative_logprob, abs=1e-4)
    assert found[0].outputs[0].finish_reason == "stop" and len(found[0].outputs[0].token_ids) < 6
    assert all(output.metrics is not None and output.metrics.num_replayed_tokens > 0 for output in found)
    assert (engine.stats["attention"]["rows_sparse"] > 0) == (method != "dense")
    engine.llm.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("method", [method for method in REPLAYED if method != "vattention"])
def test_random_requests_survive_random_faults(new_engine: NewEngine, method: str, ranks: int) -> None:
    """More requests than slots and pages, budgets that cut every chunk anew, and faults that hit replays of replays."""
    draw = random.Random(f"{method} {ranks}")
    for _ in range(3):
        engine = new_engine(
            ranks=ranks,
            sparse=REPLAYED[method],
            max_num_seqs=draw.randint(4, 6),
            max_num_batched_tokens=draw.choice([6, 17, 33, 64]),
            max_model_len=160,
            kv_cache_memory_bytes=draw.randint(42, 60) * 30_000 // ranks,  # all of four samples, but not of every request
        )
        prompts = [random_tokens(draw.randint(1, 110), seed=draw.randrange(1000)) for _ in range(draw.randint(2, 8))]
        params = [
            SamplingParams(
                temperature=draw.choice([0.0, 0.8]),
                n=draw.randint(1, 4),
                seed=seed,
                max_tokens=draw.randint(1, 40),
                ignore_eos=True,
                stop_token_ids=draw.sample(range(3, VOCAB_SIZE), 20),
                decode_last_prompt_tokens=draw.randrange(min(len(prompt), 5)),
            )
            for seed, prompt in enumerate(prompts)
        ]
        expected = engine.generate(prompts, with_vocabulary(params))
        steps = [step for output, own in zip(expected, params) for step in computed(output, own)]
        for _ in range(3):
            before, fired = engine.stats["recoveries"], engine.faults.num_fired
            engine.arm(*(random_fault(draw, ranks, steps, generation) for generation in range(3)))
            found = engine.generate(prompts, params)
            happened = engine.faults.num_fired - fired
            assert happened > 0
            engine.assert_idle(before + happened)
            engine.faults.disarm()  # later generations' faults, where the requests had ended by then
            assert_equal(expected, found, params)
        engine.llm.shutdown()


def computed(output: RequestOutput, params: SamplingParams) -> list[tuple[str, int]]:
    """(part, position) of every token of a request whose key and value were computed."""
    prompt, longest = len(output.prompt_token_ids), max(len(completion.token_ids) for completion in output.outputs)
    prefilled = prompt - params.decode_last_prompt_tokens
    return [("prefill" if position < prefilled else "decode", position) for position in range(prompt + longest - 1)]


def random_fault(draw: random.Random, ranks: int, steps: list[tuple[str, int]], generation: int) -> Fault:
    part, position = draw.choice(steps)
    return Fault(
        draw.randrange(ranks),
        draw.choice(["raise", "memory"] if ranks == 1 else ["raise", "kill"]),
        draw.choice(["before", "collective", "after"]),
        position,
        part,
        generation,
    )


# ---- what is published beside the tokens


@pytest.mark.slow
def test_log_probabilities_and_traces_are_neither_repeated_nor_missing(new_engine: NewEngine) -> None:
    engine = new_engine(sparse=QUEST, trace=True)
    prompts = [random_tokens(length, seed=length) for length in (110, 50)]
    told = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    params = [replace(told, decode_last_prompt_tokens=4), replace(told, temperature=0.8, n=2, seed=3)]
    expected = engine.generate(prompts, params)
    for part, position in (("prefill", 85), ("decode", 108), ("decode", 113)):
        with engine.disturbed_by(Fault(1, "kill", "collective", position, part)):
            found = engine.generate(prompts, params)
        for one, other in zip(expected, found, strict=True):
            assert_same_log_probabilities(one.prompt_logprobs, other.prompt_logprobs)
            for completion, own in zip(one.outputs, other.outputs, strict=True):
                assert own.token_ids == completion.token_ids
                assert_same_log_probabilities(completion.logprobs, own.logprobs)
                assert own.cumulative_logprob == pytest.approx(completion.cumulative_logprob, abs=1e-4)
                assert_same_trace(completion.trace, own.trace)
    scored = [random_tokens(length, seed=length) for length in (120, 61)]
    scores = engine.llm.score(scored, whole_vocabulary=True, decode_last_prompt_tokens=5)
    for part, position in (("prefill", 50), ("decode", 117)):
        with engine.disturbed_by(Fault(0, "kill", "after", position, part)):
            again = engine.llm.score(scored, whole_vocabulary=True, decode_last_prompt_tokens=5)
        for score, own_score in zip(scores, again, strict=True):
            assert own_score.logprobs is not None and score.logprobs is not None
            np.testing.assert_allclose(own_score.logprobs, score.logprobs, atol=1e-3)
            np.testing.assert_allclose(own_score.token_logprobs, score.token_logprobs, atol=1e-3)
            assert_same_trace(score.trace, own_score.trace)
    engine.llm.shutdown()


Row = dict[int, Logprob] | None


def assert_same_log_probabilities(expected: Sequence[Row] | None, found: Sequence[Row] | None) -> None:
    assert expected is not None and found is not None and len(expected) == len(found)
    for row, other in zip(expected, found):
        assert (row is None) == (other is None)
        if row is not None and other is not None:
            assert list(row) == list(other)
            np.testing.assert_allclose(
                [one.logprob for one in row.values()], [one.logprob for one in other.values()], atol=1e-3
            )


def assert_same_trace(expected: list[TraceStep] | None, found: list[TraceStep] | None) -> None:
    assert expected is not None and found is not None
    assert [step.position for step in expected] == [step.position for step in found]
    for step, other in zip(expected, found):
        for layer, own in zip(step.layers, other.layers, strict=True):
            np.testing.assert_allclose(own.captured_mass, layer.captured_mass, atol=1e-3)
            for one, two in zip(layer.indices, own.indices, strict=True):
                np.testing.assert_array_equal(one, two)


def test_a_stream_goes_on_where_it_was(engine: Engine, undisturbed: Undisturbed) -> None:
    """A rank is killed when the client has had tokens; what it gets from then on is what it would have got."""
    prompt = "the quick brown fox jumps over the lazy dog"
    params = SamplingParams(temperature=0.9, seed=21, max_tokens=24, ignore_eos=True, n=2)
    whole = engine.llm.generate(prompt, params, use_tqdm=False)[0]
    recoveries, length = engine.stats["recoveries"], len(whole.prompt_token_ids)
    engine.arm(Fault(1, "hold", "before", position=length + 8))
    seen: list[RequestOutput] = []
    for output in engine.llm.stream(prompt, params):
        seen.append(output)
        if len(output.outputs[0].token_ids) == 9:  # the last before the step that is held
            wait_until(lambda: engine.faults.num_armed == 0, "a step that is held")
            os.kill(engine.llm.group.ranks[1].pid, signal.SIGKILL)
    for sample in range(2):
        counts = [len(output.outputs[sample].token_ids) for output in seen]
        assert counts == list(range(1, 25)), "one token more each time"
        for output in seen:
            tokens, text = output.outputs[sample].token_ids, output.outputs[sample].text
            assert tokens == whole.outputs[sample].token_ids[: len(tokens)]
            assert whole.outputs[sample].text.startswith(text)
        assert seen[-1].outputs[sample].text == whole.outputs[sample].text
    engine.assert_idle(recoveries + 1)


@pytest.fixture(scope="module")
def synchronous(new_engine: NewEngine) -> Engine:
    """Quest on two ranks, of which none has a plan before the last one's result is in; shared."""
    return new_engine(sparse=QUEST, async_scheduling=False)


@pytest.mark.parametrize("in_flight", [2, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_the_tokens_that_were_computed_twice_are_counted(
    engine: Engine, in_flight: int, request: pytest.FixtureRequest
) -> None:
    """To the token where one plan is in flight. Of two, the result of the step before the one that fails may still be under
    way: then it is not part of the history, and what it computed is not replayed."""
    if in_flight == 1:
        engine = request.getfixturevalue("synchronous")
    step, chunk = {1: (0, 0), 2: (1, 40)}[in_flight]
    with engine.disturbed_by(Fault(0, "raise", "before", position=70 + 5)):
        (once,) = engine.generate(PROMPTS[:1], [GREEDY])
    # the prompt and five outputs had been computed; the sixth was only sampled
    assert once.metrics is not None and once.metrics.num_replayed_tokens in {75, 75 - step}
    assert engine.stats["recovery_log"][-1]["replayed_tokens"] == once.metrics.num_replayed_tokens
    in_replay = Fault(1, "raise", "before", part="decode", position=72, generation=1)
    with engine.disturbed_by(Fault(0, "raise", "before", part="decode", position=75), in_replay, recoveries=2):
        (twice,) = engine.generate(PROMPTS[:1], [GREEDY])
    first, second = (record["replayed_tokens"] for record in list(engine.stats["recovery_log"])[-2:])
    assert first in {72, 72 - step} and second in {75, 75 - step}
    assert twice.metrics is not None and twice.metrics.num_replayed_tokens == first + second
    with engine.disturbed_by(Fault(0, "raise", "before", part="prefill", position=42)):
        (early,) = engine.generate(PROMPTS[:1], [GREEDY])
    assert early.metrics is not None and early.metrics.num_replayed_tokens in {40, 40 - chunk}  # one chunk


# ---- while the shards are being rebuilt


def test_while_the_shards_are_rebuilt_requests_come_go_and_expire(engine: Engine) -> None:
    llm, recoveries = engine.llm, engine.stats["recoveries"]
    long = replace(GREEDY, max_tokens=60)
    (whole,) = engine.generate(PROMPTS[:1], [long])
    assert llm.health()
    engine.arm(Fault(0, "kill", "before", position=len(PROMPTS[2]) + 5), Fault(0, "hold", "load"))
    goes_on = iter(llm.stream(PROMPTS[0], long))
    is_aborted = iter(llm.stream(PROMPTS[1], long, request_id="runs"))
    expires = iter(llm.stream(PROMPTS[2], replace(long, timeout_s=1.5)))
    for stream in (goes_on, is_aborted, expires):
        assert next(stream).outputs[0].token_ids != []
    wait_until(lambda: engine.faults.num_armed == 0, "a replacement that loads")
    assert not llm.health()
    late, never = llm.stream(PROMPTS[0], long), llm.stream(PROMPTS[0], long, request_id="waits")
    stats = engine.stats
    assert (stats["requests"]["running"], stats["requests"]["waiting"]) == (3, 2)
    llm.abort(["runs", "waits"])
    (nothing,) = list(never)
    assert (nothing.outputs[0].finish_reason, nothing.outputs[0].token_ids) == ("abort", [])
    aborted = list(is_aborted)[-1].outputs[0]
    assert aborted.finish_reason == "abort" and aborted.token_ids != []
    expired = list(expires)[-1]
    assert "timeout_s=1.5" in str(expired.error) and expired.outputs[0].token_ids != []
    after = engine.stats
    assert not llm.health() and after["recoveries"] == recoveries, "all this was to happen during the rebuild"
    assert (after["requests"]["running"], after["requests"]["waiting"]) == (1, 1)
    assert after["pages"]["reserved"] < stats["pages"]["reserved"] and after["pages"]["used"] < stats["pages"]["used"]
    engine.faults.release()
    for stream in (goes_on, iter(late)):
        assert list(stream)[-1].outputs[0].token_ids == whole.outputs[0].token_ids
    engine.assert_idle(recoveries + 1)


def test_an_engine_that_is_shut_down_while_it_rebuilds_leaves_nothing_behind(new_engine: NewEngine) -> None:
    engine = new_engine()
    engine.arm(Fault(1, "kill", "before", **IN_DECODE), Fault(1, "hold", "load"))
    stream = iter(engine.llm.stream(PROMPTS[0], GREEDY))
    assert next(stream).outputs[0].token_ids != []
    wait_until(lambda: engine.faults.num_armed == 0, "a replacement that loads")
    began = time.monotonic()
    engine.llm.shutdown()
    assert time.monotonic() - began < 5.0
    with pytest.raises(EngineError, match="shut down"):
        list(stream)
    assert nothing_is_left(engine.llm)


def nothing_is_left(llm: GroupLLM) -> bool:
    """No process of the engine, not of those that were replaced either, and no port."""
    group = llm.group
    assert isinstance(group, ProcessShardGroup) and len(group.former) > 0
    alive = any(process.is_alive() for process in (*group.processes, *group.former))
    return not alive and open_ports().isdisjoint(group.ports)


# ---- where it ends


def test_shards_that_fail_too_often_end_every_request_with_the_cause_and_its_tokens(new_engine: NewEngine) -> None:
    engine = new_engine(max_rebuilds=1)
    expected = engine.generate(PROMPTS, [GREEDY] * 3)
    again = Fault(1, "memory", "before", part="decode", position=80, generation=1)
    engine.arm(Fault(0, "kill", "collective", **IN_DECODE), again)
    found = engine.generate(PROMPTS, [GREEDY] * 3)
    assert engine.faults.num_armed == 0
    for whole, output in zip(expected, found):
        (own,) = output.outputs
        assert "no room for the activations" in str(output.error) and "max_rebuilds=1" in str(output.error)
        assert own.finish_reason == "error" and own.token_ids == whole.outputs[0].token_ids[: len(own.token_ids)]
    # the result of the step before the failing one may be on its way when a rank fails
    assert len(found[0].outputs[0].token_ids) in (80 - 70, 80 - 70 + 1), "the tokens so far"
    with pytest.raises(EngineError, match="max_rebuilds=1"):
        engine.llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    assert not engine.llm.health()
    stats = engine.stats
    assert stats["recoveries"] == 1 and stats["requests"]["failed"] == 4
    wait_until(lambda: nothing_is_left(engine.llm), "an end of the ranks, before anyone shuts the engine down")


def test_replacements_that_never_come_up_end_the_engine(new_engine: NewEngine) -> None:
    engine = new_engine(max_rebuilds=1)
    engine.arm(Fault(1, "kill", "before", **IN_DECODE), Fault(1, "raise", "load"))
    with pytest.raises(EngineError, match=r"illegal address.*\n?.*max_rebuilds=1"):
        engine.llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    assert not engine.llm.health() and engine.stats["recoveries"] == 0
    engine.llm.shutdown()
    assert nothing_is_left(engine.llm)


# ---- the first start


@pytest.mark.parametrize(
    "moment", ["load", pytest.param("begin", marks=pytest.mark.slow), pytest.param("warm up", marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_a_rank_that_dies_at_the_first_start_is_replaced(new_engine: NewEngine, undisturbed: Undisturbed, moment: str) -> None:
    engine = new_engine(Fault(1, "kill", moment), sparse=QUEST)
    assert engine.faults.num_armed == 0 and "SIGKILL" in engine.stats["recovery_log"][0]["cause"]
    assert_equal(undisturbed.outputs, engine.generate(PROMPTS, undisturbed.params), undisturbed.params)
    engine.assert_idle(1)
    engine.llm.shutdown()


def test_a_rank_that_says_why_it_cannot_start_is_reported_at_once(new_engine: NewEngine) -> None:
    before = set(multiprocessing.active_children())
    with pytest.raises(EngineError, match=r"rank 1.*failed: MemoryError: no room"):
        new_engine(Fault(1, "memory", "load"))
    assert set(multiprocessing.active_children()) == before


# ---- one rank


@pytest.mark.parametrize(("moment", "where"), [("before", IN_PREFILL), ("collective", IN_DECODE), ("after", IN_DECODE)])
def test_one_rank_in_this_process_recovers_too(
    single: Engine, undisturbed: Undisturbed, moment: str, where: dict[str, Any]
) -> None:
    with single.disturbed_by(Fault(0, "memory", moment, **where)):
        found = single.generate(PROMPTS, undisturbed.params)
    assert_equal(undisturbed.outputs, found, undisturbed.params)
    assert "(this process)" in single.stats["recovery_log"][-1]["cause"]


def test_one_rank_that_fails_in_its_own_replay_recovers_too(single: Engine, undisturbed: Undisturbed) -> None:
    again = Fault(0, "raise", "before", part="decode", position=74, generation=1)
    with single.disturbed_by(Fault(0, "memory", "before", **IN_DECODE), again, recoveries=2):
        found = single.generate(PROMPTS, undisturbed.params)
    assert_equal(undisturbed.outputs, found, undisturbed.params)
