"""A prefill store saves work and changes nothing: what is found has the bits of what is computed, for every method."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distributed_sparse.cache import AppendRuns, Geometry, LayerCache, Metadata
from distributed_sparse.config import EngineConfig
from distributed_sparse.outputs import RequestOutput
from tests.support.checkpoints import ROPE_PARAMETERS, tiny_checkpoint
from tests.support.engine import make_llm
from tests.support.hash_weights import random_hash_weights
from tests.support.outside_policy import EveryOtherPolicy
from tests.support.prompts import random_tokens
from tests.support.stepped_engine import SteppedEngine

pytestmark = pytest.mark.usefixtures("one_thread")  # on CPU, equal bits are promised at one thread

SETTINGS: dict[str, Any] = {"device": "cpu", "max_model_len": 512, "max_num_batched_tokens": 64, "max_num_seqs": 16}
QUEST = {"method": "quest", "token_budget": 64, "recent_pages": 1, "dense_layers": 1}
SPARSE: dict[str, dict[str, Any]] = {
    "quest": QUEST,
    "twilight": {"method": "twilight", "p": 0.8, "min_candidates": 48, "dense_layers": 1},
    "twilight-hash": {"method": "twilight", "selector": "hash", "key_bits": 8, "dense_layers": 0},
    "vattention": {"method": "vattention", "epsilon": 0.5, "delta": 0.5, "sink_tokens": 16, "window_tokens": 16},
    "hash": {"method": "hash", "token_budget": 64, "recent_pages": 1, "dense_layers": 0},
    "sketch": {"method": "sketch", "min_tokens": 48},
    "window": {"method": "window", "token_budget": 64, "recent_pages": 1, "dense_layers": 0, "evict": True},
    "tova": {"method": "tova", "token_budget": 64, "dense_layers": 0},
    "random": {"method": "random", "token_budget": 64, "recent_pages": 1, "dense_layers": 0},
    "oracle_topk": {"method": "oracle_topk", "token_budget": 64, "recent_pages": 1, "dense_layers": 0},
    "outside": {"method": f"{__name__}:KeyCopyPolicy", "dense_layers": 0},
}


@dataclass(frozen=True)
class KeyCopies(Metadata):
    """Metadata that no kernel writes: the keys once more, as `append` was given them."""

    def allocate(self, num_pages: int, geometry: Geometry) -> dict[str, Tensor]:
        shape = (num_pages, geometry.page_size, geometry.num_kv_heads, geometry.head_dim)
        return {"key_copies": torch.zeros(shape, dtype=geometry.dtype, device=geometry.device)}

    def append(self, cache: LayerCache, k: Tensor, runs: AppendRuns) -> None:
        for page, start, offset, count in zip(*(column.tolist() for column in runs.columns)):
            cache.metadata["key_copies"][page, offset : offset + count] = k[start : start + count]


class KeyCopyPolicy(EveryOtherPolicy):
    metadata = (KeyCopies(),)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("qwen3"), "qwen3")


@pytest.fixture(scope="module")
def filled(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which a dense engine with pages of 16 tokens has kept `random_tokens(150, seed=1)`."""
    store = tmp_path_factory.mktemp("store")
    with SteppedEngine(path, prefill_store=str(store), **SETTINGS) as engine:
        answer(engine, random_tokens(150, seed=1))
    return store


Open = Callable[..., SteppedEngine]


@pytest.fixture
def open_engine(path: Path) -> Iterator[Open]:
    """open_engine(store, **settings): closed at the end of the test."""
    opened: list[SteppedEngine] = []

    def make(store: Path | None, model: Path = path, **settings: Any) -> SteppedEngine:
        given = {**SETTINGS, "prefill_store": None if store is None else str(store), **settings}
        opened.append(SteppedEngine(model, **given))
        return opened[-1]

    yield make
    for engine in opened:
        engine.group.stop()


def greedy(max_tokens: int = 3, **params: Any) -> dict[str, Any]:
    return {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, "logprobs": 3, **params}


def said(*outputs: RequestOutput) -> list[Any]:
    """Everything that was computed for requests: tokens and log-probabilities, as exact numbers."""
    return [(out.prompt_logprobs, [(s.token_ids, s.logprobs) for s in out.outputs]) for out in outputs]


def answer(engine: SteppedEngine, prompt: list[int], **params: Any) -> list[Any]:
    output = engine.add(prompt, **greedy(**params))
    engine.finish()
    return said(output)


