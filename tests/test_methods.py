"""Every method, end to end: the logits of given tokens are those of a transformers model that attends by its definition.

Methods x query heads per KV head x contexts (shorter than a page, of no whole pages, covered) x ranks. A sparse method decides
by comparing floats: prompts are taken on which the float64 reference decides every comparison clearly.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from distributed_sparse.driver.admission import derived_seed
from distributed_sparse.llm import LLM
from tests.support.checkpoints import tiny_checkpoint
from tests.support.eager_methods import EagerMethod, eager_method
from tests.support.engine import make_llm
from tests.support.grids import corners
from tests.support.hash_weights import random_hash_weights
from tests.support.methods import METHODS, sparse_settings
from tests.support.prompts import random_tokens
from tests.support.transformers_reference import PageMethod, assert_close_to, reference_logits

pytestmark = pytest.mark.usefixtures("one_thread")  # on CPU, equal bits are promised at one thread

LAYERS, KV_HEADS, HEAD_DIM, DECODED = 3, 2, 16, 6
GROUPS = [1, 4, 8]
CLEAR = {"code": 2e-5, "signature": 1e-5, "sign": 3e-6, "probability": 1e-5, "mass": 2e-5, "sample_size": 3e-5}
"""How clear a decision must be where it is one of thousands; the others have `Margins.assert_clear`'s own limit."""

TWILIGHT = {"method": "twilight", **METHODS["twilight"].settings, "p": 0.8}
VATTENTION = sparse_settings("vattention", guarantee="output") or {}
CHANGES: dict[str, dict[str, Any]] = {
    "sketch": {"tail": False},
    "twilight": {"dense_layers": 2, "p": 0.8},
    "vattention": {"guarantee": "output"},
    "hash": {"dense_layers": 2},
}
"""What the definitions in `eager_methods` speak of, where it is not what the other generic tests try."""
RAGGED = {"vattention": 1607}
"""Tokens of a context with sparse rows, of no whole pages in five of six steps; 151 of the others."""
DEFINED = ["dense", *(method for method in METHODS if ":" not in method)]


def settings_of(method: str) -> dict[str, Any] | None:
    """Without the file of hash weights: `Model.sparse` names it."""
    return sparse_settings(method, **CHANGES.get(method, {}))


@dataclass(frozen=True)
class Model:
    """One checkpoint, in transformers with an attention that emulates methods; and random hash weights for it."""

    path: Path
    reference: Any
    hash_weights: str

    def sparse(self, settings: dict[str, Any] | None) -> dict[str, Any] | None:
        """With the path of the weights, where they are asked for."""
        asks = settings is not None and "hash" in (settings["method"], settings.get("selector"))
        return {**settings, "hash_weights": self.hash_weights} if settings is not None and asks else settings


Models = Callable[[int], Model]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """models(group): values have a mean, else no sample of them is small enough to be drawn."""

    @cache
    def model(group: int) -> Model:
        folder = tmp_path_factory.mktemp(f"group{group}")
        sizes: dict[str, Any] = {"num_key_value_heads": KV_HEADS, "num_attention_heads": KV_HEADS * group, "head_dim": HEAD_DIM}
        tiny_checkpoint(folder, "qwen2", num_hidden_layers=LAYERS, max_position_embeddings=2048, **sizes)
        weights = load_file(folder / "model.safetensors")
        for name in weights:
            if name.endswith("v_proj.bias"):
                weights[name] = 5.0 * weights[name]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="page_method").eval()
        hash_weights = random_hash_weights(
            tmp_path_factory.mktemp("hash") / "hash.safetensors", range(LAYERS), KV_HEADS * group, HEAD_DIM
        )
        return Model(folder, reference, hash_weights)

    return model


def emulation(sparse: dict[str, Any] | None, arrival: int) -> EagerMethod | PageMethod | None:
    """Of the engine's `arrival`-th request, which has no seed of its own."""
    if sparse is None:
        return None
    if sparse["method"] == "window":
        return PageMethod(**sparse)
    return eager_method(sparse, derived_seed(0, arrival))


