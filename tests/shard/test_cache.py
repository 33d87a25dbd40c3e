"""A page's metadata is a function of the keys that it holds, at every moment: recomputed from K it is the same bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed_sparse.cache import Geometry, LayerCache, PagedCache
from distributed_sparse.driver.requests import Sequence
from distributed_sparse.kernels.reference import quantise_reference, signatures_reference
from distributed_sparse.kernels.sketch.sketch import append_sketches
from distributed_sparse.selection.dense import DenseConfig, DensePolicy
from distributed_sparse.selection.quest import QuestConfig, QuestPolicy
from distributed_sparse.selection.sketch import KeySketches, sketches_of
from tests.support.checkpoints import tiny_checkpoint
from tests.support.eager_selectors import HashScores, Margins
from tests.support.hash_weights import random_hash_weights
from tests.support.prompts import random_tokens
from tests.support.stepped_engine import SteppedEngine

pytestmark = pytest.mark.each_value

PAGE, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 16, 3, 8, 4, 16
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
QUEST = {"method": "quest", "token_budget": 48, "recent_pages": 1, "dense_layers": 0}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("qwen2"), "qwen2")


@pytest.fixture(params=[1, 2], ids=["one rank", "two ranks"])
def ranks(request: pytest.FixtureRequest) -> int:
    return request.param


@dataclass(frozen=True)
class Kept:
    """A method's settings, the bytes that it keeps per page and KV head, and what it keeps, from the definition.

    `metadata(layer, first_kv_head, keys, values)`: both [H_kv, count, d] of one page -> by name [H_kv, count, ...], or
    [H_kv, 2, d]; `of_full_pages`: [H_kv, ...], and other pages keep any bits.
    """

    sparse: dict[str, Any]
    page_bytes: int
    metadata: Callable[[int, int, Tensor, Tensor], dict[str, Tensor]]
    of_full_pages: bool = False


def page_min_max(layer: int, first_kv_head: int, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
    return {"page_min_max": torch.stack([keys.amin(1), keys.amax(1)], dim=1)}


@cache  # the same tokens are looked at after every step
def quantised(key: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    codes, scales = quantise_reference(torch.tensor(key)[None, None], bits=4)
    return codes[0, 0], scales[0, 0]


def low_bit_keys(layer: int, first_kv_head: int, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
    """Of Twilight over Quest, which keeps bounds, too."""
    tokens = [quantised(tuple(key)) for of_head in keys.tolist() for key in of_head]
    codes, scales = (torch.stack(each).unflatten(0, keys.shape[:2]) for each in zip(*tokens))
    return {"key_codes": codes, "key_scales": scales, **page_min_max(layer, first_kv_head, keys, values)}


def sketches(layer: int, first_kv_head: int, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
    """By the kernel that writes them, of one full page alone; tests/kernels compares it with the definition."""
    raw = (pages.contiguous().view(torch.uint8).numpy().tobytes() for pages in (keys, values))
    return sketches_of_page(*raw, keys.shape[0], keys.dtype)


@cache  # the same pages are looked at after every step
def sketches_of_page(keys_bytes: bytes, values_bytes: bytes, heads: int, dtype: torch.dtype) -> dict[str, Tensor]:
    keys, values = (torch.frombuffer(bytearray(b), dtype=dtype).view(heads, PAGE, HEAD_DIM) for b in (keys_bytes, values_bytes))
    kept = KeySketches().allocate(1, Geometry(*keys.shape[:1], 1, HEAD_DIM, PAGE, keys.dtype, keys.device, 0))
    own = LayerCache(0, keys[None], values[None], metadata=kept)
    one = torch.tensor([0], dtype=torch.int32)
    append_sketches(keys[None], values[None], one, one, one + PAGE, sketches_of(own))
    return {name: tensor[0] for name, tensor in kept.items()}


def signatures(path: str) -> Callable[[int, int, Tensor, Tensor], dict[str, Tensor]]:
    """By the networks of a file."""
    networks = HashScores(path, Margins())
    group = HEADS // KV_HEADS

    @cache
    def signed(layer: int, head: int, key: tuple[float, ...]) -> Tensor:
        heads = range(head * group, (head + 1) * group)
        outputs = [networks.outputs(layer, "k", query_head, torch.tensor([key])) for query_head in heads]
        return signatures_reference(torch.cat(outputs))  # [G, bits / 32]

    def metadata(layer: int, first_kv_head: int, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        tokens = [
            signed(layer, head, tuple(key)) for head, of_head in enumerate(keys.tolist(), first_kv_head) for key in of_head
        ]
        return {"key_signatures": torch.stack(tokens).unflatten(0, keys.shape[:2])}

    return metadata


@pytest.fixture(scope="module", params=["quest", "twilight", "sketch", "hash"])
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    bounds = 2 * HEAD_DIM * 4
    if request.param == "quest":
        return Kept(QUEST, bounds, page_min_max)
    if request.param == "sketch":
        sparse = {"method": "sketch", "min_tokens": 32, "dense_layers": 0}
        return Kept(sparse, PAGE * HEAD_DIM // 8 + PAGE // 2 + HEAD_DIM // 2 + HEAD_DIM // 4 + 12, sketches, of_full_pages=True)
    if request.param == "twilight":
        sparse = {"method": "twilight", "p": 0.8, "candidate_fraction": 0.5, "min_candidates": 32, "dense_layers": 0}
        return Kept(sparse, bounds + PAGE * (HEAD_DIM // 2 + 4), low_bit_keys)
    weights = random_hash_weights(tmp_path_factory.mktemp("hash") / "hash.safetensors", range(LAYERS), HEADS, HEAD_DIM)
    sparse = {"method": "hash", "token_budget": 48, "recent_pages": 1, "dense_layers": 0, "hash_weights": weights}
    return Kept(sparse, PAGE * (HEADS // KV_HEADS) * 4, signatures(weights))


def make_engine(path: Path, ranks: int = 1, sparse: dict[str, Any] = QUEST, **engine_args: Any) -> SteppedEngine:
    limits = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    return SteppedEngine(path, ranks, **{"sparse": sparse, **limits, **engine_args})


def sequences(engine: SteppedEngine) -> list[Sequence]:
    """Those that hold pages."""
    return [sequence for request in engine.driver.scheduler.running for sequence in request.sequences if sequence.pages]


def held_pages(engine: SteppedEngine) -> dict[int, int]:
    """Tokens in each page that a sequence holds. A page that is shared is full, or about to be."""
    held: dict[int, int] = {}
    told_next = {target for _, target in engine.driver.scheduler._page_copies}  # forks reach the shards with the next plan
    for sequence in sequences(engine):
        for place, page in enumerate(sequence.pages):
            count = min(sequence.num_computed - place * PAGE, PAGE)
            assert held.setdefault(page, count) == count, "sequences that share a page disagree on what it holds"
    return {page: count for page, count in held.items() if count > 0 and page not in told_next}


def assert_metadata_is_exact(engine: SteppedEngine, kept: Kept) -> int:
    """Recompute what every held page keeps from its keys, in every layer of every rank; how many pages there were."""
    held = held_pages(engine)
    for rank, shard in enumerate(engine.group.shards):
        for layer, own in enumerate(shard.cache.layers):
            first_kv_head = rank * own.k_pages.shape[1]
            for page, count in held.items():
                keys, values = (pages[page, :, :count] for pages in (own.k_pages, own.v_pages))
                assert keys.abs().amax(-1).min() > 0, "a key has not been written"
                if kept.of_full_pages and count < PAGE:
                    continue
                expected = kept.metadata(layer, first_kv_head, keys, values)
                assert expected.keys() == own.metadata.keys()
                for name, wanted in expected.items():
                    found = own.metadata[name][page]
                    found = found if name == "page_min_max" or kept.of_full_pages else found[:, :count]
                    assert found.dtype == wanted.dtype
                    assert torch.equal(bits(found), bits(wanted)), f"{name}: layer {layer}, page {page} of {count} tokens"
    return len(held)


def bits(x: Tensor) -> Tensor:
    """So that -0.0 and +0.0 differ."""
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.dtype.itemsize])


def keys_of(engine: SteppedEngine, sequence: Sequence) -> Tensor:
    """[layers, H_kv, n, d] of all ranks' heads, in logical order."""
    layers = []
    for layer in range(len(engine.group.shards[0].cache.layers)):
        pages = [shard.cache.layers[layer].k_pages[sequence.pages] for shard in engine.group.shards]
        of_sequence = torch.cat(pages, dim=1).transpose(0, 1).flatten(1, 2)  # [H_kv, pages * PAGE, d]
        layers.append(of_sequence[:, : sequence.num_computed])
    return torch.stack(layers)


