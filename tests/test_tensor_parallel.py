"""One, two and four ranks give the same tokens, and each holds its part of the weights and of the cache, and no more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from distributed_sparse import EngineConfig, SamplingParams
from distributed_sparse.llm import LLM
from distributed_sparse.outputs import RequestOutput
from tests.support.checkpoints import tiny_checkpoint, transformers_model
from tests.support.engine import make_llm
from tests.support.grids import corners
from tests.support.hash_weights import random_hash_weights
from tests.support.methods import METHODS, sparse_settings
from tests.support.promise_b import count_ties
from tests.support.prompts import random_tokens
from tests.support.stepped_engine import ThreadShardGroup
from tests.support.transformers_reference import assert_close_to, reference_logits

pytestmark = pytest.mark.each_value

VOCAB_SIZE, HIDDEN, LAYERS, KV_HEADS, HEAD_DIM, PAGE = 331, 64, 3, 4, 16, 16
VATTENTION = sparse_settings("vattention", guarantee="output")
TRIED = ["dense", *(method for method in METHODS if method != "vattention")]  # its contexts must be long: below
PROMPTS = [random_tokens(length, seed=length) for length in (150, 1, 16, 97, 33, 64, 120, 49)]
GREEDY = [SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)] * len(PROMPTS)
SEEDED = [
    SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, n=n, seed=seed, max_tokens=8)
    for seed, (temperature, top_p, top_k, min_p, n) in enumerate(
        [
            (1.0, 1.0, 0, 0.0, 1),
            (0.7, 0.9, 0, 0.0, 2),
            (1.5, 1.0, 20, 0.0, 1),
            (1.0, 1.0, 0, 0.1, 1),
            (0.5, 0.95, 50, 0.05, 1),
            (2.0, 1.0, 0, 0.0, 3),
            (1.0, 0.5, 0, 0.0, 1),
            (0.9, 1.0, 0, 0.0, 1),
        ]
    )
]

Engines = Callable[[str, int], LLM]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Biases on q, k and v; a vocabulary (331) and an intermediate size (61) that no number of ranks divides."""
    return tiny_checkpoint(tmp_path_factory.mktemp("qwen2"), "qwen2", intermediate_size=61)


@pytest.fixture(scope="module")
def hash_weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_hash_weights(tmp_path_factory.mktemp("hash") / "hash.safetensors", range(LAYERS), 8, HEAD_DIM)


@pytest.fixture(scope="module")
def new_engine(path: Path, hash_weights: str) -> Engines:
    """new_engine(method, tensor_parallel_size): the caller's to shut down."""

    def engine(method: str, tensor_parallel_size: int) -> LLM:
        sparse = sparse_settings(method, hash_weights)
        limits = {"max_num_seqs": 12, "max_num_batched_tokens": 100, "max_model_len": 256}
        return make_llm(path, tensor_parallel_size, sparse=sparse, **limits)

    return engine


@pytest.fixture(scope="module")
def engines(new_engine: Engines) -> Iterator[Engines]:
    """engines(method, tensor_parallel_size): made when first asked for, and shared by the module's tests."""
    made: dict[tuple[str, int], LLM] = {}

    def engine(method: str, tensor_parallel_size: int) -> LLM:
        key = (method, tensor_parallel_size)
        if key not in made:
            made[key] = new_engine(method, tensor_parallel_size)
        return made[key]

    yield engine
    for llm in made.values():
        llm.shutdown()


def generate(llm: LLM, params: list[SamplingParams], whole_vocabulary: bool = False) -> list[RequestOutput]:
    asked = [replace(own, logprobs=VOCAB_SIZE) for own in params] if whole_vocabulary else params
    return llm.generate(PROMPTS, asked, use_tqdm=False)


@pytest.fixture(scope="module")
def references(engines: Engines) -> Callable[[str, str], list[RequestOutput]]:
    """references(method, "greedy" | "seeded"): what one rank answers, with the log-probabilities of the whole vocabulary."""
    made: dict[tuple[str, str], list[RequestOutput]] = {}

    def reference(method: str, kind: str) -> list[RequestOutput]:
        if (method, kind) not in made:
            params = GREEDY if kind == "greedy" else SEEDED
            made[method, kind] = generate(engines(method, 1), params, whole_vocabulary=True)
        return made[method, kind]

    return reference


# ---- promise B


