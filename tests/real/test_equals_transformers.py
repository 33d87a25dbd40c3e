"""On a real model and real text the engine computes what transformers computes, at one rank and at three."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from distributed_sparse import LLM, SamplingParams
from distributed_sparse.outputs import RequestOutput
from distributed_sparse.tools.common.margin import TIE, first_difference
from distributed_sparse.tools.evaluation.suite import EvaluatedModel
from distributed_sparse.tools.evaluation.suites.passkey import PasskeySuite
from tests.real.conftest import ROOT
from tests.support.engine import make_llm
from tests.support.hash_weights import random_hash_weights
from tests.support.transformers_reference import TOLERANCE, greedy_tokens

LONG = 4000
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, logprobs=20)
QUESTIONS = {
    "chat": "What is the capital of France, and which river runs through it?",
    "code": "Complete this function:\n```python\ndef is_prime(n: int) -> bool:\n    if n < 2:\n        return False\n",
    "chinese": "请用一句话介绍北京的历史。",
    "emoji": "Repeat these exactly: 👩‍👩‍👧‍👦 🇫🇷 e\u0301 ½ １９８４ 🙂‍↔️",
    "digits": "the quick fox saw 1984 dogs, 3.14159 cats and 1,000,000 mice. How many dogs?",
}


def prompts_of(llm: LLM) -> dict[str, list[int]]:
    """Chats, plain text, and a long prompt of this project's documentation."""
    tokenizer = llm.tokenizer
    found = {
        name: tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        for name, text in QUESTIONS.items()
    }
    text = "\n".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))])
    return found | {"long": tokenizer(text)["input_ids"][:LONG], "plain": tokenizer("Once upon a time, in 1984,")["input_ids"]}


@pytest.fixture(scope="module")
def answers(dense: LLM) -> dict[str, RequestOutput]:
    """One rank's, all prompts in one batch."""
    prompts = prompts_of(dense)
    return dict(zip(prompts, dense.generate(list(prompts.values()), GREEDY, use_tqdm=False)))


@pytest.fixture(scope="module")
def logits(answers: dict[str, RequestOutput], reference: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Of transformers, float32 [output tokens, V]: what each of one rank's tokens was chosen from."""
    found = {}
    for name, output in answers.items():
        ids = output.prompt_token_ids + output.outputs[0].token_ids
        kept = len(output.outputs[0].token_ids) + 1
        with torch.no_grad():
            found[name] = reference(torch.tensor([ids]), logits_to_keep=kept).logits[0, :-1].float()
    return found


def assert_equal(output: RequestOutput, logits: torch.Tensor) -> None:
    """Each token is transformers' most likely one, and the log-probabilities are its own.

    Greedy tokens are equal as long as each equals the best of a model that is given the same tokens before it.
    """
    assert output.error is None
    (completion,) = output.outputs
    assert completion.logprobs is not None and len(completion.token_ids) == len(logits)
    logprobs = logits.double().log_softmax(-1)
    for token, row, expected in zip(completion.token_ids, completion.logprobs, logprobs):
        spread = float(expected.std())
        assert float(expected.max() - expected[token]) < TIE * spread
        for other, found in row.items():
            assert abs(found.logprob - float(expected[other])) < TOLERANCE * spread


def test_tokens_and_logprobs_are_those_of_transformers(answers, logits) -> None:
    for name, output in answers.items():
        assert_equal(output, logits[name])
    assert "Paris" in answers["chat"].outputs[0].text


@pytest.mark.ray
@pytest.mark.slow
def test_three_ranks_over_ray_compute_the_same(local_ray, checkpoint, answers, logits) -> None:
    with LLM(str(checkpoint), tensor_parallel_size=3, device="cpu", max_num_seqs=8) as llm:
        outputs = llm.generate([output.prompt_token_ids for output in answers.values()], GREEDY, use_tqdm=False)
    for name, output in zip(answers, outputs):
        at = first_difference(answers[name].outputs[0].token_ids, output.outputs[0].token_ids)
        if at is None:
            assert_equal(output, logits[name])
        else:  # only where two tokens are equally likely
            best, second = logits[name][at].topk(2).values
            assert float(best - second) < TIE * float(logits[name][at].std()), name


def test_a_stream_says_what_the_whole_answer_says(dense, answers) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=24)
    for name in ("chat", "emoji", "chinese"):
        texts = [output.outputs[0].text for output in dense.stream(answers[name].prompt_token_ids, params)]
        assert texts[-1] == answers[name].outputs[0].text
        assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
        assert texts[-1] == dense.tokenizer.decode(answers[name].outputs[0].token_ids, skip_special_tokens=True)