@dataclass(frozen=True)
class Expectation:
    """What a transformers model says of the prompts, in the order of their arrival."""

    prompts: list[list[int]]
    logits: list[Tensor]
    sparse_rows: int
    counts: dict[tuple[int, int], int]
    """(layer, KV head) -> tokens read by all prompts' decode rows."""


def expectation(model: Model, sparse: dict[str, Any] | None, lengths: tuple[int, ...]) -> Expectation:
    prompts, logits, rows = [], [], 0
    counts: dict[tuple[int, int], int] = {}
    for arrival, length in enumerate(lengths):
        prompt, own, found = clear_prompt(model, sparse, length, arrival)
        prompts.append(prompt)
        logits.append(found)
        if isinstance(own, EagerMethod):
            rows += sum(read < n for (_, _, n), read in own.counts.items())
            for (layer, head, _), read in own.counts.items():
                counts[layer, head] = counts.get((layer, head), 0) + read
    return Expectation(prompts, logits, rows, counts)


def clear_prompt(
    model: Model, sparse: dict[str, Any] | None, length: int, arrival: int
) -> tuple[list[int], EagerMethod | PageMethod | None, Tensor]:
    """The first random prompt on which the reference decides everything clearly, and its logits."""
    unclear = None
    for seed in range(40):
        own = emulation(sparse, arrival)
        prompt = random_tokens(length, seed=100 * arrival + seed)
        logits = reference_logits(model.reference, prompt, decoded=min(DECODED, length - 1), emulation=own)
        try:
            if isinstance(own, EagerMethod):
                own.margins.assert_clear(**CLEAR)
            return prompt, own, logits
        except AssertionError as error:
            unclear = error
    raise AssertionError("no prompt is decided clearly") from unclear


@pytest.fixture(scope="module")
def expectations(models: Models) -> Callable[[str, int], Expectation]:
    """expectations(method, group): one for every number of ranks. Contexts: short, covered, ragged."""

    @cache
    def expected(method: str, group: int) -> Expectation:
        lengths = (11, 48, 151) if method == "dense" else (11, METHODS[method].covered, RAGGED.get(method, 151))
        return expectation(models(group), models(group).sparse(settings_of(method)), lengths)

    return expected


@pytest.fixture(scope="module")
def dense_engines(models: Models) -> Iterator[Callable[[int, int], LLM]]:
    made: dict[tuple[int, int], LLM] = {}

    def engine(group: int, ranks: int) -> LLM:
        if (group, ranks) not in made:
            made[group, ranks] = engine_of(models(group), None, ranks)
        return made[group, ranks]

    yield engine
    for llm in made.values():
        llm.shutdown()


def engine_of(model: Model, sparse: dict[str, Any] | None, ranks: int) -> LLM:
    return make_llm(model.path, ranks, sparse=sparse, max_num_seqs=4, max_model_len=1700)


def scores(llm: LLM, prompts: list[list[int]]) -> list[np.ndarray]:
    """Log-probabilities of the whole vocabulary; the last tokens of each prompt are decoded."""
    found = llm.score(prompts, whole_vocabulary=True, decode_last_prompt_tokens=DECODED)
    assert all(score.logprobs is not None for score in found)
    return [score.logprobs for score in found if score.logprobs is not None]


@pytest.mark.parametrize(("group", "ranks"), corners(itertools.product(GROUPS, (1, 2)), kept=((4, 2),)))
@pytest.mark.parametrize("method", DEFINED)
def test_a_method_equals_its_definition_at_every_context(
    models: Models,
    expectations: Callable[[str, int], Expectation],
    dense_engines: Callable[[int, int], LLM],
    method: str,
    group: int,
    ranks: int,
) -> None:
    model, expected = models(group), expectations(method, group)
    with engine_of(model, model.sparse(settings_of(method)), ranks) as llm:
        found = scores(llm, expected.prompts)
        attention = llm.stats()["attention"]
    for own, logits in zip(found, expected.logits, strict=True):
        assert_close_to(own, logits)
    dense = scores(dense_engines(group, ranks), expected.prompts)
    for place in (0, 1):  # short and covered
        assert np.array_equal(found[place].view(np.int32), dense[place].view(np.int32)), (
            "a covered context is not bitwise dense"
        )
    if method == "dense":
        assert attention["rows_sparse"] == 0
        return
    assert attention["rows_sparse"] > 0
    # The last of all decoded rows reads so much less that no agreement with dense could pass for one with the method.
    dense_logits = torch.from_numpy(dense[2])
    assert np.abs(found[2] - dense[2]).max() > 100 * 1e-4 * float(dense_logits.std())
    if method != "window":
        contexts = sum(sum(range(len(prompt) - DECODED + 1, len(prompt) + 1)) for prompt in expected.prompts)
        assert attention["rows_sparse"] == expected.sparse_rows
        density = [[expected.counts[layer, head] / contexts for head in range(KV_HEADS)] for layer in range(LAYERS)]
        assert attention["density"] == density


