"""Decode steps at a few fixed shapes, as CUDA graphs have them, give what steps of their own shape give.

Run here without capture: the same function over the same inputs. Rows that pad a batch are no one's, and count for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distributed_sparse import SamplingParams
from distributed_sparse.llm import LLM
from distributed_sparse.outputs import RequestOutput
from distributed_sparse.shard.graphs import DecodeGraphs, DecodeShape
from tests.support.checkpoints import tiny_checkpoint
from tests.support.engine import make_llm
from tests.support.grids import corners
from tests.support.hash_weights import random_hash_weights
from tests.support.methods import METHODS, sparse_settings
from tests.support.padded_shard import padded_shard
from tests.support.prompts import random_tokens

pytestmark = pytest.mark.usefixtures("one_thread")  # on CPU, equal bits are promised at one thread

LAYERS, HEADS, HEAD_DIM = 3, 4, 16
CAPTURED: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    **{method: (method, {}) for method, case in METHODS.items() if case.captured},
    "quest below min_context": ("quest", {"min_context": 150}),
    "quest in layers of their own": ("quest", {"layers": [{"range": "2", "token_budget": 160}]}),
    "twilight over everything": ("twilight", {"selector": "full"}),
    "vattention by hash": ("vattention", {"selector": "hash"}),
}
"""All that may be captured."""
LENGTHS = (1100, 30, 300, 90, 5)
"""Contexts that are long enough to be sampled, that a budget covers, and in between: the device decides row by row."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("padded")
    random_hash_weights(folder / "hash.safetensors", range(LAYERS), HEADS, HEAD_DIM)
    sizes: dict[str, Any] = {
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "hidden_size": 32,
    }
    return tiny_checkpoint(folder / "model", max_position_embeddings=2048, **sizes)


def sparse_of(path: Path, variant: str) -> dict[str, Any] | None:
    method, changes = CAPTURED[variant]
    return sparse_settings(method, str(path.parent / "hash.safetensors"), **changes)


@pytest.fixture
def shapes_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[DecodeShape]]:
    """The shapes that steps ran at, in this process."""
    seen: list[DecodeShape] = []
    run = DecodeGraphs.run

    def spy(self: DecodeGraphs, shape: DecodeShape, *step: Any) -> Any:
        seen.append(shape)
        return run(self, shape, *step)

    monkeypatch.setattr(DecodeGraphs, "run", spy)
    yield seen


def tokens_of(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    assert all(output.error is None for output in outputs)
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def generate(llm: LLM) -> tuple[list[list[list[int]]], dict[str, Any]]:
    """Requests that end one after the other, so that batches of 1 to 7 rows run, and slots are given on."""
    prompts = [random_tokens(length, seed=length) for length in (*LENGTHS, 70, 8)]
    params = [
        SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=3, max_tokens=30, n=2, ignore_eos=True),
        SamplingParams(temperature=0.7, top_p=0.9, seed=4, max_tokens=9, ignore_eos=True),
        SamplingParams(temperature=0.0, max_tokens=22, min_tokens=5, stop_token_ids=[7, 8, 9]),
        SamplingParams(temperature=1.3, top_k=20, min_p=0.01, seed=5, max_tokens=4, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=6, max_tokens=40, ignore_eos=True, logprobs=2),
        SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True),
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return tokens_of(outputs), llm.stats()["attention"]


@pytest.mark.parametrize("method", corners(CAPTURED, kept=("quest", "quest in layers of their own", "twilight", "vattention")))
def test_padded_steps_give_the_tokens_and_the_counts_of_steps_of_their_own_shape(
    path: Path, method: str, shapes_run: list[DecodeShape]
) -> None:
    given: dict[str, Any] = {"sparse": sparse_of(path, method), "max_num_seqs": 7, "max_num_batched_tokens": 512}
    with make_llm(path, **given) as llm:
        tokens, attention = generate(llm)
    assert not shapes_run
    with make_llm(path, shard_factory=padded_shard, **given) as llm:
        found, counted = generate(llm)
    assert found == tokens
    if method != "quest in layers of their own":  # there the device decides also where the host could tell one layer
        assert counted == attention
    else:
        assert (counted["density"], counted["rows_sparse"]) == (attention["density"], attention["rows_sparse"])
    assert {shape.num_rows for shape in shapes_run} >= {1, 4, 7} and len(shapes_run) > 30
    if method == "quest below min_context":
        assert {shape.max_context_len for shape in shapes_run} == {149, 2048}
    assert method == "dense" or attention["rows_sparse"] > 0


