"""TOVA drops the tokens that the newest queries attend least, for ever, and per KV head and sequence alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from distributed_sparse import SamplingParams
from distributed_sparse.cache import AppendRuns, Geometry, LayerCache
from distributed_sparse.selection import resolve_sparse_config
from distributed_sparse.selection.base import Selection, dense_selection
from distributed_sparse.selection.tova import TovaConfig, TovaPolicy, Visible
from tests.support.checkpoints import decisive_checkpoint, tiny_checkpoint
from tests.support.decode_rows import DecodeRows, decode_rows
from tests.support.eager_methods import EagerTova
from tests.support.engine import make_llm
from tests.support.prompts import random_tokens
from tests.support.transformers_reference import assert_close_to, greedy_tokens_of_method, reference_logits

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.each_value]  # on CPU, equal bits are promised at one thread

CONTEXTS = [133, 20, 64, 65, 17, 100]
STEPS = 8


def kept(emulation: EagerTova, rows: DecodeRows, row: int) -> Tensor:
    """bool [H_q, n]: what each query head of a sequence attends in this step by the definition."""
    return emulation.log_weights(0, rows.q[row], rows.keys[row], rows.keys[row]).isfinite()


def tova(rows: DecodeRows, **settings: Any) -> TovaPolicy:
    return TovaPolicy(TovaConfig(**settings), rows.geometry)


def decoding(contexts: list[int] = CONTEXTS, **shape: Any) -> Iterator[DecodeRows]:
    """The last STEPS tokens of each sequence, decoded: in each step the rows as they are then."""
    rows = decode_rows(contexts, kinds=(Visible(),), **shape)
    generator = torch.Generator().manual_seed(99)
    for step in range(STEPS):
        q = torch.randn(rows.q.shape, generator=generator).to(rows.q.dtype)
        yield at(rows, [n - STEPS + 1 + step for n in contexts], q)


def at(rows: DecodeRows, lengths: list[int], q: Tensor) -> DecodeRows:
    """The rows when their contexts had these lengths, with these queries."""
    page_size = rows.batch.page_size
    context_lens = torch.tensor(lengths, dtype=torch.int32)
    num_pages = -(-context_lens // page_size)
    batch = replace(
        rows.batch,
        num_pages=num_pages,
        context_lens=context_lens,
        last_page_len=context_lens - (num_pages - 1) * page_size,
        max_context_len=max(lengths),
    )
    return replace(rows, q=q, batch=batch, keys=[key[:, :n] for key, n in zip(rows.keys, lengths)])


def positions(rows: DecodeRows, selection: Selection, row: int, head: int) -> list[int]:
    """The tokens that a row attends, as positions, in the order of its list."""
    page_size = rows.batch.page_size
    logical = {page: place for place, page in enumerate(rows.batch.page_table[row, : rows.batch.num_pages[row]].tolist())}
    pages = selection.pages[row, head, : selection.num_pages[row, head]].tolist()
    if pages:
        assert selection.num_tokens is None or selection.num_tokens[row, head] == 0, "pages or tokens, not both"
        every = [logical[page] * page_size + offset for page in pages for offset in range(page_size)]
        return every[: int(rows.batch.context_lens[row])]
    assert selection.tokens is not None and selection.num_tokens is not None
    slots = selection.tokens[row, head, : selection.num_tokens[row, head]].tolist()
    return [logical[slot // page_size] * page_size + slot % page_size for slot in slots]


@pytest.mark.parametrize(
    ("group", "dtype", "page_size"), [(1, torch.float32, 16), (4, torch.float32, 32), (4, torch.bfloat16, 16)]
)
@pytest.mark.parametrize("settings", [{"token_budget": 30}, {"token_budget": 1}, {"token_budget": 16, "min_context": 61}])
def test_every_step_attends_what_the_definition_leaves(
    settings: dict[str, Any], group: int, dtype: torch.dtype, page_size: int
) -> None:
    emulations = [EagerTova(**settings, dense_layers=0) for _ in CONTEXTS]
    sparse_rows = 0
    for rows in decoding(group=group, dtype=dtype, page_size=page_size):
        selection = rows.select(tova(rows, **settings))
        for row, emulation in enumerate(emulations):
            expected = kept(emulation, rows, row)[::group]
            for head in range(4):
                assert positions(rows, selection, row, head) == expected[head].nonzero().flatten().tolist()
            sparse_rows += int(expected.sum() < expected.numel())
    assert sparse_rows >= STEPS * 3


def test_the_output_is_attention_over_the_kept_tokens() -> None:
    emulations = [EagerTova(token_budget=30, dense_layers=0) for _ in CONTEXTS]
    for rows in decoding(group=4):
        out = rows.attend(rows.select(tova(rows, token_budget=30)))
        for row, emulation in enumerate(emulations):
            n = rows.keys[row].shape[1]
            table = rows.batch.page_table[row, : rows.batch.num_pages[row]].long()
            values = rows.cache.v_pages[table].transpose(0, 1).flatten(1, 2)[:, :n].double().repeat_interleave(4, 0)
            keys = rows.keys[row].double().repeat_interleave(4, 0)  # [H_q, n, d]
            logits = (keys @ rows.q[row].double()[..., None])[..., 0] / keys.shape[2] ** 0.5
            weights = logits.masked_fill(~kept(emulation, rows, row), float("-inf")).softmax(-1)
            expected = (weights[:, None] @ values)[:, 0]
            torch.testing.assert_close(out[row].double(), expected, atol=1e-4, rtol=0)


def test_contexts_within_the_budget_are_dense_bit_for_bit_alone_and_beside_sparse_ones() -> None:
    for rows in decoding():
        selection = rows.select(tova(rows, token_budget=70))
        dense = dense_selection(rows.batch, 4)
        out, dense_out = rows.attend(selection), rows.attend(dense)
        short = rows.batch.context_lens <= 70
        assert torch.equal(out[short], dense_out[short])
        assert not torch.equal(out[~short], dense_out[~short])
        assert not selection.is_dense
        few = [row for row, is_short in enumerate(short.tolist()) if is_short]
        assert rows.of_sequences(few).select(tova(rows, token_budget=70)).is_dense
        counted = selection.attended(rows.batch.last_page_len, 16)
        assert torch.equal(counted, rows.batch.context_lens.clamp_max(70)[:, None].expand(-1, 4))


def test_a_row_is_the_same_alone_in_another_order_and_on_fewer_heads() -> None:
    outputs = []
    for rows in decoding():
        outputs.append(rows.attend(rows.select(tova(rows, token_budget=30))))
    order = [5, 0, 3, 1, 2, 4]
    for some in (order, [0], [3], [5]):
        part_cache = None
        for step, rows in enumerate(decoding()):
            part = rows.of_sequences(some, spare_columns=3).of_heads(1, 3)
            part_cache = part_cache or part.cache  # of_heads copies: what one step drops has to be there in the next
            part = replace(part, cache=part_cache)
            out = part.attend(part.select(tova(part, token_budget=30)))
            assert torch.equal(out, outputs[step][some, 2:6]), f"sequences {some}, step {step}"


def test_the_query_s_own_token_stays_and_of_equal_weights_the_older_fall() -> None:
    rows = decode_rows([40], kinds=(Visible(),))
    rows.cache.k_pages.fill_(1.0)
    page = rows.batch.page_table[0, 2]
    rows.cache.k_pages[page, :, 7] = -1.0  # the newest token, which the query likes least
    rows = replace(rows, q=torch.ones_like(rows.q))
    selection = rows.select(tova(rows, token_budget=5))
    assert positions(rows, selection, 0, 0) == [35, 36, 37, 38, 39]


def test_heads_drop_different_tokens_and_leave_other_rows_alone() -> None:
    (*_, rows) = decoding()
    before = rows.cache.metadata["visible"].clone()
    own = rows.of_sequences([0])
    selection = own.select(tova(rows, token_budget=30))
    assert len({tuple(positions(own, selection, 0, head)) for head in range(4)}) == 4
    after = rows.cache.metadata["visible"]
    pages = rows.batch.page_table[0, : rows.batch.num_pages[0]].long()
    assert after[pages].sum(dim=(0, 2)).tolist() == [30] * 4
    after[pages] = before[pages]
    assert torch.equal(after, before)


def test_tokens_of_a_recycled_page_are_visible_and_no_others_are_touched() -> None:
    geometry = Geometry(2, 1, 64, 16, torch.float32, torch.device("cpu"), first_kv_head=0)
    cache = LayerCache.allocate(0, 6, geometry, (Visible(),))
    visible = cache.metadata["visible"]
    assert visible.dtype == torch.uint8 and not visible.any()
    numbers = torch.tensor([[3, 1, 5], [0, 1, 13], [9, 0, 4], [1, 12, 3]], dtype=torch.int32)  # pages, starts, offsets, counts
    cache.append(torch.zeros(16, 2, 64), torch.zeros(16, 2, 64), AppendRuns(*numbers))
    expected = torch.zeros(6, 2, 16, dtype=torch.uint8)
    expected[3, :, 9], expected[1, :, :12], expected[5, :, 4:7] = 1, 1, 1
    assert torch.equal(visible, expected)


@pytest.mark.parametrize("contexts", [[100], [4096, 4096]])
def test_a_warm_up_on_the_null_page_selects_something_finite(contexts: list[int]) -> None:
    """Kernels are warmed up at the longest context with every page the null page, of which one token has been written.

    Two rows share it then: the first may drop all that the second would see.
    """
    rows = decode_rows(contexts, kinds=(Visible(),))
    cache = LayerCache.allocate(0, 1, rows.geometry, (Visible(),))
    numbers = torch.tensor([[0], [0], [3], [1]], dtype=torch.int32)
    cache.append(torch.ones(1, 4, 64), torch.ones(1, 4, 64), AppendRuns(*numbers))
    rows.batch.page_table.zero_()
    rows = replace(rows, cache=cache)
    selection = rows.select(tova(rows, token_budget=40))
    assert torch.isfinite(rows.attend(selection)).all()
    assert torch.equal(rows.attend(selection)[0], torch.ones_like(rows.q[0]))


# ---- end to end


@pytest.mark.parametrize("settings", [{"token_budget": 40}, {"token_budget": 24, "dense_layers": 0, "min_context": 90}])
def test_decoding_equals_an_eager_model_that_drops_tokens(tmp_path: Path, settings: dict[str, Any]) -> None:
    path = tiny_checkpoint(tmp_path, "qwen3")
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="page_method").eval()
    scored, prompt = random_tokens(130, seed=6), random_tokens(75, seed=7)
    with make_llm(path, sparse={"method": "tova", **settings}) as llm:
        (found,) = llm.score(scored, whole_vocabulary=True, decode_last_prompt_tokens=60)
        output = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True), use_tqdm=False)[0]
        assert llm.stats()["attention"]["rows_sparse"] > 0
    expected = reference_logits(model, scored, decoded=60, emulation=EagerTova(**settings))
    assert_close_to(found.logprobs, expected)
    assert output.outputs[0].token_ids == greedy_tokens_of_method(model, prompt, 60, EagerTova(**settings))
    assert (reference_logits(model, scored, decoded=60) - expected).abs().max() > 0.1 * expected.std()


@pytest.mark.parametrize("decoded", [0, 30])
def test_each_sample_of_a_request_drops_tokens_of_its_own(tmp_path: Path, decoded: int) -> None:
    path, prompt = tiny_checkpoint(tmp_path, "qwen3"), random_tokens(100, seed=8)
    params = SamplingParams(
        temperature=1.0, seed=3, n=3, max_tokens=40, ignore_eos=True, logprobs=0, decode_last_prompt_tokens=decoded
    )
    with make_llm(path, sparse={"method": "tova", "token_budget": 24}, max_num_batched_tokens=512) as llm:
        (output,) = llm.generate([prompt], params, use_tqdm=False)
        samples = [sample.token_ids for sample in output.outputs]
        assert len({tuple(tokens) for tokens in samples}) == 3
        for sample in output.outputs:
            # the same tokens once more, alone: no sample has dropped what another one still sees
            tokens = sample.token_ids
            (alone,) = llm.score(prompt + tokens, whole_vocabulary=True, decode_last_prompt_tokens=decoded + 40)
            assert sample.logprobs is not None and alone.logprobs is not None
            found = [entry[token].logprob for entry, token in zip(sample.logprobs, tokens)]
            expected = alone.logprobs[range(-40, 0), tokens].tolist()
            assert found == pytest.approx(expected, abs=1e-3)
        assert llm.stats()["pages"]["used"] == 0


def test_two_ranks_give_the_tokens_of_one(tmp_path: Path) -> None:
    path = decisive_checkpoint(tmp_path)
    prompts = [random_tokens(length, seed=length) for length in (90, 17, 140)]
    params = SamplingParams(temperature=0.0, n=2, max_tokens=50, ignore_eos=True)
    tokens = []
    for ranks in (1, 2):
        with make_llm(path, ranks, sparse={"method": "tova", "token_budget": 40}) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            tokens.append([sample.token_ids for output in outputs for sample in output.outputs])
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"token_budget": 0}, "sparse.token_budget=0 is below 1: the query's own token is always attended; set 1 or more"),
        ({"sink_pages": 1}, "sparse.sink_pages=1, but tova keeps tokens by their weight alone; leave it at 0"),
        ({"recent_pages": 2}, "sparse.recent_pages=2, but tova keeps tokens by their weight alone; leave it at 1"),
    ],
)
def test_settings_that_cannot_hold_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_sparse_config({"method": "tova", **settings})