@pytest.mark.parametrize("kind", ["greedy", "seeded"])
@pytest.mark.parametrize("tensor_parallel_size", [2, 4])
@pytest.mark.parametrize("method", ["dense", "quest"])
def test_ranks_together_draw_the_tokens_of_one_rank(
    engines: Engines, references: Callable, method: str, tensor_parallel_size: int, kind: str
) -> None:
    params = GREEDY if kind == "greedy" else SEEDED
    found = generate(engines(method, tensor_parallel_size), params)
    ties = count_ties(references(method, kind), found, params)
    assert ties <= 0.01 * len(PROMPTS), f"{ties} of {len(PROMPTS)} requests met a tie"


OTHERS = [method for method in TRIED if method not in ("dense", "quest")]


@pytest.mark.parametrize("method", corners(OTHERS, kept=("sketch", "twilight", "hash", "tova")))
def test_two_ranks_draw_the_tokens_of_one_rank_with_other_methods(
    new_engine: Engines, references: Callable, method: str
) -> None:
    with new_engine(method, 2) as llm:
        found = generate(llm, GREEDY)
    assert count_ties(references(method, "greedy"), found, GREEDY) == 0


@pytest.mark.parametrize("method", ["twilight", *(pytest.param(name, marks=pytest.mark.slow) for name in ("random", "hash"))])
def test_four_ranks_draw_the_seeded_tokens_of_one_rank(new_engine: Engines, references: Callable, method: str) -> None:
    params = [replace(own, max_tokens=6) for own in SEEDED]
    with new_engine(method, 4) as llm:
        found = llm.generate(PROMPTS, params, use_tqdm=False)
    assert count_ties(shortened(references(method, "seeded"), 6), found, params) == 0


def shortened(outputs: list[RequestOutput], max_tokens: int) -> list[RequestOutput]:
    """What the same requests answer when they may draw no more than so many tokens."""
    return [
        replace(
            output,
            outputs=[
                replace(own, token_ids=own.token_ids[:max_tokens], logprobs=own.logprobs and own.logprobs[:max_tokens])
                for own in output.outputs
            ],
        )
        for output in outputs
    ]


@pytest.mark.parametrize("method", ["dense", "quest", "random"])
def test_a_request_alone_draws_the_tokens_that_it_draws_in_a_batch(engines: Engines, references: Callable, method: str) -> None:
    llm = engines(method, 1)
    found = [llm.generate([prompt], own, use_tqdm=False)[0] for prompt, own in zip(PROMPTS, SEEDED)]
    assert count_ties(references(method, "seeded"), found, SEEDED) == 0


def test_every_method_reads_something_else(references: Callable) -> None:
    """Else the tests above would compare dense with dense."""
    answers = {method: [output.outputs[0].token_ids for output in references(method, "greedy")] for method in TRIED}
    assert len({str(tokens) for tokens in answers.values()}) == len(TRIED)


def test_a_real_difference_is_not_taken_for_a_tie(references: Callable) -> None:
    greedy, seeded = references("dense", "greedy"), references("dense", "seeded")
    with pytest.raises(AssertionError, match="differs"):
        count_ties(greedy, references("quest", "greedy"), GREEDY)
    with pytest.raises(AssertionError, match="differs"):
        count_ties(seeded, references("quest", "seeded"), SEEDED)


# ---- promise B for a method that samples: its contexts must be long enough to be sampled