@pytest.mark.parametrize("method", ["dense", "quest", "twilight", "vattention", "hash"])
def test_a_batch_that_fills_its_shape_is_bitwise_the_batch_of_its_own_shape(
    path: Path, method: str, shapes_run: list[DecodeShape]
) -> None:
    """Widths are those of the longest context that there may be, and change no bit: four requests from first to last."""
    prompts = [random_tokens(length, seed=length) for length in LENGTHS[:4]]
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=12, logprobs=5, ignore_eos=True)
    given: dict[str, Any] = {"sparse": sparse_of(path, method), "max_num_seqs": 4, "max_num_batched_tokens": 2000}
    found = []
    for factory in (None, padded_shard):
        with make_llm(path, shard_factory=factory, **given) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        found.append([[row for row in output.outputs[0].logprobs or []] for output in outputs])
    assert found[0] == found[1] and len(found[0][0]) == 12
    assert {shape.num_rows for shape in shapes_run} == {4}


def test_known_tokens_are_scored_alike(path: Path, shapes_run: list[DecodeShape]) -> None:
    """Decode rows whose next token is known read the hidden states beside the logits."""
    prompts = [random_tokens(length, seed=length) for length in (200, 31, 77)]
    given: dict[str, Any] = {"sparse": sparse_of(path, "quest"), "max_num_seqs": 8}
    with make_llm(path, **given) as llm:
        expected = llm.score(prompts, whole_vocabulary=True, decode_last_prompt_tokens=9)
    with make_llm(path, shard_factory=padded_shard, **given) as llm:
        found = llm.score(prompts, whole_vocabulary=True, decode_last_prompt_tokens=9)
    assert shapes_run
    for wanted, own in zip(expected, found):
        assert wanted.logprobs is not None and own.logprobs is not None
        np.testing.assert_allclose(own.logprobs, wanted.logprobs, atol=1e-4)


@pytest.mark.slow
def test_two_ranks_pad_alike(path: Path) -> None:
    """The ranks' sums are of padded batches, on all of them or on none."""
    given: dict[str, Any] = {"sparse": sparse_of(path, "quest"), "max_num_seqs": 7, "max_num_batched_tokens": 512}
    with make_llm(path, **given) as llm:
        tokens, attention = generate(llm)
    with make_llm(path, 2, padded_shard, **given) as llm:
        found, counted = generate(llm)
    assert found == tokens
    assert (counted["rows_sparse"], counted["bytes_read"]) == (attention["rows_sparse"], attention["bytes_read"])


def test_traced_steps_run_at_their_own_shape(path: Path, shapes_run: list[DecodeShape]) -> None:
    prompt = random_tokens(300)
    given: dict[str, Any] = {"sparse": sparse_of(path, "quest"), "max_num_seqs": 7, "trace": True, "profile_interval": 1000}
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, trace_steps=[3])
    with make_llm(path, **given) as llm:
        (expected,) = llm.generate([prompt], params, use_tqdm=False)
    with make_llm(path, shard_factory=padded_shard, **given) as llm:
        (found,) = llm.generate([prompt], params, use_tqdm=False)
    assert found.outputs[0].token_ids == expected.outputs[0].token_ids
    assert len(found.outputs[0].trace or []) == len(expected.outputs[0].trace or []) == 1
    assert len(shapes_run) == 17  # of 19 decode steps, of which one is traced and the first profiled
