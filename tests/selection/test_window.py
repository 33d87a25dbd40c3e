"""The window reads the first pages and the newest ones, and nothing that depends on what they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from distributed_sparse import SamplingParams
from distributed_sparse.selection import layer_configs, resolve_sparse_config
from distributed_sparse.selection.base import Policy
from distributed_sparse.selection.window import WindowConfig, WindowPolicy
from tests.support.checkpoints import tiny_checkpoint
from tests.support.decode_rows import DecodeRows, decode_rows, lists
from tests.support.engine import make_llm
from tests.support.prompts import random_tokens
from tests.support.transformers_reference import PageMethod, assert_close_to, greedy_tokens_of_method, reference_logits

pytestmark = pytest.mark.usefixtures("one_thread")  # on CPU, equal bits are promised at one thread

CONTEXTS = [333, 5, 64, 65, 17, 200, 1, 1100]


def window(rows: DecodeRows, **settings: Any) -> Policy:
    config = WindowConfig(**settings)
    config.check(rows.geometry.page_size)
    return WindowPolicy(config, rows.geometry)


def expected_pages(rows: DecodeRows, row: int, token_budget: int, sink_pages: int, min_context: int = 0) -> list[int]:
    count, context = int(rows.batch.num_pages[row]), int(rows.batch.context_lens[row])
    table = rows.batch.page_table[row, :count].tolist()
    budget = -(-token_budget // rows.batch.page_size)
    if count <= budget or context < min_context:
        return table
    return table[:sink_pages] + table[count - (budget - sink_pages) :]


@pytest.mark.parametrize("min_context", [0, 65, 66, 201])
@pytest.mark.parametrize(("token_budget", "sink_pages"), [(48, 1), (64, 1), (70, 1), (96, 0), (96, 4)])
def test_every_head_reads_the_sinks_and_the_newest_pages(token_budget: int, sink_pages: int, min_context: int) -> None:
    rows = decode_rows(CONTEXTS)
    settings = {"token_budget": token_budget, "sink_pages": sink_pages, "min_context": min_context}
    selection = rows.select(window(rows, **settings))
    expected = [[expected_pages(rows, row, **settings)] * 4 for row in range(len(CONTEXTS))]
    assert lists(selection) == expected


def test_a_row_is_the_same_alone_in_another_order_and_on_fewer_heads() -> None:
    rows = decode_rows(CONTEXTS)
    selection = rows.select(window(rows, token_budget=80))
    output = rows.attend(selection)
    assert torch.isfinite(output).all()
    order = [7, 0, 3, 6, 1, 5, 2, 4]
    for some in (order, *([row] for row in range(len(CONTEXTS)))):
        part = rows.of_sequences(some, spare_columns=3).of_heads(1, 3)
        own = part.select(window(part, token_budget=80))
        assert lists(own) == [lists(selection)[row][1:3] for row in some]
        assert torch.equal(part.attend(own), output[some, 2:6])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "evict=true frees pages that the dense_layers=2 dense layers would read; set dense_layers: 0"),
        (
            {"dense_layers": 0, "token_budget": 64, "min_context": 65},
            "frees pages that contexts below min_context=65 would read beyond token_budget=64; set min_context to 64 or less",
        ),
        (
            {"dense_layers": 0, "token_budget": 64, "layers": [{"range": "1", "token_budget": 80}]},
            "layers range '1' sets token_budget=80, but with evict=true all layers keep the same pages; leave it at 64",
        ),
        ({"dense_layers": 0, "layers": [{"range": "0-1", "sink_pages": 0}]}, "sets sink_pages=0, .* leave it at 1"),
        ({"dense_layers": 0, "layers": [{"range": "0-1", "evict": False}]}, "sets evict=False, .* leave it at True"),
        ({"dense_layers": 0, "layers": [{"range": "0", "dense_layers": 1}]}, "the dense_layers=1 dense layers would read"),
        (
            {"dense_layers": 0, "token_budget": 64, "layers": [{"range": "2", "min_context": 70}]},
            "contexts below min_context=70 would read beyond token_budget=64",
        ),
        (
            {"dense_layers": 0, "evict": False, "layers": [{"range": "2", "evict": True}]},
            "layers range '2' sets evict=true, but a page is freed in all layers or in none; set evict: true beside",
        ),
        ({"evict": "yes"}, "bool.*evict"),
    ],
)
def test_eviction_is_refused_where_a_layer_would_read_what_another_frees(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_sparse_config({"method": "window", "evict": True, **settings})


def test_overrides_that_keep_the_same_pages_go_with_eviction() -> None:
    override = {"range": "1-2", "evict": True, "token_budget": 70, "sink_pages": 1, "recent_pages": 2, "min_context": 70}
    config = resolve_sparse_config(
        {"method": "window", "evict": True, "dense_layers": 0, "token_budget": 70, "layers": [override]}
    )
    layer_configs(config, 3, 16)
    assert config.evict_window(16) == (1, 4)
    assert config.evict_window(64) == (1, 1)


@pytest.mark.parametrize(("token_budget", "sink_pages", "min_context"), [(48, 1, 0), (70, 1, 70), (96, 0, 96), (96, 4, 50)])
def test_only_kept_pages_are_read(token_budget: int, sink_pages: int, min_context: int) -> None:
    rows = decode_rows(CONTEXTS)
    settings = {"token_budget": token_budget, "sink_pages": sink_pages, "min_context": min_context}
    before = rows.select(window(rows, **settings))
    policy = window(rows, **settings, evict=True, dense_layers=0)
    evict_window = policy.config.evict_window(16)
    assert evict_window is not None
    sink, recent = evict_window
    for row, count in enumerate(rows.batch.num_pages.tolist()):
        rows.batch.page_table[row, sink : max(sink, count - recent)] = 0  # the null page, which holds NaN here
    assert lists(rows.select(policy)) == lists(before)
    assert torch.isfinite(rows.attend(rows.select(policy))).all()


@pytest.mark.parametrize("settings", [{"token_budget": 64}, {"token_budget": 48, "dense_layers": 0, "sink_pages": 0}])
def test_decoding_equals_an_eager_model_with_a_window(tmp_path: Path, settings: dict[str, Any]) -> None:
    path = tiny_checkpoint(tmp_path, "qwen3")
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="page_method").eval()
    emulation = PageMethod("window", **settings)
    scored, prompt = random_tokens(130, seed=6), random_tokens(75, seed=7)
    with make_llm(path, sparse={"method": "window", **settings}) as llm:
        (found,) = llm.score(scored, whole_vocabulary=True, decode_last_prompt_tokens=60)
        output = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True), use_tqdm=False)[0]
    expected = reference_logits(model, scored, decoded=60, emulation=emulation)
    assert_close_to(found.logprobs, expected)
    assert output.outputs[0].token_ids == greedy_tokens_of_method(model, prompt, 60, emulation)
    assert (reference_logits(model, scored, decoded=60) - expected).abs().max() > 0.1 * expected.std()
