"""Quest chooses the pages that its definition names, whatever else is in the batch and however the heads are split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from distributed_sparse import SamplingParams
from distributed_sparse.selection.base import Policy
from distributed_sparse.selection.quest import QuestConfig, QuestPolicy
from tests.support.checkpoints import LLAMA3_ROPE, tiny_checkpoint
from tests.support.decode_rows import DecodeRows, decode_rows, listed, lists
from tests.support.engine import make_llm
from tests.support.prompts import random_tokens
from tests.support.transformers_reference import (
    PageMethod,
    assert_close_to,
    greedy_tokens,
    greedy_tokens_of_method,
    reference_logits,
)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.each_value]  # on CPU, equal bits are promised at one thread

CONTEXTS = [333, 5, 64, 65, 17, 200, 1, 1100]


def quest(rows: DecodeRows, **settings: Any) -> Policy:
    config = QuestConfig(**settings)
    config.check(rows.geometry.page_size)
    return QuestPolicy(config, rows.geometry)


def pages_of_reference(rows: DecodeRows, row: int, reference: PageMethod) -> list[list[int]]:
    """Physical pages per KV head of one sequence, from its keys in float64."""
    visible = reference.visible(reference.dense_layers, rows.q[row], rows.keys[row])
    page_size, table = reference.page_size, rows.batch.page_table[row]
    return [[int(table[page]) for page in sorted({int(i) // page_size for i in seen.nonzero()})] for seen in visible]


@pytest.mark.parametrize(
    "settings",
    [
        {"token_budget": 64},
        {"token_budget": 50},
        {"token_budget": 32, "recent_pages": 1},
        {"token_budget": 160, "group_reduction": "sum"},
        {"token_budget": 160, "sink_pages": 0},
        {"token_budget": 160, "sink_pages": 3, "recent_pages": 4},
        {"token_budget": 64, "min_context": 66},
        {"token_budget": 48, "min_context": 300},
    ],
)
@pytest.mark.parametrize(("group", "dtype"), [(1, torch.float32), (4, torch.float32), (2, torch.bfloat16)])
def test_pages_are_those_of_the_definition_in_float64(settings: dict[str, Any], group: int, dtype: torch.dtype) -> None:
    rows = decode_rows(CONTEXTS, group=group, dtype=dtype)
    selection = rows.select(quest(rows, **settings))
    reference = PageMethod("quest", **settings)
    assert selection.tokens is None and selection.log_weight is None and selection.partial is None
    for row in range(len(CONTEXTS)):
        for head, expected in enumerate(pages_of_reference(rows, row, reference)):
            assert listed(selection, row, head) == expected, f"sequence {row}, head {head}"


@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_pages_of_any_size_are_chosen_by_the_same_rule(page_size: int) -> None:
    rows = decode_rows(CONTEXTS, page_size=page_size)
    selection = rows.select(quest(rows, token_budget=200))
    reference = PageMethod("quest", 200, page_size=page_size)
    assert lists(selection) == [pages_of_reference(rows, row, reference) for row in range(len(CONTEXTS))]


def test_heads_of_one_sequence_read_different_pages() -> None:
    """Else a list per sequence instead of one per KV head would pass."""
    rows = decode_rows(CONTEXTS)
    chosen = lists(rows.select(quest(rows, token_budget=64)))
    assert len({str(pages) for pages in chosen[0]}) == 4
    maximum, total = (lists(rows.select(quest(rows, token_budget=64, group_reduction=how))) for how in ("max", "sum"))
    assert maximum != total


def test_a_key_along_the_query_is_found_wherever_it_lies() -> None:
    """One outstanding key per head, each in another page, at the smallest budget that leaves a choice."""
    rows = decode_rows([900], group=1)
    bounds = rows.cache.metadata["page_min_max"]
    assert bounds is not None
    for head, logical in enumerate((1, 20, 33, 55)):
        page = int(rows.batch.page_table[0, logical])
        key = 50.0 * torch.nn.functional.normalize(rows.q[0, head], dim=0)
        rows.cache.k_pages[page, head, 7] = key
        bounds[page, head] = torch.stack([torch.minimum(bounds[page, head, 0], key), torch.maximum(bounds[page, head, 1], key)])
        assert page in listed(rows.select(quest(rows, token_budget=64)), 0, head)


# ---- promise A: a row's pages and output depend on the row alone


def assert_same_row(
    expected: tuple[DecodeRows, Policy], row: int, head: int, found: tuple[DecodeRows, Policy], own_row: int, own_head: int
) -> None:
    """One (sequence, KV head) row in two surroundings: equal pages, equal count, equal bits of attention."""
    outputs = []
    for (rows, policy), r, h in ((expected, row, head), (found, own_row, own_head)):
        selection, group = rows.select(policy), rows.geometry.group_size
        outputs.append((listed(selection, r, h), rows.attend(selection)[r, h * group : (h + 1) * group]))
    assert outputs[0][0] == outputs[1][0]
    bits = torch.int32 if outputs[0][1].dtype == torch.float32 else torch.int16
    assert torch.isfinite(outputs[0][1]).all()
    assert torch.equal(outputs[0][1].view(bits), outputs[1][1].view(bits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("token_budget", [64, 640])
def test_a_row_is_the_same_at_any_split_of_the_heads(token_budget: int, ranks: int, dtype: torch.dtype) -> None:
    whole = decode_rows(CONTEXTS, kv_heads=8, dtype=dtype)
    selection = whole.select(quest(whole, token_budget=token_budget))
    output, pages = whole.attend(selection), lists(selection)
    assert torch.isfinite(output).all()
    heads, group = 8 // ranks, whole.geometry.group_size
    for rank in range(ranks):
        part = whole.of_heads(rank * heads, (rank + 1) * heads)
        own = part.select(quest(part, token_budget=token_budget))
        assert lists(own) == [of_row[rank * heads : (rank + 1) * heads] for of_row in pages]
        assert torch.equal(part.attend(own), output[:, rank * heads * group : (rank + 1) * heads * group])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row", range(len(CONTEXTS)))
def test_a_row_is_the_same_alone_and_in_a_batch(row: int, dtype: torch.dtype) -> None:
    """Alone, the host may know that the budget covers the row; in the batch, the device finds it out."""
    together = decode_rows(CONTEXTS, dtype=dtype)
    alone = together.of_sequences([row])
    for head in range(4):
        policies = quest(together, token_budget=64), quest(alone, token_budget=64)
        assert_same_row((together, policies[0]), row, head, (alone, policies[1]), 0, head)


def test_a_row_is_the_same_in_any_order_of_the_batch() -> None:
    together = decode_rows(CONTEXTS)
    order = [4, 7, 0, 0, 2, 6, 1, 5, 3]  # one sequence twice
    shuffled = together.of_sequences(order)
    policies = quest(together, token_budget=80), quest(shuffled, token_budget=80)
    for place, row in enumerate(order):
        assert_same_row((together, policies[0]), row, 1, (shuffled, policies[1]), place, 1)


@pytest.mark.parametrize("spare_columns", [1, 200])
def test_a_row_is_the_same_in_a_wider_page_table(spare_columns: int) -> None:
    rows = decode_rows(CONTEXTS)
    wide = rows.of_sequences(list(range(len(CONTEXTS))), spare_columns)
    policies = quest(rows, token_budget=80), quest(wide, token_budget=80)
    for row in range(len(CONTEXTS)):
        assert_same_row((rows, policies[0]), row, 2, (wide, policies[1]), row, 2)


def test_a_row_is_the_same_wherever_its_pages_lie() -> None:
    """Ties aside, physical page ids say nothing: two caches with the same keys give the same logical pages."""
    rows = decode_rows([700])
    moved = decode_rows([700])
    order = torch.randperm(moved.cache.k_pages.shape[0], generator=torch.Generator().manual_seed(8))
    cache, bounds = moved.cache, moved.cache.metadata["page_min_max"]
    assert bounds is not None
    for pages in (cache.k_pages, cache.v_pages, bounds):
        pages[order] = pages.clone()
    moved.batch.page_table[0] = order[moved.batch.page_table[0].long()]
    chosen = [part.select(quest(part, token_budget=96)) for part in (rows, moved)]
    assert torch.equal(rows.attend(chosen[0]), moved.attend(chosen[1]))
    assert [[int(order[page]) for page in pages] for pages in lists(chosen[0])[0]] == lists(chosen[1])[0]


def test_equal_scores_go_to_the_lower_page() -> None:
    rows = decode_rows([320], group=1)
    bounds = rows.cache.metadata["page_min_max"]
    assert bounds is not None
    bounds[rows.batch.page_table[0].long()] = bounds[int(rows.batch.page_table[0, 0])].clone()
    table = rows.batch.page_table[0].tolist()
    selection = rows.select(quest(rows, token_budget=80))
    assert all(listed(selection, 0, head) == [*table[:3], *table[-2:]] for head in range(4))


# ---- a whole decode


@pytest.mark.parametrize(
    ("family", "overrides", "settings"),
    [
        ("llama", {"rope_parameters": LLAMA3_ROPE}, {"token_budget": 64}),
        pytest.param("llama", {"num_key_value_heads": 8}, {"token_budget": 48, "dense_layers": 0}, marks=pytest.mark.slow),
        pytest.param(
            "mistral", {"head_dim": 32}, {"token_budget": 40, "dense_layers": 1, "sink_pages": 0}, marks=pytest.mark.slow
        ),
        ("qwen2", {"num_key_value_heads": 2}, {"token_budget": 64, "dense_layers": 0, "group_reduction": "sum"}),
        ("qwen3", {}, {"token_budget": 64, "dense_layers": 0, "recent_pages": 1, "min_context": 90}),
    ],
)
def test_decoding_equals_an_eager_model_with_quest(
    tmp_path: Path, family: str, overrides: dict[str, Any], settings: dict[str, Any]
) -> None:
    """transformers' model, its attention replaced by Quest's definition: logits of given tokens, and greedy tokens."""
    path = tiny_checkpoint(tmp_path, family, **overrides)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="page_method").eval()
    emulation = PageMethod("quest", **settings)
    scored, prompt = random_tokens(130, seed=6), random_tokens(75, seed=7)
    with make_llm(path, sparse={"method": "quest", **settings}) as llm:
        (found,) = llm.score(scored, whole_vocabulary=True, decode_last_prompt_tokens=60)
        assert llm.stats()["attention"]["rows_sparse"] > 0
        output = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True), use_tqdm=False)[0]
    expected = reference_logits(model, scored, decoded=60, emulation=emulation)
    assert_close_to(found.logprobs, expected)
    assert output.outputs[0].token_ids == greedy_tokens_of_method(model, prompt, 60, emulation)
    # A dense model gives other logits by far: the agreement is not one of two dense models.
    assert (reference_logits(model, scored, decoded=60) - expected).abs().max() > 0.1 * expected.std()
    assert output.outputs[0].token_ids != greedy_tokens(model, prompt, 60)