@pytest.fixture(scope="module")
def long_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Values with a mean, else no sample of them is small enough to be drawn."""
    path = tiny_checkpoint(tmp_path_factory.mktemp("long"), "qwen2", max_position_embeddings=2048)
    weights = load_file(path / "model.safetensors")
    scaled = {name: 5.0 * tensor if name.endswith("v_proj.bias") else tensor for name, tensor in weights.items()}
    save_file(scaled, path / "model.safetensors", metadata={"format": "pt"})
    return path


LONG_PROMPTS = [random_tokens(length, seed=length) for length in (1500, 40, 1203, 1100)]
LONG_PARAMS = [
    SamplingParams(temperature=temperature, n=n, seed=seed, max_tokens=8, ignore_eos=True)
    for seed, (temperature, n) in enumerate([(1.0, 2), (0.7, 1), (1.3, 1), (0.0, 1)], start=1)
]


@pytest.fixture(scope="module")
def sampled_reference(long_path: Path) -> tuple[list[RequestOutput], dict[str, Any]]:
    """What one rank answers, all requests together, with the log-probabilities of the whole vocabulary; and what it read."""
    with long_engine(long_path, 1) as llm:
        asked = [replace(own, logprobs=VOCAB_SIZE) for own in LONG_PARAMS]
        outputs = llm.generate(LONG_PROMPTS, asked, use_tqdm=False)
        return outputs, llm.stats()["attention"]


def long_engine(path: Path, tensor_parallel_size: int) -> LLM:
    return make_llm(path, tensor_parallel_size, sparse=VATTENTION, max_num_seqs=8, max_model_len=1600)


@pytest.mark.parametrize("tensor_parallel_size", corners([2, 4], kept=(2,)))
def test_ranks_together_draw_the_sample_of_one_rank(
    long_path: Path, sampled_reference: tuple[list[RequestOutput], dict[str, Any]], tensor_parallel_size: int
) -> None:
    expected, attention = sampled_reference
    with long_engine(long_path, tensor_parallel_size) as llm:
        found = llm.generate(LONG_PROMPTS, LONG_PARAMS, use_tqdm=False)
        counted = llm.stats()["attention"]
    of_ranks = counted.pop("bytes_read_of_ranks")
    assert len(of_ranks) == tensor_parallel_size and sum(of_ranks) == counted["bytes_read"]
    assert counted == {name: value for name, value in attention.items() if name != "bytes_read_of_ranks"}
    assert attention["rows_sparse"] > 100
    assert count_ties(expected, found, LONG_PARAMS) == 0


def test_a_request_alone_draws_the_sample_that_it_draws_in_a_batch(
    long_path: Path, sampled_reference: tuple[list[RequestOutput], dict[str, Any]]
) -> None:
    """In another engine, after other requests: a sample depends on the request's seed and position, not on slot or arrival."""
    expected, _ = sampled_reference
    with long_engine(long_path, 1) as llm:
        found = [
            llm.generate([prompt], own, use_tqdm=False)[0] for prompt, own in reversed(list(zip(LONG_PROMPTS, LONG_PARAMS)))
        ]
    assert count_ties(expected, found[::-1], LONG_PARAMS) == 0


def test_another_seed_draws_another_sample(long_path: Path) -> None:
    """Teacher-forced by one token: the same context under two seeds gives other logits, and under one seed the same."""
    params = [SamplingParams(temperature=0.0, max_tokens=2, seed=seed, logprobs=VOCAB_SIZE) for seed in (1, 2, 1)]
    with long_engine(long_path, 1) as llm:
        first, other, again = (llm.generate([LONG_PROMPTS[0]], own, use_tqdm=False)[0].outputs[0] for own in params)
    assert first.logprobs is not None and other.logprobs is not None and again.logprobs is not None
    assert first.logprobs[0] == other.logprobs[0] and first.token_ids[0] == other.token_ids[0]  # of the dense prefill
    assert first.logprobs[1] != other.logprobs[1] and first.logprobs[1] == again.logprobs[1]


# ---- logits, and what is read


@pytest.mark.parametrize("method", ["dense", "quest"])
@pytest.mark.parametrize("tensor_parallel_size", [2, 4])
def test_log_probabilities_of_the_whole_vocabulary_are_close_to_those_of_one_rank(
    engines: Engines, method: str, tensor_parallel_size: int
) -> None:
    prompts = [random_tokens(length, seed=length) for length in (140, 60, 90)]
    scores = {
        ranks: engines(method, ranks).score(prompts, whole_vocabulary=True, decode_last_prompt_tokens=30)
        for ranks in (1, tensor_parallel_size)
    }
    for expected, found in zip(scores[1], scores[tensor_parallel_size]):
        assert expected.logprobs is not None and found.logprobs is not None
        assert found.logprobs.shape == (len(expected.token_ids) - 1, VOCAB_SIZE)
        assert abs(found.logprobs - expected.logprobs).max() <= 1e-4 * expected.logprobs.std()


def test_four_ranks_equal_transformers(engines: Engines, path: Path) -> None:
    prompt = random_tokens(120, seed=9)
    (score,) = engines("dense", 4).score(prompt, whole_vocabulary=True, decode_last_prompt_tokens=40)
    assert_close_to(score.logprobs, reference_logits(transformers_model(path), prompt, decoded=40))


