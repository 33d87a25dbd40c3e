"""A filled cache is as a prompt would have left it, but for the keys and values themselves, at any tensor_parallel_size."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distributed_sparse.config import EngineConfig
from distributed_sparse.protocol.step import PrefillChunk, SlotSetup, StepPlan
from distributed_sparse.shard.collectives.collectives import Collectives
from distributed_sparse.tools.bench import synthetic
from distributed_sparse.tools.bench.synthetic import SyntheticShard, blocks, synthetic_kv
from tests.support.bench_models import tiny_shape

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE, PROMPT, DIM = 16, 90, 64
PAGES = {0: [7, 3, 9, 1, 4, 12], 1: [2, 5, 6, 8, 10, 11]}
"""Of each slot, scattered."""


def make_shard(folder: Path, rank: int = 0, world_size: int = 1, fill_from: int = 32) -> SyntheticShard:
    """A rank that is on its own: what it would sum with the others is its own part."""
    config = EngineConfig(
        model=str(tiny_shape(folder)),
        load_format="dummy",
        device="cpu",
        tensor_parallel_size=world_size,
        max_model_len=128,
        max_num_seqs=2,
        kv_cache_memory_bytes=1 << 22,
        sparse={"method": "quest", "token_budget": 32, "recent_pages": 1, "dense_layers": 0},
    )
    store = dist.HashStore() if world_size > 1 else None
    shard = SyntheticShard(config, rank, world_size, Collectives(rank, world_size, store=store), fill_from=fill_from)
    shard.load()
    shard.allocate(16)
    return shard


def setup(slot: int, prompt_length: int = PROMPT) -> SlotSetup:
    return SlotSetup(slot, prompt_length, prompt_length, 0, 0, 0.0, 1.0, 0, 0.0, None, [], 0)


def fill(shard: SyntheticShard, borders: list[int]) -> None:
    """Two prompts, cut into chunks at these borders; the last chunk is sampled from."""
    for number, (start, stop) in enumerate(pairwise(borders)):
        first = number == 0
        held = [len(PAGES[slot]) if stop == PROMPT else -(-stop // PAGE) for slot in PAGES]
        before = 0 if first else -(-start // PAGE)
        plan = StepPlan(
            step=number,
            generation=0,
            setups=[setup(slot) for slot in PAGES] if first else [],
            new_pages=[(slot, PAGES[slot][before : held[slot]]) for slot in PAGES],
            prefill=[
                PrefillChunk(slot, start, [5 + slot] * (stop - start), [slot] if stop == PROMPT else []) for slot in PAGES
            ],
        )
        result = shard.begin(plan).result()
        assert len(result.tokens) == (2 if stop == PROMPT and shard.spec.rank == 0 else 0)


def held_keys(shard: SyntheticShard, layer: int, slot: int) -> tuple[Tensor, Tensor]:
    """K and V [H_kv, PROMPT, d] of a sequence in logical order."""
    cache = shard.cache.layers[layer]
    return tuple(x[PAGES[slot]].transpose(0, 1).flatten(1, 2)[:, :PROMPT] for x in (cache.k_pages, cache.v_pages))  # type: ignore[return-value]


def test_positions_are_cut_into_blocks_and_each_is_filled_once() -> None:
    for start, stop in ((0, 10), (4090, 4100), (4096, 8192), (5, 12295)):
        seen = [block * synthetic.BLOCK + i for block, own, _ in blocks(start, stop) for i in range(own.start, own.stop)]
        where = [i for _, _, where in blocks(start, stop) for i in range(where.start, where.stop)]
        assert seen == list(range(start, stop)) and where == list(range(stop - start))


def test_keys_follow_from_layer_global_head_and_position_alone() -> None:
    k, v = synthetic_kv(2, 5, 1, DIM, "cpu")
    again = synthetic_kv(2, 5, 1, DIM, "cpu")
    assert torch.equal(k, again[0]) and torch.equal(v, again[1])
    assert k.std() == pytest.approx(synthetic.KEY_SPREAD, rel=0.02) and v.std() == pytest.approx(1.0, rel=0.02)
    for other in ((3, 5, 1), (2, 4, 1), (2, 5, 0)):
        assert not torch.equal(k, synthetic_kv(*other, DIM, "cpu")[0])


@pytest.mark.parametrize("borders", [[0, PROMPT], [0, 40, 80, PROMPT], [0, PROMPT - 1, PROMPT]])
def test_the_pages_hold_the_synthetic_keys_and_their_bounds_whatever_the_chunks(
    tmp_path: Path, borders: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "BLOCK", 32)  # three blocks, none of which ends with a chunk
    shard = make_shard(tmp_path)
    fill(shard, borders)
    for layer, cache in enumerate(shard.cache.layers):
        for slot, pages in PAGES.items():
            keys, values = held_keys(shard, layer, slot)
            for head in range(2):
                drawn = [synthetic_kv(layer, head, block, DIM, "cpu") for block in range(3)]
                for held, expected in zip((keys, values), (torch.cat(parts) for parts in zip(*drawn))):
                    assert torch.equal(held[head, : PROMPT - 1], expected[: PROMPT - 1])
                    assert not torch.equal(held[head, PROMPT - 1], expected[PROMPT - 1]), "the last token runs truly"
            for number, page in enumerate(pages):
                own = keys[:, number * PAGE : min((number + 1) * PAGE, PROMPT)]
                assert torch.equal(cache.metadata["page_min_max"][page], torch.stack([own.amin(1), own.amax(1)], dim=1))


def test_two_ranks_hold_the_heads_that_one_rank_holds(tmp_path: Path) -> None:
    whole = make_shard(tmp_path)
    fill(whole, [0, PROMPT])
    for rank in range(2):
        shard = make_shard(tmp_path, rank, 2)
        fill(shard, [0, PROMPT])
        for layer in range(3):
            for slot in PAGES:
                for own, of_whole in zip(held_keys(shard, layer, slot), held_keys(whole, layer, slot)):
                    assert torch.equal(own[0, : PROMPT - 1], of_whole[rank, : PROMPT - 1])


def test_the_model_runs_last_tokens_of_long_prompts_and_short_prompts_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = make_shard(tmp_path)
    seen: list[list[int]] = []
    forward = shard.model.forward

    def spy(token_ids: Tensor, positions: Tensor, *rest: Any) -> Tensor:
        seen.append(positions.tolist())
        return forward(token_ids, positions, *rest)

    monkeypatch.setattr(shard.model, "forward", spy)
    fill(shard, [0, 48, PROMPT])
    assert seen == [[PROMPT - 1, PROMPT - 1]]
    short = StepPlan(
        step=9, generation=0, setups=[setup(0, 20)], new_pages=[(0, [13, 14])], prefill=[PrefillChunk(0, 0, [5] * 20, [0])]
    )
    shard.begin(short).result()
    assert seen[1:] == [list(range(20))]


def test_log_probabilities_of_a_filled_prompt_are_refused(tmp_path: Path) -> None:
    plan = StepPlan(
        step=0,
        generation=0,
        setups=[setup(0)],
        new_pages=[(0, PAGES[0])],
        prefill=[PrefillChunk(0, 0, [5] * PROMPT, [], targets=[5] * PROMPT)],
    )
    with pytest.raises(ValueError, match="no log-probabilities of prompts of 32 tokens and more"):
        make_shard(tmp_path).begin(plan)