SELECTED = [
    *({**TWILIGHT, "selector": selector} for selector in ("hash", "oracle", "full")),
    *({**VATTENTION, "dense_layers": 2, "selector": selector} for selector in ("hash", "oracle")),
]


@pytest.mark.parametrize(("group", "ranks"), corners(itertools.product(GROUPS, (1, 2)), kept=((4, 1),)))
@pytest.mark.parametrize("sparse", SELECTED, ids=lambda sparse: f"{sparse['method']}-{sparse['selector']}")
def test_a_method_equals_its_definition_with_every_selector(
    models: Models, sparse: dict[str, Any], group: int, ranks: int
) -> None:
    """`quest` is the default above; alone, quest, hash and oracle are methods of their own, and `full` is dense."""
    model = models(group)
    sparse = model.sparse(sparse) or {}
    expected = expectation(model, sparse, (1607 if sparse["method"] == "vattention" else 151,))
    with engine_of(model, sparse, ranks) as llm:
        (found,) = scores(llm, expected.prompts)
        attention = llm.stats()["attention"]
    assert_close_to(found, expected.logits[0])
    assert attention["rows_sparse"] == expected.sparse_rows > 0


VARIANTS = {
    "twilight-2-bits": {**TWILIGHT, "key_bits": 2, "dense_layers": 1},
    "twilight-8-bits": {**TWILIGHT, "key_bits": 8, "candidate_fraction": 0.3},
    "twilight-p-1": {**TWILIGHT, "p": 1.0},
    "twilight-forced": {**TWILIGHT, "p": 0.3, "sink_pages": 0, "recent_pages": 2, "min_context": 148},
    "vattention-denominator": {**VATTENTION, "guarantee": "denominator", "epsilon": 0.2, "delta": 0.2},
    "vattention-numerator": {**VATTENTION, "guarantee": "numerator_denominator", "epsilon": 0.9, "delta": 0.2},
    "vattention-output": {**VATTENTION, "epsilon": 0.4, "delta": 0.3, "top_k_fraction": 0.0, "min_context": 1604},
    "vattention-max-sample": {**VATTENTION, "guarantee": "denominator", "epsilon": 0.1, "max_sample": 320},
    "hash-forced": {"method": "hash", "token_budget": 60, "sink_pages": 0, "recent_pages": 2, "dense_layers": 2},
    "random-forced": {"method": "random", "token_budget": 90, "sink_pages": 2, "recent_pages": 2, "dense_layers": 0},
    "oracle-forced": {
        "method": "oracle_topk",
        "token_budget": 33,
        "sink_pages": 2,
        "recent_pages": 1,
        "dense_layers": 0,
        "min_context": 149,
    },
}


@pytest.mark.parametrize(
    ("group", "ranks"), [(4, 1), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((1, 1), (4, 2)))]
)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_setting_means_what_the_definition_says(models: Models, name: str, group: int, ranks: int) -> None:
    model = models(group)
    sparse = model.sparse(VARIANTS[name]) or {}
    expected = expectation(model, sparse, (1607 if sparse["method"] == "vattention" else 151,))
    with engine_of(model, sparse, ranks) as llm:
        (found,) = scores(llm, expected.prompts)
        attention = llm.stats()["attention"]
    assert_close_to(found, expected.logits[0])
    assert attention["rows_sparse"] == expected.sparse_rows > 0