def answer_many(engine: SteppedEngine) -> list[Any]:
    """Prompts of many lengths, in several chunks and in parts of a page, sampled, scored, and with sparsely decoded ends."""
    requests = [
        (150, greedy(prompt_logprobs=2)),
        (1, greedy(max_tokens=9)),
        (64, greedy(temperature=1.0, seed=1, n=3)),
        (97, greedy(decode_last_prompt_tokens=20, prompt_logprobs=0)),
        (33, greedy(max_tokens=1)),
        (200, greedy(decode_last_prompt_tokens=1, temperature=0.7, seed=2)),
    ]
    outputs = [engine.add(random_tokens(length, seed=length), **params) for length, params in requests]
    engine.finish()
    return said(*outputs)


NUM_PREFILLED = 150 + 1 + 64 + 77 + 33 + 199


def taken(engine: SteppedEngine) -> tuple[int, int]:
    """(prompt tokens from the store, computed)."""
    stats = engine.driver.stats()["prefill_tokens"]
    return stats["from_store"], stats["computed"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_engine_of_another_method_and_page_size_finds_all_chunks_and_says_the_same(
    open_engine: Open, tmp_path: Path, ranks: int
) -> None:
    other: dict[str, Any] = {"sparse": QUEST, "page_size": 32, "tensor_parallel_size": ranks}
    first = open_engine(tmp_path / "kept", tensor_parallel_size=ranks)
    answer_many(first)
    assert taken(first) == (0, NUM_PREFILLED)
    second, fresh = open_engine(tmp_path / "kept", **other), open_engine(tmp_path / "empty", **other)
    assert answer_many(second) == answer_many(fresh)
    assert taken(second) == (NUM_PREFILLED, 0)
    assert taken(fresh) == (0, NUM_PREFILLED)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_store_changes_no_bit(open_engine: Open, tmp_path: Path, ranks: int) -> None:
    """Of a prompt that is alone in its steps: beside others, an engine without a store multiplies their rows together."""
    said_by = []
    for store in (None, tmp_path, tmp_path):
        engine = open_engine(store, tensor_parallel_size=ranks, sparse=QUEST)
        said_by.append(answer(engine, random_tokens(150, seed=1), max_tokens=12, prompt_logprobs=-1))
    assert taken(engine) == (150, 0)
    assert said_by[0] == said_by[1] == said_by[2]


@pytest.mark.parametrize("method", SPARSE)
def test_the_cache_of_every_method_holds_the_same_bits(open_engine: Open, filled: Path, method: str, hash_weights: str) -> None:
    sparse = SPARSE[method]
    if "hash" in method:
        sparse = {**sparse, "hash_weights": hash_weights}
    pages, answers = [], []
    for store in (None, filled):
        engine = open_engine(store, sparse=sparse, page_size=32)
        output = engine.add(random_tokens(150, seed=1), **greedy(max_tokens=30))
        while not output.outputs[0].token_ids:
            engine.step()
        cache = engine.group.shards[0].cache
        pages.append([tensor[1:6].clone() for layer in cache.layers for tensor in layer.pages])
        engine.finish()
        answers.append(said(output))
    assert taken(engine) == (150, 0)
    assert all(torch.equal(computed.view(torch.uint8), found.view(torch.uint8)) for computed, found in zip(*pages, strict=True))
    assert answers[0] == answers[1]


@pytest.fixture(scope="module")
def hash_weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_hash_weights(tmp_path_factory.mktemp("hash") / "hash.safetensors", range(3), 8, 16)


@pytest.mark.parametrize("ranks", [1, 2])
def test_found_and_computed_chunks_run_in_one_step_beside_decode_rows(open_engine: Open, tmp_path: Path, ranks: int) -> None:
    known, unknown = random_tokens(50, seed=1), random_tokens(60, seed=2)
    settings: dict[str, Any] = {"max_num_batched_tokens": 256, "tensor_parallel_size": ranks, "sparse": QUEST}
    answer(open_engine(tmp_path / "kept", tensor_parallel_size=ranks), known)
    heard = []
    for store in ("kept", "empty"):
        engine = open_engine(tmp_path / store, **settings)
        outputs = [engine.add(random_tokens(40, seed=3), **greedy(max_tokens=8))]
        engine.step()
        outputs += [engine.add(prompt, **greedy(prompt_logprobs=1)) for prompt in (unknown, known, unknown[:30])]
        plan = engine.step()
        assert (len(plan.decode), len(plan.prefill)) == (1, 3)
        engine.finish()
        heard.append(said(*outputs))
        assert taken(engine) == ((50, 130) if store == "kept" else (0, 180))
    assert heard[0] == heard[1]


def test_a_prompt_of_which_only_the_beginning_is_known_is_computed_from_there(open_engine: Open, tmp_path: Path) -> None:
    prompt = random_tokens(190, seed=1)
    answer(open_engine(tmp_path), prompt[:128] + random_tokens(40, seed=2))
    continued, fresh = open_engine(tmp_path), open_engine(None)
    assert answer(continued, prompt, prompt_logprobs=1) == answer(fresh, prompt, prompt_logprobs=1)
    assert taken(continued) == (128, 62)


@pytest.mark.parametrize(("is_stored", "border"), [(True, 256), (False, 424)])
def test_prompts_are_cut_evenly_for_the_store_alone(open_engine: Open, tmp_path: Path, is_stored: bool, border: int) -> None:
    engine = open_engine(tmp_path if is_stored else None, max_num_batched_tokens=1024)
    for length in (300, 300, 500):
        engine.add([1] * length, **greedy())
    assert [(chunk.start, chunk.end) for chunk in engine.step().prefill] == [(0, 300), (0, 300), (0, border)]


def test_what_follows_other_tokens_or_other_borders_is_not_found(open_engine: Open, tmp_path: Path) -> None:
    prompt = random_tokens(128, seed=1)
    answer(open_engine(tmp_path), prompt)
    engine = open_engine(tmp_path)
    answer(engine, [*random_tokens(1, seed=9), *prompt[1:]])
    assert taken(engine) == (0, 128)
    engine = open_engine(tmp_path, max_num_batched_tokens=96)
    answer(engine, prompt)
    assert taken(engine) == (0, 128)


def test_tokens_that_were_decoded_are_not_found_as_prefilled_ones(open_engine: Open, tmp_path: Path) -> None:
    prompt = random_tokens(60, seed=1)
    answer(open_engine(tmp_path, sparse=QUEST), prompt, decode_last_prompt_tokens=20)
    engine = open_engine(tmp_path)
    answer(engine, prompt)
    assert taken(engine) == (0, 60)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_a_rotary_embedding_that_depends_on_the_prompts_length_is_not_mixed_up(
    open_engine: Open, tmp_path: Path, rope: str
) -> None:
    longest = 64 if rope == "dynamic" else 256  # beyond it, and beyond 32 tokens, the frequencies change
    model = tiny_checkpoint(tmp_path / "model", "llama", rope_parameters=ROPE_PARAMETERS[rope], max_position_embeddings=longest)
    prompt, settings = random_tokens(150, seed=1), {"model": model, "max_model_len": 256, "max_num_batched_tokens": 32}
    answer(open_engine(tmp_path / "store", **settings), prompt[:32])
    engine, fresh = open_engine(tmp_path / "store", **settings), open_engine(None, **settings)
    assert answer(engine, prompt, prompt_logprobs=1) == answer(fresh, prompt, prompt_logprobs=1)
    assert taken(engine) == (0, 150)


def test_other_weights_of_the_same_shapes_another_dtype_or_more_ranks_find_nothing(
    open_engine: Open, tmp_path: Path, path: Path
) -> None:
    prompt, store = random_tokens(60, seed=1), tmp_path / "store"
    said_first = [answer(open_engine(store, tensor_parallel_size=ranks), prompt) for ranks in (1, 2)]
    changed = Path(shutil.copytree(path, tmp_path / "changed"))
    weights = load_file(path / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][:, -1] += 0.5  # the last column: of rank 1 alone
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    others: list[dict[str, Any]] = [
        {"model": changed},
        {"model": changed, "tensor_parallel_size": 2},
        {"dtype": "bfloat16"},
        {"tensor_parallel_size": 4},
        {"load_format": "dummy"},
    ]
    for other in others:
        engine = open_engine(store, **other)
        answer(engine, prompt)
        assert taken(engine) == (0, 60), other
    for ranks in (1, 2):
        engine = open_engine(store, tensor_parallel_size=ranks)
        assert answer(engine, prompt) == said_first[ranks - 1], "the first ones' files were written by others"
        assert taken(engine) == (60, 0)


def truncate(file: Path, _: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def empty(file: Path, _: Path) -> None:
    file.write_bytes(b"")


def flip_a_bit(file: Path, _: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-4001] ^= 1
    file.write_bytes(data)


def garble_the_header(file: Path, _: Path) -> None:
    data = bytearray(file.read_bytes())
    data[8:40] = b"\xff" * 32
    file.write_bytes(data)


def take_another_chunks_content(file: Path, other: Path) -> None:
    shutil.copyfile(other, file)


def take_another_file(file: Path, _: Path) -> None:
    save_file({"keys": torch.zeros(3)}, file)


DAMAGES = [truncate, empty, flip_a_bit, garble_the_header, take_another_chunks_content, take_another_file]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_computed_again_and_written_again(
    open_engine: Open, tmp_path: Path, damage: Callable[[Path, Path], None]
) -> None:
    prompt = random_tokens(128, seed=1)
    expected = answer(open_engine(tmp_path), prompt)
    file, other = sorted(tmp_path.iterdir())
    whole = file.read_bytes()
    damage(file, other)
    for from_store in (64, 128):
        engine = open_engine(tmp_path)
        assert answer(engine, prompt) == expected
        assert taken(engine) == (from_store, 128 - from_store)
    assert file.read_bytes() == whole
    assert len(list(tmp_path.iterdir())) == 2, "a temporary file is left"


def test_where_one_rank_lacks_its_file_all_compute(open_engine: Open, tmp_path: Path) -> None:
    prompt = random_tokens(150, seed=1)
    expected = answer(open_engine(tmp_path, tensor_parallel_size=2), prompt, prompt_logprobs=1)
    for rank, computed in ((0, 22), (1, 22), (0, 0)):
        engine = open_engine(tmp_path, tensor_parallel_size=2)
        if computed:
            min(tmp_path.glob(f"*.{rank}-of-2.safetensors"), key=lambda file: file.stat().st_size).unlink()  # the last chunk's
        assert answer(engine, prompt, prompt_logprobs=1) == expected
        assert taken(engine) == (150 - computed, computed)


def test_a_folder_that_cannot_be_written_to_is_refused(open_engine: Open, tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with pytest.raises(ValueError, match=f"prefill_store='{in_the_way}/store' cannot be written to on node"):
        open_engine(in_the_way / "store")


def test_an_engine_whose_store_breaks_says_so_once_and_goes_on(
    open_engine: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, prompt = tmp_path / "store", random_tokens(150, seed=1)
    engine = open_engine(store)
    store.rmdir()
    with caplog.at_level(logging.WARNING):
        assert answer(engine, prompt) == answer(open_engine(None), prompt)
    assert [record.message.partition(" no more")[0] for record in caplog.records] == [f"prefill_store='{store}':"]


def test_a_rebuilt_engine_replays_from_the_store(open_engine: Open, tmp_path: Path) -> None:
    prompts = [random_tokens(length, seed=length) for length in (150, 90)]
    engine, undisturbed = open_engine(tmp_path, tensor_parallel_size=2), open_engine(None, tensor_parallel_size=2)
    outputs = [engine.add(prompt, **greedy(max_tokens=8)) for prompt in prompts]
    while len(outputs[1].outputs[0].token_ids) < 2:
        engine.step()
    engine.group.rebuild()
    engine.driver.resume()
    engine.finish()
    assert taken(engine) == (240, 240)
    expected = [answer(undisturbed, prompt, max_tokens=8)[0] for prompt in prompts]
    assert [out.outputs[0].token_ids for out in outputs] == [samples[0][0] for _, samples in expected]


def test_scores_are_the_same_bits(path: Path, tmp_path: Path) -> None:
    prompts = [random_tokens(length, seed=length) for length in (150, 40)]
    scores = []
    for sparse in (None, QUEST):
        with make_llm(path, sparse=sparse, prefill_store=tmp_path, **SETTINGS) as llm:
            scores.append(llm.score(prompts, whole_vocabulary=True))
            found = llm.stats()["prefill_tokens"]
    assert found == {"from_store": 190, "computed": 0}
    for first, second in zip(*scores):
        assert first.logprobs is not None and second.logprobs is not None
        assert (first.logprobs.view("int32") == second.logprobs.view("int32")).all()


def test_a_relative_folder_is_that_of_the_process_that_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert EngineConfig(model="m", prefill_store="kept").prefill_store == str(tmp_path / "kept")  # a Ray actor runs elsewhere
    assert EngineConfig(model="m", prefill_store=tmp_path).prefill_store == str(tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prefill_store=3 must be a non-empty string; give a folder"):
        EngineConfig(model="m", prefill_store=3)  # type: ignore[arg-type]