# ---- at every moment of a sequence's life


@pytest.mark.parametrize(
    ("chunk", "dtype"), [(1, "float32"), (5, "bfloat16"), (7, "float32"), (16, "bfloat16"), (23, "float32")]
)
def test_after_prompt_chunks_of_odd_sizes(path: Path, kept: Kept, ranks: int, chunk: int, dtype: str) -> None:
    with make_engine(path, ranks, kept.sparse, max_num_batched_tokens=chunk, max_num_seqs=1, dtype=dtype) as engine:
        engine.add(random_tokens(55), max_tokens=1, **GREEDY)
        seen = []
        for _ in range(54 // chunk):  # all chunks but the one that ends the prompt, and with it the request
            engine.step()
            seen.append(assert_metadata_is_exact(engine, kept))
        assert seen[0] == -(-chunk // PAGE) and seen[-1] >= 3


def test_after_every_decode_step_across_page_borders(path: Path, kept: Kept, ranks: int) -> None:
    with make_engine(path, ranks, kept.sparse) as engine:
        engine.add(random_tokens(30), max_tokens=40, **GREEDY)
        engine.add(random_tokens(17, seed=1), max_tokens=40, **GREEDY)
        counts = set()
        for _ in range(39):
            engine.step()
            assert_metadata_is_exact(engine, kept)
            counts.add(tuple(len(sequence.pages) for sequence in sequences(engine)))
        assert {(2, 2), (3, 2), (4, 3), (5, 4)} <= counts


def test_after_pages_have_been_recycled_by_other_requests(path: Path, kept: Kept, ranks: int) -> None:
    """A cache of eleven pages: every later request writes over pages of earlier ones, with fewer tokens in the last."""
    page_bytes = LAYERS * (KV_HEADS // ranks) * (2 * PAGE * HEAD_DIM * 4 + kept.page_bytes)
    with make_engine(path, ranks, kept.sparse, kv_cache_memory_bytes=12 * page_bytes, max_num_batched_tokens=13) as engine:
        assert engine.driver.allocator.total == 11
        outputs = [
            engine.add(random_tokens(length, seed=length), max_tokens=max_tokens, **GREEDY)
            for length, max_tokens in ((60, 20), (33, 12), (5, 50), (81, 3), (18, 18), (47, 9))
        ]
        owners: dict[int, set[str]] = {}
        while engine.driver.has_work:
            engine.step()
            assert_metadata_is_exact(engine, kept)
            for sequence in sequences(engine):
                for page in sequence.pages:
                    owners.setdefault(page, set()).add(sequence.request.request_id)
        assert sum(len(requests) > 1 for requests in owners.values()) >= 8, "hardly a page was recycled"
        assert [len(output.outputs[0].token_ids) for output in outputs] == [20, 12, 50, 3, 18, 9]


@pytest.mark.parametrize("length", [32, 37, 47])
def test_after_a_fork_by_n(path: Path, kept: Kept, ranks: int, length: int) -> None:
    """Three samples of one prompt: full pages are shared, the partial one is copied, and each goes on by itself."""
    with make_engine(path, ranks, kept.sparse) as engine:
        engine.add(random_tokens(length), n=3, temperature=2.0, seed=1, max_tokens=22, ignore_eos=True)
        engine.step()
        for _ in range(20):
            engine.step()
            assert assert_metadata_is_exact(engine, kept) >= 2
            first, *others = sequences(engine)
            assert len(others) == 2
            for other in others:
                shared = length // PAGE
                assert other.pages[:shared] == first.pages[:shared]
                assert not set(other.pages[shared:]) & set(first.pages[shared:])
                keys, expected = keys_of(engine, other), keys_of(engine, first)
                assert torch.equal(keys[:, :, :length], expected[:, :, :length])
        tokens = [tuple(sequence.output_token_ids) for sequence in sequences(engine)]
        assert len(set(tokens)) == 3
        differ = min(i for i in range(20) if len({sample[i] for sample in tokens}) > 1)
        assert not torch.equal(keys[:, :, length + differ :], expected[:, :, length + differ :])


def test_after_a_fork_whose_samples_end_at_once_and_whose_slots_go_to_others(path: Path, kept: Kept, ranks: int) -> None:
    with make_engine(path, ranks, kept.sparse) as engine:
        for number in range(6):
            length = 20 + 3 * number
            engine.add(random_tokens(length), n=3, temperature=1.0, seed=number, max_tokens=1 + number % 3, ignore_eos=True)
        late = engine.add(random_tokens(90), max_tokens=9, **GREEDY)
        while engine.driver.has_work:
            engine.step()
            assert_metadata_is_exact(engine, kept)
        assert engine.driver.allocator.used == engine.driver.allocator.reserved == 0
    with make_engine(path, ranks, kept.sparse) as engine:
        alone = engine.add(random_tokens(90), max_tokens=9, **GREEDY)
        engine.finish()
    assert late.outputs[0].token_ids == alone.outputs[0].token_ids


@pytest.mark.slow
def test_after_requests_have_been_aborted(path: Path, kept: Kept) -> None:
    with make_engine(path, 1, kept.sparse, max_num_batched_tokens=11) as engine:
        outputs = [engine.add(random_tokens(50, seed=seed), max_tokens=30, **GREEDY) for seed in range(4)]
        for step in range(60):
            engine.step()
            assert_metadata_is_exact(engine, kept)
            if step in (2, 12):
                engine.abort(outputs[step // 12])
                engine.add(random_tokens(70, seed=9), max_tokens=20, **GREEDY)
        engine.finish()
        assert [output.outputs[0].finish_reason for output in outputs] == ["abort", "abort", "length", "length"]
        assert engine.driver.allocator.used == engine.driver.allocator.reserved == 0


def test_chunks_change_no_key_by_more_than_rounding(path: Path) -> None:
    """The same prompt, read at once or in chunks of seven: a page does not tell how it was filled."""
    keys = []
    for chunk in (64, 7):
        with make_engine(path, max_num_batched_tokens=chunk, max_num_seqs=1) as engine:
            engine.add(random_tokens(55), max_tokens=2, **GREEDY)
            while not any(sequence.num_computed == 55 for sequence in sequences(engine)):
                engine.step()
            keys.append(keys_of(engine, sequences(engine)[0]))
    torch.testing.assert_close(keys[0], keys[1], rtol=0, atol=1e-5 * float(keys[0].std()))


def test_ranks_hold_their_heads_of_the_same_tokens_in_the_same_pages(path: Path) -> None:
    """Two ranks' keys side by side are those of one rank: head by head, page by page."""
    held = {}
    for ranks in (1, 2, 4):
        with make_engine(path, ranks, max_num_batched_tokens=19) as engine:
            for seed in range(3):
                engine.add(random_tokens(40 + seed, seed=seed), max_tokens=20, **GREEDY)
            for _ in range(15):
                engine.step()
            held[ranks] = [(sequence.pages, keys_of(engine, sequence)) for sequence in sequences(engine)]
    for ranks in (2, 4):
        for (pages, keys), (own_pages, own_keys) in zip(held[1], held[ranks], strict=True):
            assert own_pages == pages
            torch.testing.assert_close(own_keys, keys, rtol=0, atol=1e-5 * float(keys.std()))


# ---- the cache itself

GEOMETRY = Geometry(
    num_kv_heads=2, group_size=2, head_dim=8, page_size=PAGE, dtype=torch.float16, device=torch.device("cpu"), first_kv_head=0
)


def mixed_cache(num_pages: int) -> PagedCache:
    """A dense layer, which keeps no metadata, and a Quest layer, filled with random bits."""
    policies = [DensePolicy(DenseConfig(), GEOMETRY), QuestPolicy(QuestConfig(), GEOMETRY)]
    cache = PagedCache(num_pages, GEOMETRY, [policy.metadata for policy in policies])
    for layer in cache.layers:
        for pages in layer.pages:
            pages.copy_(torch.randn(pages.shape))
    return cache


def test_only_layers_whose_method_asks_for_metadata_keep_it() -> None:
    cache = mixed_cache(7)
    assert [list(layer.metadata) for layer in cache.layers] == [[], ["page_min_max"]]

    kv_bytes, metadata_bytes = PagedCache.page_bytes(
        GEOMETRY, [DensePolicy(DenseConfig(), GEOMETRY).metadata, QuestPolicy(QuestConfig(), GEOMETRY).metadata]
    )
    assert 7 * kv_bytes == sum(layer.k_pages.nbytes + layer.v_pages.nbytes for layer in cache.layers)
    assert 7 * metadata_bytes == sum(kept.nbytes for layer in cache.layers for kept in layer.metadata.values())


def test_a_copied_page_takes_keys_values_and_metadata_along_and_changes_no_other() -> None:
    cache = mixed_cache(9)
    before = [[pages.clone() for pages in layer.pages] for layer in cache.layers]
    # One page twice, and one that is read and written in the same step: all are read before any is written.
    cache.copy_pages(torch.tensor([3, 3, 5]), torch.tensor([5, 6, 1]))
    source = [0, 5, 2, 3, 4, 3, 3, 7, 8]
    for layer, old in zip(cache.layers, before):
        for pages, expected in zip(layer.pages, old):
            assert torch.equal(pages, expected[source])