COVERING: dict[str, dict[str, Any]] = {
    **{name: {"token_budget": 512} for name in ("quest", "window", "random", "oracle_topk", "hash", "tova")},
    "sketch": {"min_tokens": 512},
    "twilight": {"sink_pages": 32},
    "vattention": {"sink_tokens": 512},
}


@pytest.fixture(scope="module")
def text_ids(dense: LLM) -> list[int]:
    return prompts_of(dense)["long"][:400]


@pytest.fixture(scope="module")
def dense_scores(checkpoint: Path, text_ids: list[int], one_thread: None) -> Any:
    """By an engine of one thread, as the others are: `dense` has all."""
    with make_llm(checkpoint, max_num_seqs=2) as llm:
        return llm.score(text_ids, whole_vocabulary=True, decode_last_prompt_tokens=12)[0].logprobs


@pytest.mark.parametrize("method", COVERING)
def test_a_method_whose_budget_covers_the_context_is_bitwise_dense(
    one_thread, checkpoint: Path, dense_scores: Any, text_ids: list[int], method: str, tmp_path: Path
) -> None:
    sparse: dict[str, Any] = {"method": method, "dense_layers": 0, **COVERING[method]}
    if method == "hash":
        sparse["hash_weights"] = random_hash_weights(tmp_path / "hash.safetensors", range(30), 9, 64)
    with make_llm(checkpoint, max_num_seqs=2, sparse=sparse) as llm:
        (found,) = llm.score(text_ids, whole_vocabulary=True, decode_last_prompt_tokens=12)
        assert llm.stats()["attention"]["rows_sparse"] == 0
    assert (found.logprobs == dense_scores).all()


@pytest.fixture(scope="module")
def passkeys(dense: LLM, reference: PreTrainedModel) -> Iterator[list[tuple[Any, bool]]]:
    """Questions of 2,048 tokens, and whether transformers finds the key."""
    model = EvaluatedModel("smollm2-135m", 49152, 8192, dense.tokenizer)
    suite = PasskeySuite(lengths=(2048,), samples=1)
    found = []
    for example in suite.examples(model):
        tokens = greedy_tokens(reference, example.token_ids, 12)
        found.append((example, example.references[0] in dense.tokenizer.decode(tokens)))
    yield found


def recalled(llm: LLM, examples: list[Any]) -> list[bool]:
    params = SamplingParams(temperature=0.0, max_tokens=12)
    outputs = llm.generate([example.token_ids for example in examples], params, use_tqdm=False)
    return [example.references[0] in output.outputs[0].text for example, output in zip(examples, outputs)]


@pytest.mark.slow
def test_a_passkey_is_recalled_where_transformers_recalls_it(dense, passkeys) -> None:
    expected = [found for _, found in passkeys]
    assert recalled(dense, [example for example, _ in passkeys]) == expected
    assert sum(expected) >= 3, "the model itself must find most of the keys"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["twilight", "sketch"])
def test_a_method_recalls_the_passkeys_of_dense_attention(checkpoint, passkeys, method: str) -> None:
    """At its defaults, with the whole answer decoded sparsely."""
    with make_llm(checkpoint, max_num_seqs=8, sparse=method) as llm:
        assert recalled(llm, [example for example, _ in passkeys]) == [found for _, found in passkeys]
        assert llm.stats()["attention"]["rows_sparse"] > 0
