"""The engine on the recall model: query-aware methods answer what a window cannot, whole and split over ranks."""

import numpy as np
import pytest

from distributed_sparse import SamplingParams
from distributed_sparse.tools.evaluation.recall import make_majority_prompts, make_prompts, make_quiz, score_quiz
from distributed_sparse.tools.evaluation.recall_model import save_recall_checkpoint
from tests.support.engine import make_llm
from tests.support.grids import corners
from tests.support.recall_score import score

ENGINE = {"device": "cpu", "max_model_len": 4200, "max_num_seqs": 4, "kv_cache_memory_bytes": 128 << 20}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("recall")
    save_recall_checkpoint(directory)
    return directory


def ask(llm, quiz):
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, decode_last_prompt_tokens=quiz.num_quiz_tokens)
    (output,) = llm.generate(quiz.token_ids, params, use_tqdm=False)
    return score_quiz(quiz, output.prompt_logprobs).accuracy


@pytest.mark.parametrize(
    ("sparse", "least", "most"),
    [
        pytest.param({"method": "dense"}, 1.0, 1.0, marks=pytest.mark.slow),
        ({"method": "quest", "token_budget": 128}, 0.95, 1.0),
        pytest.param({"method": "quest", "token_budget": 48, "recent_pages": 1}, 0.0, 0.8, marks=pytest.mark.slow),
        pytest.param({"method": "twilight", "p": 0.95}, 0.95, 1.0, marks=pytest.mark.slow),
        pytest.param({"method": "vattention", "epsilon": 0.1, "delta": 0.1}, 0.95, 1.0, marks=pytest.mark.slow),
        pytest.param({"method": "window", "token_budget": 256}, 0.0, 0.2, marks=pytest.mark.slow),
    ],
)
def test_40_one_hop_questions_at_4k(checkpoint, sparse, least, most):
    quiz = make_quiz(num_facts=256, context_length=4096, num_queries=40, seed=1)
    with make_llm(checkpoint, sparse=sparse, **ENGINE) as llm:
        assert least <= ask(llm, quiz) <= most
        attention = llm.stats()["attention"]
    print(f"{sparse}: density of the layers that select {np.mean(attention['density'][2:]):.3f}")
    assert (attention["rows_sparse"] > 0) == (sparse["method"] != "dense")


def majority(checkpoint, sparse):
    """(share of majority questions answered, mean tokens that a row of the selecting layers attended)."""
    prompts = make_majority_prompts(4096, 3, 96, 0.4, 1)
    params = SamplingParams(temperature=0.0, max_tokens=1, decode_last_prompt_tokens=1)
    with make_llm(checkpoint, sparse=sparse, **ENGINE) as llm:
        outputs = llm.generate([prompt.token_ids for prompt in prompts], params, use_tqdm=False)
        density = np.mean(llm.stats()["attention"]["density"][2:])
    return score(prompts, [output.outputs[0].token_ids for output in outputs]).accuracy, density * 4096


@pytest.mark.parametrize("method", corners(["twilight", "vattention"], kept=("vattention",)))
@pytest.mark.slow
def test_the_adaptive_methods_count_mentions_and_say_what_they_gain_over_quest(checkpoint, method):
    """96 mentions lie all over the text: here a budget must fit the question. A loss at equal density is printed as one."""
    found, attended = majority(checkpoint, {"method": method})
    budget = 16 * max(2, -(-int(attended) // 16))
    quest, _ = majority(checkpoint, {"method": "quest", "token_budget": budget})
    gain = f"{found - quest:+.2f} ({'a loss' if found < quest else 'no loss'})"
    print(f"majority of 96 mentions at 4K: {method} {found:.2f}, quest {budget} {quest:.2f}: gain {gain}")
    assert found >= 0.6 and attended < 4096


@pytest.mark.parametrize("tensor_parallel_size", corners([2, 4], kept=(4,)))
@pytest.mark.slow
def test_quest_answers_over_ranks_too(checkpoint, tensor_parallel_size):
    one_hop = make_prompts(num_facts=96, context_length=1200, num_queries=4, seed=1, answer_length=4)
    two_hops = make_prompts(num_facts=96, context_length=1200, num_queries=4, hops=2, seed=2)
    params = SamplingParams(temperature=0.0, max_tokens=4, decode_last_prompt_tokens=2)
    with make_llm(checkpoint, tensor_parallel_size, sparse={"method": "quest", "token_budget": 128}, **ENGINE) as llm:
        outputs = llm.generate([prompt.token_ids for prompt in (*one_hop, *two_hops)], params, use_tqdm=False)
    token_ids = [output.outputs[0].token_ids for output in outputs]
    assert score(one_hop, token_ids[:4]).accuracy >= 0.9
    assert score(two_hops, token_ids[4:]).accuracy == 1.0


@pytest.mark.slow
def test_bfloat16_answers(checkpoint):
    quiz = make_quiz(num_facts=96, context_length=1200, num_queries=10, hops=2, seed=3)
    with make_llm(checkpoint, sparse={"method": "quest", "token_budget": 128}, dtype="bfloat16", **ENGINE) as llm:
        assert ask(llm, quiz) >= 0.9
