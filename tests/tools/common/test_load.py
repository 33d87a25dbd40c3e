"""Requests go to the engine so many at a time, and their tokens are stamped when they arrive."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from distributed_sparse.client.client import EngineError
from distributed_sparse.llm import LLM
from distributed_sparse.protocol.client import RequestUpdate
from distributed_sparse.tools.common.load import Arrivals, send
from distributed_sparse.tools.common.margin import relative_margin
from distributed_sparse.tools.scaling.grid_workload import Workload
from distributed_sparse.tools.scaling.reference import disagreements, make_reference
from tests.support.checkpoints import tiny_checkpoint
from tests.support.engine import make_llm
from tests.support.patience import WAIT_S

LOAD = Workload(input_len=20, output_len=6, batch=2, num_prompts=5)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = tiny_checkpoint(tmp_path_factory.mktemp("model"))
    sparse = {"method": "quest", "token_budget": 32, "recent_pages": 1, "dense_layers": 0}
    with make_llm(path, max_num_seqs=4, max_model_len=64, kv_cache_memory_bytes=8 << 20, sparse=sparse) as opened:
        yield opened


def test_every_request_gets_its_tokens_in_order_and_no_more_are_in_flight_than_asked(llm: LLM) -> None:
    running, most = set(), 0

    def watch(number: int, update: RequestUpdate) -> None:
        nonlocal most
        running.discard(number) if update.finished else running.add(number)
        most = max(most, len(running))

    requests = LOAD.requests(0, 5, 331)
    times = send(llm, requests, 2, watch)
    expected = llm.generate([list(r.prompt_token_ids) for r in requests], [r.params for r in requests], use_tqdm=False)
    assert [one.token_ids for one in times] == [output.outputs[0].token_ids for output in expected]
    assert all(len(one.arrivals) == 6 and one.sent < one.arrivals[0] for one in times)
    assert all(one.arrivals == sorted(one.arrivals) for one in times)
    assert most == 2
    first_end = min(one.arrivals[-1] for one in times[:2])
    assert times[2].sent >= first_end  # the third is sent when one of the first two has ended


def test_an_update_is_stamped_when_it_arrives_not_when_it_is_read() -> None:
    arrivals = Arrivals()
    before = time.monotonic()
    arrivals.put(RequestUpdate("a"))
    after = time.monotonic()
    time.sleep(0.02)
    stamped, update = arrivals.next()
    assert before <= stamped <= after and update.request_id == "a"


def test_a_refused_request_is_an_error_and_the_others_are_aborted(llm: LLM) -> None:
    requests = [*LOAD.requests(0, 1, 331), *Workload(input_len=60, output_len=6).requests(0, 1, 331)]
    with pytest.raises(EngineError, match="max_model_len=64"):
        send(llm, requests, 2)
    deadline = time.monotonic() + WAIT_S
    while llm.stats()["requests"]["running"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert llm.stats()["pages"]["used"] == 0


def test_prompts_depend_on_seed_and_number_alone() -> None:
    again = Workload(input_len=20, output_len=3, batch=4, num_prompts=9)
    assert [r.prompt_token_ids for r in LOAD.requests(1, 2, 331)] == [r.prompt_token_ids for r in again.requests(1, 2, 331)]
    other = Workload(input_len=20, output_len=6, seed=1)
    assert other.requests(1, 1, 331)[0].prompt_token_ids != LOAD.requests(1, 1, 331)[0].prompt_token_ids
    assert len({r.params.seed for r in LOAD.requests(0, 5, 331)}) == 5


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_p": 0.9}])
def test_the_reference_generates_the_measured_tokens_and_knows_their_margins(llm: LLM, sampling: dict[str, float]) -> None:
    load = Workload(input_len=40, output_len=6, num_prompts=2, sampling=sampling)
    requests = load.requests(0, 2, 331)
    measured = send(llm, requests, 2)
    found = make_reference(llm, requests, 2, greedy=False)
    assert found["token_ids"] == [one.token_ids for one in measured]
    assert [len(margins) for margins in found["margins"]] == [6, 6]

    # the margins are those of the distributions that `score` gives for the same tokens
    import torch

    sequence = [*requests[1].prompt_token_ids, *found["token_ids"][1]]
    (scored,) = llm.score(sequence, whole_vocabulary=True, decode_last_prompt_tokens=6, seed=requests[1].params.seed)
    assert scored.logprobs is not None
    for step, margin in enumerate(found["margins"][1]):
        logits = torch.from_numpy(scored.logprobs[40 + step - 1].copy())
        assert relative_margin(logits, requests[1].params, 0, 40 + step) == pytest.approx(margin, abs=1e-4)


def test_an_engine_agrees_with_its_own_greedy_tokens_and_not_with_others(llm: LLM) -> None:
    requests = LOAD.requests(0, 2, 331)
    tokens = make_reference(llm, requests, 2, greedy=True)["token_ids"]
    assert disagreements(llm, requests, tokens) == []
    spoilt = [tokens[0], [*tokens[1][:5], (tokens[1][5] + 1) % 331]]
    assert disagreements(llm, requests, spoilt) == [(1, 5)]
    assert disagreements(llm, requests[:1], spoilt) == [] and disagreements(llm, requests, spoilt[:1]) == []
    first = [[(tokens[0][0] + 1) % 331, *tokens[0][1:]], tokens[1]]
    assert (0, 0) in disagreements(llm, requests, first)
