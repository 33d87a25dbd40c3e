"""docs/methods/your-own.md: its method runs as it stands there, in the engine and as a selector."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from distributed_sparse import SamplingParams
from tests.support.checkpoints import tiny_checkpoint
from tests.support.engine import make_llm
from tests.support.promise_b import count_ties
from tests.support.prompts import random_tokens
from tests.support.stepped_shard import SteppedShard

pytestmark = pytest.mark.usefixtures("one_thread")  # on CPU, equal bits are promised at one thread

PAGE = Path(__file__).resolve().parents[1] / "docs" / "methods" / "your-own.md"
SPARSE = {"method": "page_mean:MeanPolicy", "token_budget": 64, "dense_layers": 0, "recent_pages": 1}
LIMITS = {"max_num_seqs": 4, "max_num_batched_tokens": 100, "max_model_len": 400}


@pytest.fixture(scope="module")
def page_mean(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0]
    assert len(code.splitlines()) < 60
    folder = tmp_path_factory.mktemp("outside")
    (folder / "page_mean.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield importlib.import_module("page_mean")
    del sys.modules["page_mean"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), "qwen2", max_position_embeddings=512)


def scored(path: Path, sparse: dict | None, ranks: int = 1) -> tuple[list[np.ndarray], dict]:
    prompts = [random_tokens(length, seed=length) for length in (60, 330)]
    with make_llm(path, ranks, sparse=sparse, **LIMITS) as llm:
        outputs = llm.score(prompts, whole_vocabulary=True, decode_last_prompt_tokens=5)
        return [output.logprobs for output in outputs if output.logprobs is not None], llm.stats()["attention"]


def test_it_is_bitwise_dense_where_the_budget_covers_the_context_and_sparse_elsewhere(
    path: Path, page_mean: ModuleType
) -> None:
    (short, long), _ = scored(path, None)
    (covered, sparse), attention = scored(path, SPARSE)
    assert np.array_equal(short.view(np.int32), covered.view(np.int32))
    assert np.abs(long[-1] - sparse[-1]).max() > 1e-3 and attention["rows_sparse"] > 0


def test_ranks_together_draw_the_tokens_of_one_rank(path: Path, page_mean: ModuleType) -> None:
    prompts = [random_tokens(length, seed=length) for length in (300, 40, 151)]
    params = [SamplingParams(temperature=0.8, seed=seed, max_tokens=12, ignore_eos=True, logprobs=331) for seed in range(3)]
    found = []
    for ranks in (1, 2):
        with make_llm(path, ranks, sparse=SPARSE, **LIMITS) as llm:
            found.append(llm.generate(prompts, params, use_tqdm=False))
    assert count_ties(found[0], found[1], params) == 0


@torch.inference_mode()
def test_its_metadata_is_the_mean_of_what_a_page_holds_whatever_it_held_before(path: Path, page_mean: ModuleType) -> None:
    engine = SteppedShard(path, 40, sparse=SPARSE, **LIMITS)
    for layer in engine.shard.cache.layers:
        layer.k_pages.fill_(torch.nan)
        layer.metadata["key_means"].fill_(torch.nan)
    engine.start([100])
    for _ in range(20):  # over the end of a page
        engine.decode()
    table, length = engine.shard.slots.page_table[0], engine.lengths[0]
    for layer in engine.shard.cache.layers:
        for index in range(-(-length // 16)):
            page = int(table[index])
            keys = layer.k_pages[page, :, : min(16, length - 16 * index)]
            torch.testing.assert_close(layer.metadata["key_means"][page], keys.mean(1))


def test_its_scorer_is_a_selector(path: Path, page_mean: ModuleType) -> None:
    twilight = {"method": "twilight", "selector": "page_mean:MeanScorer", "min_candidates": 64, "p": 0.5, "dense_layers": 0}
    _, attention = scored(path, twilight)
    assert attention["rows_sparse"] > 0
    with pytest.raises(ValueError, match=r"sparse.selector='page_mean:MeanPolicy' is not a subclass of .*Scorer"):
        make_llm(path, sparse={**twilight, "selector": "page_mean:MeanPolicy"})