def test_ranks_choose_as_many_pages_as_one_rank_chooses(engines: Engines) -> None:
    prompt, counts = random_tokens(150, seed=3), {}
    for ranks in (1, 2, 4):
        llm = engines("quest", ranks)
        before = llm.stats()["attention"]
        llm.score(prompt, decode_last_prompt_tokens=20)
        after = llm.stats()["attention"]
        counts[ranks] = [after[key] - before[key] for key in ("rows_dense", "rows_sparse", "bytes_read")]
    assert counts[1] == counts[2] == counts[4]
    assert counts[1][:2] == [20 * KV_HEADS, 2 * 20 * KV_HEADS]  # one dense layer of three


# ---- what each rank holds


def split_bytes(path: Path, ranks: int) -> int:
    """Bytes of a rank's weights, from transformers' own parameters: padded parts of what is split, all of what is not."""
    total = 0
    for name, parameter in transformers_model(path).named_parameters():
        module, kind = name.split(".")[-2:]
        size = list(parameter.shape)
        if module in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head"):
            size[0] = -(-size[0] // ranks)
        elif module in ("o_proj", "down_proj") and kind == "weight":
            size[1] = -(-size[1] // ranks)
        total += 4 * torch.Size(size).numel()
    return total


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("qwen2", {"intermediate_size": 61}),
        ("qwen3", {"num_key_value_heads": 8, "head_dim": 32}),
    ],
)
def test_weights_and_cache_are_split_evenly(tmp_path: Path, family: str, overrides: dict[str, Any]) -> None:
    path = tiny_checkpoint(tmp_path, family, **overrides)
    held: dict[int, list[dict[str, Any]]] = {}
    for ranks in (1, 2, 4):
        sparse = {"method": "quest", "token_budget": 64}
        config = EngineConfig(model=str(path), tensor_parallel_size=ranks, sparse=sparse, max_num_seqs=4, max_model_len=128)
        group = ThreadShardGroup(config)
        held[ranks] = [info.as_dict() for info in group.start()]
        for info, shard in zip(held[ranks], group.shards):
            kept = [(cache.k_pages, cache.v_pages, cache.metadata.get("page_min_max")) for cache in shard.cache.layers]
            assert info["cache_bytes"] == sum(k.nbytes + v.nbytes for k, v, _ in kept)
            assert info["metadata_bytes"] == sum(bounds.nbytes for _, _, bounds in kept if bounds is not None) > 0
        group.stop()
    (whole,) = held[1]
    for ranks in (1, 2, 4):
        assert [info["weight_bytes"] for info in held[ranks]] == [split_bytes(path, ranks)] * ranks
        for name in ("cache_bytes", "metadata_bytes", "page_bytes"):
            assert [info[name] * ranks for info in held[ranks]] == [whole[name]] * ranks
        heads = overrides.get("num_key_value_heads", KV_HEADS) // ranks
        assert [info["kv_heads"] for info in held[ranks]] == [(rank * heads, (rank + 1) * heads) for rank in range(ranks)]


@pytest.mark.parametrize("tensor_parallel_size", [1, 2, 4])
def test_stats_name_every_rank_with_its_part(engines: Engines, path: Path, tensor_parallel_size: int) -> None:
    ranks = engines("quest", tensor_parallel_size).stats()["ranks"]
    pages = 12 * 256 // PAGE + 1
    heads = KV_HEADS // tensor_parallel_size
    assert [info["rank"] for info in ranks] == list(range(tensor_parallel_size))
    assert len({info["pid"] for info in ranks}) == tensor_parallel_size
    for info in ranks:
        assert info["weight_bytes"] == split_bytes(path, tensor_parallel_size)
        assert info["cache_bytes"] == 4 * pages * LAYERS * 2 * heads * PAGE * HEAD_DIM
        assert info["metadata_bytes"] == 4 * pages * (LAYERS - 1) * heads * 2 * HEAD_DIM  # the dense layer has none


# ---- what the ranks say to each other


@pytest.mark.parametrize("tensor_parallel_size", [1, 2, 4])
def test_ranks_sum_twice_per_layer_and_once_for_the_embedding(engines: Engines, tensor_parallel_size: int) -> None:
    llm = engines("dense", tensor_parallel_size)
    before = llm.stats()
    llm.score(random_tokens(130, seed=5), decode_last_prompt_tokens=10)  # chunks of 100 and 20 tokens, then ten of one
    after = llm.stats()
    calls, nbytes = (after["all_reduce"][key] - before["all_reduce"][key] for key in ("calls", "bytes"))
    assert after["steps"] - before["steps"] == 12
    per_token = (2 * LAYERS + 1) if tensor_parallel_size > 1 else 0
    assert calls == 12 * per_token
    assert nbytes == 130 * per_token * HIDDEN * 4
