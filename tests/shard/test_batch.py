"""What a plan's tokens look like to the kernels: every token's position, page and slot, and rows that are no one's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_sparse.protocol.step import DecodeRow, PrefillChunk, SlotSetup, StepPlan
from distributed_sparse.shard.batch import build_layout, make_batch
from distributed_sparse.shard.inputs import StepInputs
from distributed_sparse.shard.logit_rows import LOGPROB_ROWS, LogitRows
from distributed_sparse.shard.slots import SlotTable

PAGE, NUM_SLOTS, MAX_PAGES = 16, 6, 9
CPU = torch.device("cpu")


def setup(slot: int, **given: Any) -> SlotSetup:
    defaults: dict[str, Any] = {
        **{"prompt_length": 40, "prefill_length": 33, "seed": 2**33 * (slot + 1) + slot, "sample_index": slot % 3},
        **{"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "logprobs": None, "suppressed": [], "suppress_until": 0},
    }
    return SlotSetup(slot=slot, **{**defaults, **given})


def full_slots() -> SlotTable:
    """Every slot has all its pages: slot s holds 10 s + 1, 10 s + 2, ..."""
    slots = SlotTable(NUM_SLOTS, MAX_PAGES, CPU)
    pages = [(slot, [10 * slot + page + 1 for page in range(MAX_PAGES)]) for slot in range(NUM_SLOTS)]
    plan = StepPlan(step=0, generation=0, setups=[setup(slot) for slot in range(NUM_SLOTS)], new_pages=pages)
    apply(slots, plan)
    slots.last_token.copy_(torch.arange(NUM_SLOTS) + 700)
    return slots


def apply(slots: SlotTable, plan: StepPlan) -> None:
    changes = StepInputs(1 << 14, CPU).upload(slots.apply(plan))
    if "new_pages" in changes:
        slots.update(changes["new_page_places"], changes["new_pages"])


decode_rows = st.lists(
    st.builds(
        DecodeRow,
        slot=st.integers(0, NUM_SLOTS - 1),
        position=st.integers(0, PAGE * MAX_PAGES - 1),
        token=st.none() | st.integers(0, 300),
        samples=st.just([]),
        trace=st.booleans(),
    ),
    max_size=5,
)
chunks = st.lists(
    st.builds(
        lambda slot, start, length: PrefillChunk(slot=slot, start=start, tokens=[*range(start, start + length)], samples=[]),
        slot=st.integers(0, NUM_SLOTS - 1),
        start=st.integers(0, 70),
        length=st.integers(1, 74),
    ),
    max_size=3,
)


@settings(max_examples=150, deadline=None)
@given(decode=decode_rows, prefill=chunks, padding=st.integers(0, 3))
def test_every_token_has_its_position_its_page_and_its_place_in_it(
    decode: list[DecodeRow], prefill: list[PrefillChunk], padding: int
) -> None:
    """Against a loop over the plan, one token at a time."""
    if not decode and not prefill:
        return
    slots, plan = full_slots(), StepPlan(step=1, generation=0, decode=decode, prefill=prefill)
    num_rows = len(decode) + (padding if decode and not prefill else 0)
    layout = build_layout(plan, slots, PAGE, num_rows)
    views = StepInputs(1 << 14, CPU).upload(layout.arrays)
    batch = make_batch(layout, views, slots, PAGE)

    tokens, expected = [], []
    for part in plan.parts:
        for offset in range(part.num_tokens):
            position = part.end - part.num_tokens + offset
            token = part.tokens[offset] if isinstance(part, PrefillChunk) else part.token
            tokens.append(700 + part.slot if token is None else token)
            expected.append((position, max(position + 1, 33), 10 * part.slot + position // PAGE + 1, position % PAGE))
    real = [*range(len(decode)), *range(num_rows, num_rows + sum(chunk.num_tokens for chunk in prefill))]
    assert len(batch.token_ids) == num_rows + len(real) - len(decode)
    assert batch.token_ids[real].tolist() == tokens
    assert [*zip(batch.positions[real].tolist(), batch.rope_lengths[real].tolist())] == [entry[:2] for entry in expected]

    places = {}
    runs = [run.tolist() for run in (batch.runs.pages, batch.runs.starts, batch.runs.offsets, batch.runs.counts)]
    for page, start, offset, count in zip(*runs):
        assert offset + count <= PAGE
        for step in range(count):
            assert start + step not in places, "a token is in two runs"
            places[start + step] = (page, offset + step)
    assert places == {row: entry[2:] for row, entry in zip(real, expected)}

    assert (batch.decode is None) == (num_rows == 0) and (batch.prefill is None) == (not prefill)
    if batch.decode is not None:
        lengths = [row.end for row in decode] + [0] * (num_rows - len(decode))
        assert batch.decode.context_lens.tolist() == lengths and layout.context_lens == lengths[: len(decode)]
        assert batch.decode.num_pages.tolist() == [-(-length // PAGE) for length in lengths]
        filled = (batch.decode.num_pages - 1) * PAGE + batch.decode.last_page_len
        assert filled.tolist() == lengths and batch.decode.last_page_len.min() >= 1 and batch.decode.last_page_len.max() <= PAGE
        assert batch.decode.max_context_len == max(lengths)
        assert batch.decode.page_table.shape[1] == max(-(-length // PAGE) for length in lengths)
        for row, part in enumerate(decode):
            pages = batch.decode.page_table[row, : batch.decode.num_pages[row]].tolist()
            assert pages == [10 * part.slot + page + 1 for page in range(len(pages))]
            seed, sample = setup(part.slot).seed, part.slot % 3 if part.position >= 40 else 0
            assert batch.decode.random_key[:, row].tolist() == [seed & 0xFFFFFFFF, seed >> 32, sample, part.position]
        assert batch.decode.trace == any(row.trace for row in decode)
    if batch.prefill is not None:
        starts = np.cumsum([0, *(chunk.num_tokens for chunk in prefill)])
        assert batch.prefill.query_start.tolist() == starts.tolist()
        assert batch.prefill.context_lens.tolist() == [chunk.end for chunk in prefill]
        assert batch.prefill.max_query_len == max(chunk.num_tokens for chunk in prefill)
        for row, chunk in enumerate(prefill):
            pages = -(-chunk.end // PAGE)
            assert batch.prefill.page_table[row, :pages].tolist() == [10 * chunk.slot + page + 1 for page in range(pages)]


def test_a_row_that_pads_reads_and_writes_nothing() -> None:
    slots = full_slots()
    plan = StepPlan(step=1, generation=0, decode=[DecodeRow(slot=2, position=37, token=None, samples=[2])])
    layout = build_layout(plan, slots, PAGE, 4)
    batch = make_batch(layout, StepInputs(1 << 14, CPU).upload(layout.arrays), slots, PAGE)
    assert batch.decode is not None and batch.num_decode == 4
    assert batch.runs.counts.tolist() == [1, 0, 0, 0] and batch.runs.pages.tolist()[1:] == [0, 0, 0]
    assert batch.decode.num_pages.tolist() == [3, 0, 0, 0] and batch.decode.context_lens.tolist() == [38, 0, 0, 0]


def test_a_slot_that_was_never_set_up_is_refused() -> None:
    slots = SlotTable(3, 2, CPU)
    apply(slots, StepPlan(step=0, generation=0, setups=[setup(0)]))
    with pytest.raises(AssertionError, match="never set up"):
        build_layout(StepPlan(step=1, generation=0, decode=[DecodeRow(slot=1, position=0, token=5, samples=[])]), slots, PAGE)


def test_the_two_page_tables_stay_equal_as_slots_grow_and_are_given_on() -> None:
    slots, rng = SlotTable(3, 8, CPU), np.random.default_rng(0)
    expected: dict[int, list[int]] = {}
    for step in range(60):
        plan = StepPlan(step=step, generation=0)
        for slot in rng.permutation(3)[: rng.integers(0, 4)].tolist():
            if slot not in expected or len(expected[slot]) > 5 or rng.random() < 0.1:
                plan.setups.append(setup(slot))
                expected[slot] = []
            new = rng.integers(1, 1000, rng.integers(1, 3)).tolist()
            plan.new_pages.append((slot, new))
            expected[slot] += new
        apply(slots, plan)
        for slot, pages in expected.items():
            assert slots.host_page_table[slot, : len(pages)].tolist() == pages
        assert np.array_equal(slots.page_table.numpy(), slots.host_page_table)


# ---- what is read of the hidden states


def test_rows_are_read_once_for_all_samples_that_are_drawn_from_them() -> None:
    plan = StepPlan(
        step=1,
        generation=0,
        decode=[DecodeRow(0, 9, 1, [0]), DecodeRow(1, 4, 1, []), DecodeRow(2, 7, 1, [2])],
        prefill=[PrefillChunk(3, 0, [1, 2, 3], []), PrefillChunk(4, 10, [1, 2], [4, 5])],
    )
    logit_rows = LogitRows.of(plan)
    assert logit_rows.rows.tolist() == [0, 2, 7, 7] and logit_rows.slots.tolist() == [0, 2, 4, 5]
    assert logit_rows.positions.tolist() == [10, 8, 12, 12]
    views = StepInputs(1 << 10, CPU).upload(logit_rows.arrays())
    hidden = torch.arange(8)[:, None]
    rows = logit_rows.distinct_rows(hidden, views)
    assert rows.flatten().tolist() == [0, 2, 7]
    assert rows.index_select(0, views["drawn_places"]).flatten().tolist() == [0, 2, 7, 7]


def test_a_step_that_draws_from_every_row_copies_none() -> None:
    plan = StepPlan(step=1, generation=0, decode=[DecodeRow(slot, 9, None, [slot]) for slot in (3, 0, 5)])
    logit_rows = LogitRows.of(plan)
    views = StepInputs(1 << 10, CPU).upload(logit_rows.arrays())
    assert set(views) == {"drawn_slots"}
    hidden = torch.zeros(4, 2)  # one row pads
    assert logit_rows.distinct_rows(hidden, views).shape == (3, 2)
    assert logit_rows.distinct_rows(hidden, views).data_ptr() == hidden.data_ptr()


def test_known_tokens_are_scored_in_blocks() -> None:
    length = 2 * LOGPROB_ROWS + 44
    targets = [*range(1000, 1000 + length)]
    plan = StepPlan(
        step=1,
        generation=0,
        decode=[DecodeRow(0, 9, 1, []), DecodeRow(1, 20, 1, [], target=77, prompt_logprobs=-1)],
        prefill=[PrefillChunk(2, 0, [0] * 5, []), PrefillChunk(3, 30, [0] * length, [], targets=targets, prompt_logprobs=2)],
    )
    logit_rows = LogitRows.of(plan)
    assert logit_rows.targets.tolist() == [77, *targets] and not logit_rows.rows.size
    assert set(logit_rows.arrays()) == {"targets"}
    assert logit_rows.blocks == [
        (1, 21, 1, 0, 1, -1),
        (3, 31, 7, 1, LOGPROB_ROWS, 2),
        (3, 31 + LOGPROB_ROWS, 7 + LOGPROB_ROWS, 1 + LOGPROB_ROWS, LOGPROB_ROWS, 2),
        (3, 31 + 2 * LOGPROB_ROWS, 7 + 2 * LOGPROB_ROWS, 1 + 2 * LOGPROB_ROWS, 44, 2),
    ]
