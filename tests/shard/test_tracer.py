"""A trace says what attention read and how far its output is from dense attention, by their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from distributed_sparse.protocol.step import DecodeRow
from distributed_sparse.selection.base import Policy, Selection, dense_selection, token_selection
from distributed_sparse.selection.quest import QuestConfig, QuestPolicy
from distributed_sparse.shard.tracer import Tracer
from distributed_sparse.trace import LayerTrace, parse_trace
from tests.support.decode_rows import DecodeRows, decode_rows

CONTEXTS = [333, 64, 200, 17]


def trace(rows: DecodeRows, selection: Selection, traced: list[int], out: Tensor | None = None) -> dict[int, LayerTrace]:
    """One layer's trace of some of the batch's rows, by row."""
    lengths = rows.batch.context_lens.tolist()
    decode = [DecodeRow(row, n - 1, None, [], trace=row in traced) for row, n in enumerate(lengths)]
    tracer = Tracer(rows.geometry, decode)
    tracer.record(rows.q, rows.cache, rows.batch, selection, rows.attend(selection) if out is None else out)
    assert [block.slot for block in tracer.blocks] == traced
    return {block.slot: parse_trace([block]).layers[0] for block in tracer.blocks}


def dense_row(rows: DecodeRows, row: int, head: int) -> tuple[Tensor, Tensor]:
    """Softmax weights [n] and output [d] of one query head, in float64, from the keys themselves."""
    kv_head = head // rows.geometry.group_size
    logits = rows.keys[row][kv_head].double() @ rows.q[row, head].double() * rows.geometry.scale
    table = rows.batch.page_table[row, : int(rows.batch.num_pages[row])].long()
    values = rows.cache.v_pages[table, kv_head].flatten(0, 1)[: len(logits)].double()
    return logits.softmax(0), logits.softmax(0) @ values


def test_dense_attention_misses_nothing() -> None:
    rows = decode_rows(CONTEXTS)
    for row, found in trace(rows, dense_selection(rows.batch, 4), [0, 1, 2, 3]).items():
        assert found.captured_mass == pytest.approx(1.0)
        assert (found.relative_error < 1e-5).all()
        assert all(np.array_equal(of_head, np.arange(CONTEXTS[row])) for of_head in found.indices)
        assert found.num_attended.tolist() == [CONTEXTS[row]] * 4


def test_mass_error_entropy_and_counts_are_those_of_the_definition() -> None:
    rows = decode_rows(CONTEXTS)
    policy: Policy = QuestPolicy(QuestConfig(token_budget=64), rows.geometry)
    selection = rows.select(policy)
    out = rows.attend(selection)
    traces = trace(rows, selection, [0, 2], out)
    for row, found in traces.items():
        table = rows.batch.page_table[row].tolist()
        for head in range(8):
            weights, dense = dense_row(rows, row, head)
            listed = selection.pages[row, head // 2, : int(selection.num_pages[row, head // 2])].tolist()
            seen = sorted(16 * table.index(page) + slot for page in listed for slot in range(16))
            seen = [position for position in seen if position < CONTEXTS[row]]
            assert found.indices[head // 2].tolist() == seen
            assert found.captured_mass[head] == pytest.approx(float(weights[seen].sum()), rel=1e-5)
            error = (out[row, head].double() - dense).norm() / dense.norm()
            assert found.relative_error[head] == pytest.approx(float(error), rel=1e-4)
            assert found.entropy[head] == pytest.approx(-sum(float(w) * math.log(float(w)) for w in weights), rel=1e-5)
            best = weights.sort(descending=True).values
            for needed, mass in zip(found.tokens_for_mass[head], (0.5, 0.9, 0.95, 0.99)):
                assert float(best[:needed].sum()) >= mass - 1e-9 and float(best[: needed - 1].sum()) < mass


def test_tokens_and_what_a_partial_has_read_count_too() -> None:
    """The first page in `partial_selection`, single tokens beside it: one list of positions, ascending."""
    rows = decode_rows([100])
    table = rows.batch.page_table[0]
    positions = torch.tensor([70, 33, 99], dtype=torch.int32)
    tokens = (table[positions // 16] * 16 + positions % 16).view(1, 1, 3).expand(1, 4, 3)
    selection = token_selection(rows.batch, tokens, torch.full((1, 4), 3, dtype=torch.int32))
    selection.partial_selection = Selection(table[:1].view(1, 1, 1).expand(1, 4, 1), torch.ones(1, 4, dtype=torch.int32))
    selection.details = {"budget": torch.arange(4.0).view(1, 4)}
    found = trace(rows, selection, [0])[0]
    assert all(of_head.tolist() == [*range(16), 33, 70, 99] for of_head in found.indices)
    assert found.details["budget"].tolist() == [0, 1, 2, 3]
    for head in range(8):
        weights, _ = dense_row(rows, 0, head)
        assert found.captured_mass[head] == pytest.approx(float(weights[[*range(16), 33, 70, 99]].sum()), rel=1e-5)


def test_ranks_stand_side_by_side() -> None:
    rows = decode_rows(CONTEXTS)
    whole = trace(rows, dense_selection(rows.batch, 4), [1])[1]
    blocks = []
    for first in (0, 2):
        part = rows.of_heads(first, first + 2)
        tracer = Tracer(part.geometry, [DecodeRow(0, 332, None, []), DecodeRow(1, 63, None, [], trace=True)])
        selection = dense_selection(part.batch, 2)
        tracer.record(part.q, part.cache, part.batch, selection, part.attend(selection))
        blocks += tracer.blocks
    step = parse_trace(blocks)
    assert step.position == 63
    assert step.layers[0].entropy == pytest.approx(whole.entropy)
    assert np.array_equal(step.layers[0].tokens_for_mass, whole.tokens_for_mass)
    assert len(step.layers[0].indices) == 4
